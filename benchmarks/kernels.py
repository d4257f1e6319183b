"""Operations side by side in one case: time and memory, forward and forward + backward."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

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

    @torch.no_grad()
    def run_forward(self) -> Tensor:
        return self.call()

    def run_both(self, grad: Tensor) -> object:
        return torch.autograd.grad(self.call(), self.leaves, grad, allow_unused=True)


@dataclass(frozen=True)
class Problem:
    """Hold a case, its peers, and the gradient of their output."""

    case: Row
    peers: Mapping[str, KernelPeer]
    grad: Tensor

    def works(self) -> dict[str, dict[str, Callable[[], object]]]:
        """Return the calls to be timed, by direction and peer."""
        both: dict[str, Callable[[], object]] = {
            name: partial(peer.run_both, self.grad) for name, peer in self.peers.items() if peer.leaves
        }
        return {"forward": {name: peer.run_forward for name, peer in self.peers.items()}, "forward+backward": both}


def add_arguments(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    add_common(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each direction of each case")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(dtypes))


def run(
    suite: str, problems: Iterable[Problem], options: argparse.Namespace, device: torch.device, **settings: Any
) -> int:
    """Measure, print and write one problem after another."""
    seconds, least, warmup = (0.0, 2, 1) if options.quick else (options.seconds, LEAST_ROUNDS, WARMUP[device.type])
    record = Record.start(suite, device, options.quick, seconds=seconds, **settings)
    for problem in problems:
        roles, rows = {name: peer.role for name, peer in problem.peers.items()}, list[Row]()
        for direction, calls in problem.works().items():
            rounds = count_until(seconds, least=least, warmup=warmup)
            measured = measure(problem.case, direction, calls, roles, device, rounds, warmup=warmup)
            rows += measured[0]
            record.add(measured, options.out)
        print(describe_times(rows), flush=True)
    return record.conclude(options.out)
