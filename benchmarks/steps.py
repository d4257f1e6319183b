"""Models side by side: training steps and inference, time and memory, as cells. Nothing but PyTorch is needed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .memory import added_peak
from .results import Case, Cell, Fault, Role
from .timing import Clock, interleave, timed

DIRECTIONS = ("step", "inference")


class Work:
    """What is measured of one model, which returns its loss with the batch."""

    def __init__(self, model: Any, batch: dict[str, Tensor], role: Role) -> None:
        self.model, self.batch, self.role = model, batch, role

    def step(self) -> None:
        """Forward and backward."""
        self.model.train()
        self.model(**self.batch).loss.backward()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def inference(self) -> None:
        """Forward."""
        self.model.eval()
        self.model(**self.batch)


def side_by_side(
    works: Mapping[str, Work], case: Case, rounds: int, device: torch.device
) -> tuple[list[Cell], list[Fault]]:
    """All of them by turns; the memory of each on its own, afterwards."""
    cells: list[Cell] = []
    faults: list[Fault] = []
    for direction in DIRECTIONS:
        calls = {name: getattr(work, direction) for name, work in works.items()}
        jobs = {name: timed(call, Clock(device)) for name, call in calls.items()}
        samples, failures = interleave(jobs, range(rounds + 1), warmup=1, stage=direction)
        for name, of_rival in samples.items():
            role = works[name].role
            cells.append(Cell.timed(case, name, role, direction, of_rival))
            cells.append(Cell(case, name, role, direction, "bytes", added_peak(calls[name], device)))
        faults += [Fault(case, name, failure) for name, failure in failures.items()]
    return cells, faults
