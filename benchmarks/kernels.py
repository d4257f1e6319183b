"""Operations side by side in one case: time and memory, forward and forward + backward."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import limits
from .measure import Role, Row, count_until, measure
from .options import DTYPES, add_common
from .results import Record, describe_times

LEAST_ROUNDS = 10
WARMUP = {"cpu": 1, "cuda": 5}


@dataclass(frozen=True)
class KernelPeer:
    """Compute the output in one way. ``leaves`` get gradients; a peer without leaves is for inference only."""

    role: Role
    call: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Problem:
    """Hold a case, its peers, and the gradient of their output."""

    case: Row
    peers: Mapping[str, KernelPeer]
    grad: Tensor

    def works(self) -> dict[str, dict[str, Callable[[], object]]]:
        """Return the calls to be timed, by direction and peer."""
        return {
            "forward": {name: partial(run_forward, peer) for name, peer in self.peers.items()},
            "forward+backward": {
                name: partial(run_both, peer, self.grad) for name, peer in self.peers.items() if peer.leaves
            },
        }


@torch.no_grad()
def run_forward(peer: KernelPeer) -> Tensor:
    """Run the forward pass without gradients."""
    return peer.call()


def run_both(peer: KernelPeer, grad: Tensor) -> object:
    """Run the forward and the backward pass."""
    return torch.autograd.grad(peer.call(), peer.leaves, grad, allow_unused=True)


def add_arguments(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    """Add the options of suites of operations."""
    add_common(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each direction of each case")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(dtypes))


def run(
    suite: str, problems: Iterable[Problem], options: argparse.Namespace, device: torch.device, **settings: Any
) -> int:
    """Measure, print and write one problem after another."""
    seconds, least = (0.0, 2) if options.quick else (options.seconds, LEAST_ROUNDS)
    rates = limits.measure_rates(device, options.dtype, options.quick)
    record = Record.start(suite, device, options.quick, seconds=seconds, rates=rates, **settings)
    warmup = WARMUP[device.type]
    for problem in problems:
        roles, rows = {name: peer.role for name, peer in problem.peers.items()}, list[Row]()
        for direction, calls in problem.works().items():
            rounds = count_until(seconds, least=least, warmup=warmup)
            measured = measure(problem.case, direction, calls, roles, device, rounds, warmup=warmup)
            rows += measured[0]
            record.add(measured, options.out)
        print(describe_times(rows), flush=True)
    return record.conclude(options.out)
