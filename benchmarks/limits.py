"""The least that an operation needs: FLOPs, bytes of memory traffic, and the time of the larger of the two.

The counts are those of the task and not of a program: every input is read once and every output is written once. A peer
with another task (no prefix, no offset) has its own counts.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .measure import Clock, Row
from .options import DTYPES

COPY = "copy"
Rates = dict[str, float]
"""FLOP/s of each type, and bytes/s of ``COPY``."""


class Work(NamedTuple):
    """FLOPs and bytes of one call."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates, dtype: str) -> float | None:
        """Return the time that the slower of arithmetic and memory needs at measured rates."""
        if dtype not in rates or COPY not in rates:
            return None
        return max(self.flops / rates[dtype], self.bytes / rates[COPY])


def count_attention(row: Row) -> Work:
    """Count two products of queries and keys forward, and five backward, where the first one is repeated."""
    B, Hq, Hkv, N, M, D = (row[name] for name in ("B", "Hq", "Hkv", "N", "M", "D"))
    P = 0 if row["role"] == "floor" else row["P"]
    pairs = N * P + (N * M - N * (N - 1) / 2 if row["causal"] else N * M)
    queries, keys, prefix = B * Hq * N * D, 2 * B * Hkv * M * D, 2 * Hkv * P * D + B * P
    read, written, itemsize = queries + keys + prefix, queries, DTYPES[row["dtype"]].itemsize
    if row["direction"] == "forward":
        return Work(4 * B * Hq * pairs * D, (read + written) * itemsize)
    # The gradient of the output is read, and one gradient is written for every input.
    return Work(14 * B * Hq * pairs * D, (2 * read + 2 * written) * itemsize)


def count_embedding(row: Row) -> Work:
    """Count one read of every distinct row of the table, one write of the output, one offset per distinct row.

    The gradient of a prompt needs the prompt's rows of the output's gradient, the gradient of an offset needs all rows.
    """
    B, N, S, d, r, distinct = (row[name] for name in ("B", "N", "S", "d", "r", "distinct"))
    method = row["peer"].split("_")[0]
    itemsize, output, tokens = DTYPES[row["dtype"]].itemsize, B * (S + N) * d, B * N * d
    parameters = {"dept": N * r + r * d, "adept": 2 * d * r + r + d}.get(method, 0)
    parameters += 0 if method == "lookup" else S * d
    forward = {"dept": 2 * N * r * d + tokens, "adept": 4 * distinct * r * d + 2 * distinct * d}.get(method, 0)
    moved = (distinct * d + parameters + output) * itemsize + torch.int64.itemsize * B * N
    if row["direction"] == "forward":
        return Work(forward, moved)
    summed = B * S * d + (tokens if method in ("dept", "adept") else 0)  # rows of the gradient of the output
    products = {"dept": 4 * N * r * d, "adept": 6 * distinct * r * d}.get(method, 0)
    return Work(forward + products + summed, moved + (summed + parameters) * itemsize)


COUNTS: dict[str, Callable[[Row], Work]] = {"attention": count_attention, "embedding": count_embedding}


def measure_rates(device: torch.device, dtypes: Iterable[str], quick: bool) -> Rates:
    """Measure the best rates of large matrix products and of a large copy."""
    size = 128 if quick else 2048 if device.type == "cpu" else 8192
    clock = Clock(device)

    def find_best(work: Callable[[], object]) -> float:
        work()
        return min(clock(work) for _ in range(5))

    rates = {}
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(DTYPES[dtype])
        rates[dtype] = 2 * size**3 / find_best(lambda a=a: a @ a)  # type: ignore[misc]
    source = torch.zeros(16, size, size, device=device)
    target = torch.zeros_like(source)
    return rates | {COPY: 2 * source.nbytes / find_best(lambda: target.copy_(source))}
