"""What a case takes at least: FLOPs, bytes of memory traffic, and the time of the larger of the two at known rates.

The counts are those of the task, not of a program: every input is read once and every output written once, whatever is
kept or computed again on the way. A competitor that does another task (no prefix, no offset) has counts of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .options import DTYPES
from .results import Cell, Run
from .timing import Clock

IDS_BYTES = 8
Rates = dict[str, float]
"""FLOP/s by type, and bytes/s by the name of ``COPY``."""
COPY = "copy"


@dataclass(frozen=True)
class Floor:
    """FLOPs and bytes of one call."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates, dtype: str) -> float | None:
        """The time that the slower of arithmetic and memory needs, where the rates were measured."""
        if dtype not in rates or COPY not in rates:
            return None
        return max(self.flops / rates[dtype], self.bytes / rates[COPY])


def of(run: Run, cell: Cell) -> Floor | None:
    """The floor of a cell, where its suite has one."""
    count = COUNTS.get(run.suite)
    return count(cell) if count and cell.quantity == "seconds" else None


def attention(cell: Cell) -> Floor:
    """Two products of queries and keys forward, five backward, which computes the first one again."""
    c: dict[str, Any] = dict(cell.case)
    B, Hq, Hkv, N, M, D = (c[name] for name in ("B", "Hq", "Hkv", "N", "M", "D"))
    P = 0 if cell.role == "floor" else c["P"]
    pairs = N * P + (N * M - N * (N - 1) / 2 if c["causal"] else N * M)
    queries, keys, prefix = B * Hq * N * D, 2 * B * Hkv * M * D, 2 * Hkv * P * D + B * P
    read, written = queries + keys + prefix, queries
    itemsize = _itemsize(c)
    if cell.direction == "forward":
        return Floor(4 * B * Hq * pairs * D, (read + written) * itemsize)
    # The output's gradient is read, and one written for every input.
    return Floor(14 * B * Hq * pairs * D, (2 * read + 2 * written) * itemsize)


def embedding(cell: Cell) -> Floor:
    """Every distinct row of the table read once, every row of the output written; offsets once for each distinct row.

    A prompt's gradient takes the prompt's rows of the output's gradient; an offset's takes them all.
    """
    c: dict[str, Any] = dict(cell.case)
    B, N, S, d, r, distinct = (c[name] for name in ("B", "N", "S", "d", "r", "distinct"))
    method = cell.competitor.split("_")[0]
    output, tokens = B * (S + N) * d, B * N * d
    parameters = {"dept": N * r + r * d, "adept": 2 * d * r + r + d}.get(method, 0)
    parameters += 0 if method == "lookup" else S * d
    forward = {"dept": 2 * N * r * d + tokens, "adept": 4 * distinct * r * d + 2 * distinct * d}.get(method, 0)
    moved = (distinct * d + parameters + output) * _itemsize(c) + IDS_BYTES * B * N
    if cell.direction == "forward":
        return Floor(forward, moved)
    summed = B * S * d + (tokens if method in ("dept", "adept") else 0)  # of the output's gradient
    products = {"dept": 4 * N * r * d, "adept": 6 * distinct * r * d}.get(method, 0)
    return Floor(forward + products + summed, moved + (summed + parameters) * _itemsize(c))


COUNTS: dict[str, Callable[[Cell], Floor]] = {"attention": attention, "embedding": embedding}


def _itemsize(case: dict[str, Any]) -> int:
    return DTYPES[case["dtype"]].itemsize


def measure_rates(device: torch.device, dtypes: Iterable[str], quick: bool) -> Rates:
    """The best that large matrix products and a large copy reach here, in this run."""
    size = 128 if quick else 2048 if device.type == "cpu" else 8192
    return {dtype: _product_rate(size, DTYPES[dtype], device) for dtype in dtypes} | {COPY: _copy_rate(size, device)}


def _product_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    return float(2 * size**3 / _best(lambda: a @ a, device))


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.zeros(16, size, size, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    clock = Clock(device)
    work()
    return min(clock(work) for _ in range(rounds))
