"""Whole models at their published shapes: training steps and inference with every method, over lengths of input and
prefix.

Rivals, by turns on one frozen model with random weights: the model without prompt or prefix (the floor), this package's
methods, PT, DePT and ADePT as their authors' code does them (lookup, products, sum, concatenation, then the model), and
PEFT's prompt and prefix tuning. Measured: a training step (forward + backward), inference (forward), and what both add
to memory at their peak.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import fastprefix

from . import embedding, environment, models, options, results, subjects, summaries
from .methods import ADEPT_WIDTH, DEPT_RANK, FLOOR, frozen, with_peft
from .models import Size, head_parameters
from .results import Case, Cell, Fault, Role, Run
from .steps import Work, side_by_side
from .tasks import TaskKind

NAME = "models"
DESCRIPTION = "Whole models at published shapes: every method and its peers, over lengths of input and prefix."
CLASSES = 2
TOKENS, PREFIX = 128, 100
"""Where the curves over lengths of input and of prefix cross."""
LENGTHS, PREFIXES = (64, 256), (10, 50, 200)

Prepare = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class Shape:
    """A model's shape; its vocabulary is smaller than the published one, whose table no method changes but ADePT."""

    name: str
    task: TaskKind
    size: Size


SHAPES: tuple[Shape, ...] = (
    Shape("BERT-base", "classification", Size(layers=12, width=768, heads=12, vocabulary=8192, rows=4, length=512)),
    Shape("Llama, 12 x 768", "causal_lm", Size(layers=12, width=768, heads=12, vocabulary=8192, rows=4, length=512)),
)
QUICK = tuple(
    Shape(shape.name, shape.task, Size(layers=2, width=32, heads=2, vocabulary=256, rows=2, length=32))
    for shape in SHAPES
)


def with_rows(shapes: Sequence[Shape], rows: int) -> tuple[Shape, ...]:
    """The same shapes, with so many rows in a batch."""
    return tuple(replace(shape, size=replace(shape.size, rows=rows)) for shape in shapes)


@dataclass(frozen=True)
class Rival:
    """A way to train a frozen model."""

    name: str
    role: Role
    prepare: Prepare


