"""Whole models at their published shapes: every method and its peers, over lengths of input and prefix.

All of them are measured in turns on one frozen model with random weights: the floor, the methods of this package, PT,
DePT and ADePT like their authors' code (eager), and PEFT's prompt and prefix tuning.
"""

import argparse
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastprefix

from . import models
from .measure import Row
from .models import Size, TaskKind
from .options import add_common, positive, set_up
from .peers import ADEPT_WIDTH, DEPT_RANK, FLOOR, ModelPeer, attach, attach_eager, freeze, list_peft_peers
from .results import Record, describe_times
from .steps import ModelWork, measure_models

DESCRIPTION = "Whole models at published shapes: every method and its peers, over lengths of input and prefix."
CLASSES = 2
TOKENS, PREFIX = 128, 100
PLACES = [(TOKENS, PREFIX), *((N, PREFIX) for N in (64, 256)), *((TOKENS, P) for P in (10, 50, 200))]
"""Tokens of the input and of the prefix. The curves over both lengths cross at the first pair."""
QUICK_PLACES = [(16, 4), (24, 4)]


class ModelShape(NamedTuple):
    """The shape of a model. Its vocabulary is smaller than the published one, which only ADePT would change."""

    name: str
    kind: TaskKind
    size: Size


SHAPES = (
    ModelShape("BERT-base", "classification", Size(12, 768, 12, vocabulary=8192, rows=4, length=512)),
    ModelShape("Llama, 12 x 768", "causal_lm", Size(12, 768, 12, vocabulary=8192, rows=4, length=512)),
)
QUICK = tuple(shape._replace(size=Size(2, 32, 2, vocabulary=256, rows=2, length=32)) for shape in SHAPES)


def choose_shapes(options: argparse.Namespace) -> tuple[ModelShape, ...]:
    """Return the models, with as many rows in a batch as the options say."""
    shapes = QUICK if options.quick else SHAPES
    return tuple(s._replace(size=s.size._replace(rows=options.rows or s.size.rows)) for s in shapes)


def list_peers(kind: TaskKind, N: int, P: int) -> list[ModelPeer]:
    configs = {
        "PT": fastprefix.PromptTuningConfig(P),
        "DePT": fastprefix.DePTConfig(P, rank=DEPT_RANK, max_length=N),
        "ADePT": fastprefix.ADePTConfig(P, bottleneck_dim=ADEPT_WIDTH),
        "prefix tuning": fastprefix.PrefixTuningConfig(P),
        "APT": fastprefix.APTConfig(P),
    }
    eager = partial(partial, attach_eager, tokens=P, length=N)
    return [
        ModelPeer(FLOOR, "floor", freeze),
        *(ModelPeer(name, "ours", partial(attach, config=config)) for name, config in configs.items()),
        ModelPeer("PT, eager", "theirs", eager(offset=None)),
        ModelPeer("DePT, eager", "theirs", eager(offset="low_rank")),
        ModelPeer("ADePT, eager", "theirs", eager(offset="network")),
        *list_peft_peers(kind, P, "PEFT PT", "PEFT prefix tuning"),
    ]


def draw_batch(shape: ModelShape, N: int, device: torch.device) -> dict[str, Tensor]:
    """Draw random tokens without padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, shape.size.vocabulary, (shape.size.rows, N), generator=generator)
    classes = torch.randint(0, CLASSES, (shape.size.rows,), generator=generator)
    labels = ids if shape.kind == "causal_lm" else classes
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--rows", type=positive, help="in a batch (default: 4)")


def run(options: argparse.Namespace) -> int:
    device, shapes = set_up(options), choose_shapes(options)
    record = Record.start("models", device, options.quick, sizes={s.name: s.size._asdict() for s in shapes})
    for shape in shapes:
        base = models.build(shape.kind, models.configure(shape.kind, shape.size, classes=CLASSES), device)
        for N, P in QUICK_PLACES if options.quick else PLACES:
            batch, peers = draw_batch(shape, N, device), list_peers(shape.kind, N, P)
            dtype = str(base.dtype).removeprefix("torch.")
            case: Row = {"model": shape.name, "N": N, "P": P, "rows": shape.size.rows, "dtype": dtype}
            works = {
                peer.name: ModelWork(peer.prepare(models.share_weights(base)).model, batch, peer.role) for peer in peers
            }
            measured = measure_models(works, case, 1 if options.quick else options.rounds, device)
            print(describe_times(measured[0]), flush=True)
            record.add(measured, options.out)
    return record.conclude(options.out)
