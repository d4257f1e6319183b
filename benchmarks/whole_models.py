"""Whole models at their published shapes: every method and its peers, over lengths of input and prefix.

All of them are measured in turns on one frozen model with random weights: the floor, the methods of this package, PT,
DePT and ADePT like their authors' code (eager), PEFT's prompt and prefix tuning, and AdapterHub's prefix tuning.
AdapterHub's package needs an older transformers, so it is measured with ``--peers`` in a separate environment, where
only its ratios to the floor can be compared.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fastprefix

from . import models
from .embedding import embed_adept, embed_dept, embed_pt
from .models import Size, TaskKind
from .peers import (
    ADAPTERS_IS_INSTALLED,
    ADEPT_WIDTH,
    DEPT_RANK,
    FLOOR,
    ModelPeer,
    attach,
    attach_eager,
    freeze,
    list_peft_peers,
    tune_with_adapters,
)
from .suite import Problem, add_common, build_model_work, positive, run_suite

DESCRIPTION = "Whole models at published shapes: every method and its peers, over lengths of input and prefix."


# The vocabulary, which only ADePT would change, is smaller than the published one.
SIZE = Size(12, 768, 12, vocabulary=8192, rows=4, length=512)
QUICK = Size(2, 32, 2, vocabulary=256, rows=2, length=32)
KINDS: dict[str, TaskKind] = {"BERT-base": "classification", "Llama, 12 x 768": "causal_lm"}
PLACES = [(128, 100), (64, 100), (256, 100), (128, 10), (128, 50), (128, 200)]
"""Tokens of the input and of the prefix. Tables show the first pair."""
QUICK_PLACES = [(16, 4), (24, 4)]


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
        *(
            [ModelPeer("adapters prefix tuning", "theirs", partial(tune_with_adapters, tokens=P))]
            * ADAPTERS_IS_INSTALLED
        ),
    ]


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Build all peers on one model for each shape and each pair of lengths."""
    size = (QUICK if options.quick else SIZE)._replace(rows=options.rows)
    for name, kind in KINDS.items():
        base = models.build(kind, models.configure(kind, size), device)
        dtype = str(base.dtype).removeprefix("torch.")
        for N, P in QUICK_PLACES if options.quick else PLACES:
            batch = models.draw_batch(kind, size, N, device)
            peers = [p for p in list_peers(kind, N, P) if options.peers is None or p.name in options.peers]
            case = {"model": name, "N": N, "P": P, "rows": size.rows, "dtype": dtype}
            yield case, {p.name: build_model_work(p.role, p.copy_and_prepare(base), batch) for p in peers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=3)
    parser.add_argument("--rows", type=positive, default=4, help="in a batch (default: 4)")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="default: all whose packages are installed")


def run(options: argparse.Namespace) -> int:
    return run_suite("models", list_problems, options)
