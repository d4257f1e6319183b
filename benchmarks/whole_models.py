"""Whole models at their published shapes: every method and its peers, over lengths of input and prefix.

All of them are measured in turns on one frozen model with random weights: the floor, the methods of this package, PT,
DePT and ADePT like their authors' code (eager), and PEFT's prompt and prefix tuning.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastprefix

from . import models
from .embedding import embed_adept, embed_dept, embed_pt
from .models import Size, TaskKind
from .peers import ADEPT_WIDTH, DEPT_RANK, FLOOR, ModelPeer, attach, attach_eager, freeze, list_peft_peers
from .results import Record
from .suite import Problem, add_common, build_model_work, positive, run_suite, set_up

DESCRIPTION = "Whole models at published shapes: every method and its peers, over lengths of input and prefix."
TOKENS, PREFIX = 128, 100
PLACES = [(TOKENS, PREFIX), *((N, PREFIX) for N in (64, 256)), *((TOKENS, P) for P in (10, 50, 200))]
"""Tokens of the input and of the prefix. The curves over both lengths cross at the first pair."""
QUICK_PLACES = [(16, 4), (24, 4)]


class ModelShape(NamedTuple):
    """Hold the shape of a model. The vocabulary, which only ADePT would change, is smaller than the published one."""

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
    """Return the floor, the methods of this package, the same in eager PyTorch, and PEFT's."""
    configs = {
        "PT": fastprefix.PromptTuningConfig(P),
        "DePT": fastprefix.DePTConfig(P, rank=DEPT_RANK, max_length=N),
        "ADePT": fastprefix.ADePTConfig(P, bottleneck_dim=ADEPT_WIDTH),
        "prefix tuning": fastprefix.PrefixTuningConfig(P),
        "APT": fastprefix.APTConfig(P),
    }
    eager: dict[str, Callable[..., Tensor]] = {"PT": embed_pt, "DePT": embed_dept, "ADePT": embed_adept}
    return [
        ModelPeer(FLOOR, "floor", freeze),
        *(ModelPeer(name, "ours", partial(attach, config=config)) for name, config in configs.items()),
        *(
            ModelPeer(f"{name}, eager", "theirs", partial(attach_eager, embed=embed, tokens=P, length=N))
            for name, embed in eager.items()
        ),
        *list_peft_peers(kind, P, "PEFT PT", "PEFT prefix tuning"),
    ]


def list_problems(
    shapes: Sequence[ModelShape], places: Sequence[tuple[int, int]], device: torch.device
) -> Iterator[Problem]:
    """Build all peers on one model for each shape and each pair of lengths."""
    for shape in shapes:
        base = models.build(shape.kind, models.configure(shape.kind, shape.size), device)
        dtype = str(base.dtype).removeprefix("torch.")
        for N, P in places:
            batch = models.draw_batch(shape.kind, shape.size, N, device)
            case = {"model": shape.name, "N": N, "P": P, "rows": shape.size.rows, "dtype": dtype}
            peers = list_peers(shape.kind, N, P)
            yield case, {p.name: build_model_work(p.role, p.copy_and_prepare(base), batch) for p in peers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--rows", type=positive, help="in a batch (default: 4)")


def run(options: argparse.Namespace) -> int:
    device, shapes = set_up(options), choose_shapes(options)
    record = Record.start("models", device, options.quick, sizes={s.name: s.size._asdict() for s in shapes})
    places, rounds = (QUICK_PLACES, 1) if options.quick else (PLACES, options.rounds)
    return run_suite(record, list_problems(shapes, places, device), options.out, device, partial(range, rounds + 1))
