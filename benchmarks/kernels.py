"""Operations side by side, in one case: time and memory, forward and forward + backward, as cells."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .memory import added_peak
from .options import add_common, add_threads
from .results import Case, Cell, Fault, Role
from .timing import Clock, Job, interleave, timed, until

LEAST_ROUNDS = 10
WARMUP = {"cpu": 1, "cuda": 5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Peer:
    """A way to the same output; ``leaves`` get gradients, one without any is for inference only."""

    role: Role
    call: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Effort:
    """How long to measure each direction of each case, and in how many rounds at least."""

    seconds: float
    least: int = LEAST_ROUNDS


def add_arguments(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    """What suites of kernels share."""
    add_common(parser)
    add_threads(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each direction of each case")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(dtypes))


def effort(options: argparse.Namespace) -> Effort:
    """As asked."""
    return Effort(0.0, least=2) if options.quick else Effort(options.seconds)


def measure(
    case: Case, peers: Mapping[str, Peer], grad: Tensor, clock: Clock, effort: Effort
) -> tuple[list[Cell], list[Fault]]:
    """All peers by turns, ``grad`` being the output's gradient; the memory of each on its own, afterwards."""
    works: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: partial(_forward, peer) for name, peer in peers.items()},
        "forward+backward": {name: partial(_both, peer, grad) for name, peer in peers.items() if peer.leaves},
    }
    cells: list[Cell] = []
    faults: list[Fault] = []
    for direction, of_direction in works.items():
        warmup = WARMUP[clock.device.type]
        rounds = until(effort.seconds, least=effort.least, warmup=warmup)
        jobs: dict[str, Job] = {name: timed(work, clock) for name, work in of_direction.items()}
        samples, failures = interleave(jobs, rounds, warmup=warmup, stage=direction)
        for name, of_peer in samples.items():
            role = peers[name].role
            peak = added_peak(of_direction[name], clock.device)
            cells.append(Cell.timed(case, name, role, direction, of_peer))
            cells.append(Cell(case, name, role, direction, "bytes", peak))
        faults += [Fault(case, name, failure) for name, failure in failures.items()]
    return cells, faults


@torch.no_grad()
def _forward(peer: Peer) -> Tensor:
    return peer.call()


def _both(peer: Peer, grad: Tensor) -> object:
    return torch.autograd.grad(peer.call(), peer.leaves, grad, allow_unused=True)
