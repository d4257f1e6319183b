"""A soft prompt that runs once for the whole batch, against one that runs in every row, and against none.

Rivals, by turns on one frozen Llama-shaped model: the model without a prompt (the floor), the prompt methods on the
shared path, prompt tuning on the textbook path, the methods merged for inference, and PEFT's prompt tuning. Measured:
a training step (forward + backward), the prefill (a forward pass that fills a cache), decoding a token after it, and
what step and prefill add to memory at their peak. Ratios compare medians with the floor's.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastprefix
from fastprefix.methods import MethodConfig

from . import environment, models, options, results, steps, subjects, summaries
from .memory import added_peak
from .methods import ADEPT_WIDTH, DEPT_RANK, FLOOR, frozen, with_peft
from .models import Size
from .results import Case, Cell, Fault, Role, Run
from .timing import Clock, Job, interleave, timed

NAME = "shared-prompt"
DESCRIPTION = "A soft prompt that runs once for the whole batch: training steps, prefill, decoding, memory."
FULL = Size(layers=6, width=512, heads=8, vocabulary=4096, rows=16, length=128)
QUICK = Size(layers=2, width=64, heads=2, vocabulary=512, rows=2, length=16)
LENGTHS = (20, 60, 100)
DECODED = 32  # tokens
TARGETS = {"step at S = 100": 1.15, "step at S = 60": 1.10, "step's memory": 1.10, "prefill after merging": 1.05}
"""At most so many times the floor's."""

Prepare = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class Rival:
    """A way to a prompt; ``trains`` is False after merging."""

    name: str
    role: Role
    prepare: Prepare
    trains: bool = True


def rivals(S: int, length: int) -> list[Rival]:
    """All of them, at a prompt of S tokens."""
    prompt = partial(fastprefix.PromptTuningConfig, S)
    dept = partial(fastprefix.DePTConfig, S, rank=DEPT_RANK, max_length=length + DECODED)
    adept = partial(fastprefix.ADePTConfig, S, bottleneck_dim=ADEPT_WIDTH)
    ours: dict[str, Callable[..., MethodConfig]] = {"PT": prompt, "DePT": dept, "ADePT": adept}
    chosen = [Rival(FLOOR, "floor", frozen)]
    for name, make in ours.items():
        chosen.append(Rival(f"{name} shared", "ours", partial(_attached, make(shared_prompt=True))))
    chosen.append(Rival("PT textbook", "ours", partial(_attached, prompt(shared_prompt=False))))
    for name, make in ours.items():
        chosen.append(Rival(f"{name} merged", "ours", partial(_merged, make()), trains=False))
    if importlib.util.find_spec("peft"):
        chosen.append(Rival("PEFT PT", "peer", partial(with_peft, "PromptTuningConfig", "causal_lm", S)))
    return chosen


def _attached(config: MethodConfig, model: PreTrainedModel) -> nn.Module:
    return fastprefix.attach(model, config)


def _merged(config: MethodConfig, model: PreTrainedModel) -> nn.Module:
    return fastprefix.merge(fastprefix.attach(model, config))


class Work(steps.Work):
    """What is measured of one rival."""

    def __init__(self, model: Any, ids: Tensor, role: Role) -> None:
        self.tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        super().__init__(model, {**self.tokens, "labels": ids}, role)

    @torch.no_grad()
    def prefill(self) -> None:
        """All tokens at once, into a cache, and the logits of the last."""
        self.model.eval()
        self.model(**self.tokens, use_cache=True, logits_to_keep=1)

    def decode(self, clock: Clock) -> float:
        """Seconds a token: so many more tokens take so much longer."""
        return (clock(partial(self._generate, DECODED)) - clock(partial(self._generate, 1))) / (DECODED - 1)

    @torch.no_grad()
    def _generate(self, tokens: int) -> None:
        self.model.eval()
        options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, "eos_token_id": None}
        self.model.generate(**self.tokens, pad_token_id=0, **options)


def measure(size: Size, S: int, rounds: int, device: torch.device) -> tuple[list[Cell], list[Fault]]:
    """All rivals at one length."""
    base = subjects.placed(models.build_decoder(size, pad=0, end=1, seed=0), device)
    ids = torch.randint(2, size.vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(0))
    clock, case = Clock(device), {"S": S, **asdict(size)}
    chosen = {rival.name: rival for rival in rivals(S, size.length)}
    works = {
        name: Work(rival.prepare(models.with_shared_weights(base)), ids.to(device), rival.role)
        for name, rival in chosen.items()
    }
    trained = {name: work for name, work in works.items() if chosen[name].trains}
    jobs: dict[str, dict[str, Job]] = {
        "step": {name: timed(work.step, clock) for name, work in trained.items()},
        "prefill": {name: timed(work.prefill, clock) for name, work in works.items()},
        "decode": {name: partial(_decoded, clock, work) for name, work in works.items()},
    }
    cells: list[Cell] = []
    faults: list[Fault] = []
    for direction, of_direction in jobs.items():
        samples, failures = interleave(of_direction, range(rounds + 1), warmup=1, stage=direction)
        cells += [Cell.timed(case, name, chosen[name].role, direction, s) for name, s in samples.items()]
        faults += [Fault(case, name, failure) for name, failure in failures.items()]
    return cells + _peaks(case, works, chosen, cells, device), faults


def _decoded(clock: Clock, work: Work, _: int) -> float:
    return work.decode(clock)


def _peaks(
    case: Case, works: dict[str, Work], chosen: dict[str, Rival], timed: list[Cell], device: torch.device
) -> list[Cell]:
    """The memory of the steps and prefills that came through."""
    return [
        Cell(case, name, chosen[name].role, direction, "bytes", added_peak(getattr(works[name], direction), device))
        for name, direction in ((cell.competitor, cell.direction) for cell in timed)
        if direction in ("step", "prefill")
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's options."""
    options.add_common(parser)
    options.add_threads(parser)
    parser.add_argument("--rounds", type=options.positive, help="default: 15; 2 with --quick")
    parser.add_argument("--prompt", type=options.positive, nargs="+", default=LENGTHS, metavar="S", help="its lengths")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table for each length, write."""
    options.silence_libraries()
    options.set_threads(arguments.threads)
    device = options.device_for(arguments.device)
    size, rounds = (QUICK, 2) if arguments.quick else (FULL, 15)
    facts, settings = environment.describe(device), {"targets": TARGETS}
    cells, faults = list[Cell](), list[Fault]()
    whole = Run(NAME, facts, settings, cells, faults)
    for S in arguments.prompt:
        measured, failed = measure(size, S, arguments.rounds or rounds, device)
        print(f"{summaries.shared_prompt(Run(NAME, facts, settings, measured), S).markdown()}\n", flush=True)
        cells += measured
        faults += failed
        results.write(whole, arguments.out)  # whoever stops the run keeps what is done
    return results.conclude(whole, arguments.out)
