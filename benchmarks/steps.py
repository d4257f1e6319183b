"""Whole models side by side: training steps and inference. Only PyTorch is needed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .measure import Role, Row, measure


class ModelWork:
    """Hold the work that is measured of one model, which returns its loss on the batch."""

    def __init__(self, model: Any, batch: dict[str, Tensor], role: Role) -> None:
        self.model, self.batch, self.role = model, batch, role

    def step(self) -> None:
        self.model.train()
        self.model(**self.batch).loss.backward()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def inference(self) -> None:
        self.model.eval()
        self.model(**self.batch)


def measure_models(
    works: Mapping[str, ModelWork], case: Row, rounds: int, device: torch.device
) -> tuple[list[Row], list[Row]]:
    """Measure training steps and inference of all models in turns."""
    roles = {name: work.role for name, work in works.items()}
    measured: tuple[list[Row], list[Row]] = ([], [])
    for direction in ("step", "inference"):
        calls = {name: getattr(work, direction) for name, work in works.items()}
        rows, faults = measure(case, direction, calls, roles, device, range(rounds + 1))
        measured[0].extend(rows)
        measured[1].extend(faults)
    return measured
