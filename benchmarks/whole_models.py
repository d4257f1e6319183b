"""Measure every method and its peers on models of published shapes, over lengths of the input and the prefix.

The peers are measured alternately on one frozen model with random weights. AdapterHub's package requires an older
transformers. It is measured in a separate environment, so only its ratios to the floor can be compared.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from . import models
from .models import Size, TaskKind
from .peers import FLOOR, list_peers
from .suite import Problem, add_common, build_model_work, positive, run_suite

# The vocabulary is smaller than the published one. Its size only affects ADePT.
SIZE = Size(12, 768, 12, vocabulary=8192, rows=4, length=512)
QUICK = Size(2, 32, 2, vocabulary=256, rows=2, length=32)
KINDS: dict[str, TaskKind] = {"BERT-base": "classification", "Llama, 12 x 768": "causal_lm"}
PLACES = [(128, 100), (256, 200)]
"""Pairs of input tokens and prefix tokens. Tables show the first pair."""
QUICK_PLACES = [(16, 4), (24, 4)]
OURS = ("PT", "DePT", "ADePT", "prefix tuning", "APT")
THEIRS = ("PT, eager", "DePT, eager", "ADePT, eager", "PEFT PT", "PEFT prefix tuning", "adapters prefix tuning")


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Yield the problem of each model and each pair of lengths, with all peers."""
    size = (QUICK if options.quick else SIZE)._replace(rows=options.rows)
    for name, kind in KINDS.items():
        base = models.build(kind, models.configure(kind, size), device)
        dtype = str(base.dtype).removeprefix("torch.")
        for N, P in QUICK_PLACES if options.quick else PLACES:
            batch = models.draw_batch(kind, size, N, device)
            peers = list_peers(options.peers, kind, P, N)
            case = {"model": name, "N": N, "P": P, "rows": size.rows, "dtype": dtype}
            yield case, {p.name: build_model_work(p.role, p.copy_and_prepare(base), batch) for p in peers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=10)
    parser.add_argument("--rows", type=positive, default=4, help="rows per batch (default: 4)")
    parser.add_argument("--peers", nargs="+", default=[FLOOR, *OURS, *THEIRS], metavar="NAME")


run = partial(run_suite, "models", list_problems)