class EagerPrompt(nn.Module):
    """A soft prompt in every row, as it is usually written; ``offset`` turns the tokens' rows into others."""

    def __init__(self, model: Any, P: int, offset: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.offset = model.requires_grad_(False), offset
        for parameter in head_parameters(model):
            parameter.requires_grad_(True)
        self.prompt = nn.Parameter(torch.randn(P, model.config.hidden_size, device=model.device, dtype=model.dtype))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """The model's output, its loss that of the caller's tokens."""
        rows = self.model.get_input_embeddings()(input_ids)
        embeds = embedding.behind_prompt(self.prompt, rows if self.offset is None else self.offset(rows))
        front = (len(self.prompt), 0)
        mask = F.pad(attention_mask, front, value=1)
        if labels.ndim == 2:
            labels = F.pad(labels, front, value=-100)
        return self.model(inputs_embeds=embeds, attention_mask=mask, labels=labels)


class EagerLowRank(nn.Module):
    """DePT's offset on ``[B, N, d]``."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(length, DEPT_RANK)), nn.Parameter(torch.zeros(DEPT_RANK, width))

    def forward(self, rows: Tensor) -> Tensor:
        """The rows with their positions' offset."""
        return rows + (self.a @ self.b)[: rows.shape[1]]


class EagerNetwork(nn.Module):
    """ADePT's offset on ``[B, N, d]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = ((width, ADEPT_WIDTH), (ADEPT_WIDTH,), (ADEPT_WIDTH, width), (width,))
        self.ffn = nn.ParameterList([nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes])

    def forward(self, rows: Tensor) -> Tensor:
        """The rows with their tokens' offset."""
        w1, b1, w2, b2 = self.ffn
        return embedding.with_offset(rows, (w1, b1, w2, b2))


def rivals(task: TaskKind, N: int, P: int, width: int) -> Iterator[Rival]:
    """All of them, with prompts and prefixes of P tokens."""
    yield Rival(FLOOR, "floor", frozen)
    configs = {
        "PT": fastprefix.PromptTuningConfig(P),
        "DePT": fastprefix.DePTConfig(P, rank=DEPT_RANK, max_length=N),
        "ADePT": fastprefix.ADePTConfig(P, bottleneck_dim=ADEPT_WIDTH),
        "prefix tuning": fastprefix.PrefixTuningConfig(P),
        "APT": fastprefix.APTConfig(P),
    }
    for name, config in configs.items():
        yield Rival(name, "ours", partial(fastprefix.attach, config=config))
    yield Rival("PT, eager", "peer", lambda model: EagerPrompt(model, P))
    yield Rival("DePT, eager", "peer", lambda model: _placed(EagerPrompt(model, P, EagerLowRank(N, width)), model))
    yield Rival("ADePT, eager", "peer", lambda model: _placed(EagerPrompt(model, P, EagerNetwork(width)), model))
    if importlib.util.find_spec("peft"):
        yield Rival("PEFT PT", "peer", partial(with_peft, "PromptTuningConfig", task, P))
        yield Rival("PEFT prefix tuning", "peer", partial(with_peft, "PrefixTuningConfig", task, P))


def _placed(module: nn.Module, model: PreTrainedModel) -> nn.Module:
    return module.to(device=model.device, dtype=model.dtype)


def batch_of(shape: Shape, N: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens without padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, shape.size.vocabulary, (shape.size.rows, N), generator=generator)
    classes = torch.randint(0, CLASSES, (shape.size.rows,), generator=generator)
    labels = ids if shape.task == "causal_lm" else classes
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def measure(
    shape: Shape, base: PreTrainedModel, N: int, P: int, rounds: int, device: torch.device
) -> tuple[list[Cell], list[Fault]]:
    """All rivals at one pair of lengths."""
    dtype = str(base.dtype).removeprefix("torch.")
    case: Case = {"model": shape.name, "N": N, "P": P, "rows": shape.size.rows, "dtype": dtype}
    chosen = {rival.name: rival for rival in rivals(shape.task, N, P, shape.size.width)}
    batch = batch_of(shape, N, device)
    works = {
        name: Work(rival.prepare(models.with_shared_weights(base)), batch, rival.role) for name, rival in chosen.items()
    }
    return side_by_side(works, case, rounds, device)


def build(shape: Shape, device: torch.device) -> PreTrainedModel:
    """The frozen model."""
    if shape.task == "causal_lm":
        return subjects.placed(models.build_decoder(shape.size, pad=0, end=1, seed=0), device)
    return subjects.placed(models.build_encoder(shape.size, CLASSES, pad=0, seed=0), device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's options."""
    options.add_common(parser)
    options.add_threads(parser)
    parser.add_argument("--rounds", type=options.positive, default=3, help="default: 3")
    parser.add_argument("--rows", type=options.positive, help="in a batch (default: 4)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a line for each pair of lengths, write."""
    options.set_threads(arguments.threads)
    device = options.device_for(arguments.device)
    places = [(TOKENS, PREFIX), *((N, PREFIX) for N in LENGTHS), *((TOKENS, P) for P in PREFIXES)]
    shapes, rounds = SHAPES, arguments.rounds
    if arguments.quick:
        places, shapes, rounds = [(16, 4), (24, 4)], QUICK, 1
    if arguments.rows:
        shapes = with_rows(shapes, arguments.rows)
    settings = {"sizes": {shape.name: asdict(shape.size) for shape in shapes}}
    whole = Run(NAME, environment.describe(device), settings, list[Cell](), list[Fault]())
    for shape in shapes:
        base = build(shape, device)
        for N, P in places:
            cells, faults = measure(shape, base, N, P, rounds, device)
            print(summaries.line(cells), flush=True)
            whole = replace(whole, cells=[*whole.cells, *cells], faults=[*whole.faults, *faults])
            results.write(whole, arguments.out)  # whoever stops the run keeps what is done
    return results.conclude(whole, arguments.out)
