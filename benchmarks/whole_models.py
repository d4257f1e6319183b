"""Whole models at their published shapes: every method and its peers, over lengths of input and prefix.

All of them are measured in turns on one frozen model with random weights: the floor, the methods of this package, PT,
DePT and ADePT like their authors' code (eager), and PEFT's prompt and prefix tuning.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fastprefix

from . import models
from .embedding import embed_adept, embed_dept, embed_pt
from .models import TaskKind
from .peers import ADEPT_WIDTH, DEPT_RANK, FLOOR, ModelPeer, attach, attach_eager, freeze, list_peft_peers
from .results import Record
from .suite import Problem, add_common, build_model_work, positive, run_suite, set_up

DESCRIPTION = "Whole models at published shapes: every method and its peers, over lengths of input and prefix."


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


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Build all peers on one model for each shape and each pair of lengths."""
    for case, kind, base, batch in models.list_published(options, device):
        peers = list_peers(kind, case["N"], case["P"])
        yield case, {p.name: build_model_work(p.role, p.copy_and_prepare(base), batch) for p in peers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=3)
    parser.add_argument("--rows", type=positive, default=4, help="in a batch (default: 4)")


def run(options: argparse.Namespace) -> int:
    device = set_up(options)
    record = Record.start("models", device, options.quick)
    return run_suite(record, list_problems(options, device), options, device)
