"""Operations side by side, in one case: time and memory, forward and forward + backward, as cells."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import environment, floors, results, summaries
from .memory import added_peak
from .options import DTYPES, add_common, add_threads, set_threads
from .results import Case, Cell, Fault, Role, Run
from .timing import Clock, Job, interleave, timed, until

LEAST_ROUNDS = 10
WARMUP = {"cpu": 1, "cuda": 5}


@dataclass(frozen=True)
class Peer:
    """A way to the same output; ``leaves`` get gradients, one without any is for inference only."""

    role: Role
    call: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Problem:
    """A case, its peers, and the gradient of their output."""

    case: Case
    peers: Mapping[str, Peer]
    grad: Tensor


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


def run(
    suite: str,
    problems: Iterable[Problem],
    settings: dict[str, Any],
    arguments: argparse.Namespace,
    device: torch.device,
) -> int:
    """Measure, print and write one problem after another; exit status 1 if a peer failed."""
    set_threads(arguments.threads)
    facts, cells, faults = environment.describe(device), list[Cell](), list[Fault]()
    effort = Effort(0.0, least=2) if arguments.quick else Effort(arguments.seconds)
    settings |= {"seconds": effort.seconds, "rates": floors.measure_rates(device, arguments.dtype, arguments.quick)}
    whole = Run(suite, facts, settings, cells, faults)
    for problem in problems:
        measured, failed = measure(problem, Clock(device), effort)
        print(summaries.line(measured), flush=True)
        cells += measured
        faults += failed
        results.write(whole, arguments.out)  # whoever stops the run keeps what is done
    return results.conclude(whole, arguments.out)


def works(problem: Problem) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed of each peer, by direction and name."""
    peers = problem.peers
    return {
        "forward": {name: partial(_forward, peer) for name, peer in peers.items()},
        "forward+backward": {name: partial(_both, peer, problem.grad) for name, peer in peers.items() if peer.leaves},
    }


def measure(problem: Problem, clock: Clock, effort: Effort) -> tuple[list[Cell], list[Fault]]:
    """All peers by turns; the memory of each on its own, afterwards."""
    case, warmup = problem.case, WARMUP[clock.device.type]
    cells: list[Cell] = []
    faults: list[Fault] = []
    for direction, of_direction in works(problem).items():
        rounds = until(effort.seconds, least=effort.least, warmup=warmup)
        jobs: dict[str, Job] = {name: timed(work, clock) for name, work in of_direction.items()}
        samples, failures = interleave(jobs, rounds, warmup=warmup, stage=direction)
        for name, of_peer in samples.items():
            role = problem.peers[name].role
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
