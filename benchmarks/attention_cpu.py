"""Prefix attention on the CPU against what PyTorch offers: ``python -m benchmarks.attention_cpu --out FILE``.

Peers, called in one process in rotated order: ``fused`` (this package), ``concat`` (gated concatenation, then SDPA) and
``tokens`` (SDPA on the tokens alone: no prefix at all). A ratio compares medians: ``over_concat`` is concat / fused,
``of_tokens`` is fused / (tokens scaled by 1 + P / M), the share of the time that SDPA would need for as many keys.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprefix

from . import environment, report
from .memory import added_peak


@dataclass(frozen=True)
class Shape:
    B: int
    Hq: int
    Hkv: int
    N: int
    M: int
    D: int
    P: int


SHAPES = (
    Shape(8, 12, 12, 128, 128, 64, 20),
    Shape(4, 8, 8, 512, 512, 64, 100),
    Shape(1, 8, 8, 2048, 2048, 64, 128),
    Shape(16, 12, 12, 64, 64, 64, 100),
    Shape(4, 32, 8, 256, 256, 128, 64),
    Shape(16, 12, 12, 1, 512, 64, 100),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = {
    ("float32", "forward"): 1.9,
    ("bfloat16", "forward"): 3.4,
    ("float32", "forward+backward"): 1.7,
    ("bfloat16", "forward+backward"): 3.3,
}
"""Geometric means over concat, on two AVX-512 cores."""

Call = Callable[[], Tensor]


class Problem:
    """Tensors of one shape, and the peers on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, causal: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype).requires_grad_()

        s = shape
        self.causal = causal
        self.q, self.k, self.v = draw(s.B, s.Hq, s.N, s.D), draw(s.B, s.Hkv, s.M, s.D), draw(s.B, s.Hkv, s.M, s.D)
        self.pk, self.pv = draw(s.Hkv, s.P, s.D), draw(s.Hkv, s.P, s.D)
        self.gate = draw(s.B, 1, s.P)  # a gate for each row
        self.grad = torch.randn(s.B, s.Hq, s.N, s.D, generator=generator).to(dtype)
        self.grouped = s.Hq != s.Hkv
        visible = torch.ones(s.N, s.M, dtype=torch.bool).tril(s.M - s.N)
        self.mask_tokens = visible if causal and s.N != s.M else None
        self.mask = torch.cat([torch.ones(s.N, s.P, dtype=torch.bool), visible], dim=1) if causal else None

    def fused(self) -> Tensor:
        return fastprefix.prefix_attention(
            self.q, self.k, self.v, self.pk, self.pv, prefix_gate=self.gate, is_causal=self.causal, backend="cpu"
        )

    def concat(self) -> Tensor:
        gate, batch = self.gate[..., None], self.q.shape[0]
        k = torch.cat([(self.pk * gate).expand(batch, -1, -1, -1), self.k], dim=2)
        v = torch.cat([(self.pv * gate).expand(batch, -1, -1, -1), self.v], dim=2)
        return F.scaled_dot_product_attention(self.q, k, v, attn_mask=self.mask, enable_gqa=self.grouped)

    def tokens(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            attn_mask=self.mask_tokens,
            is_causal=self.causal and self.mask_tokens is None,
            enable_gqa=self.grouped,
        )

    def forward_of(self, peer: Call) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                peer()

        return run

    def both_of(self, peer: Call) -> Callable[[], None]:
        inputs = [self.q, self.k, self.v, self.pk, self.pv, self.gate]

        def run() -> None:
            torch.autograd.grad(peer(), inputs, self.grad, allow_unused=True)

        return run


def quantiles(samples: list[float]) -> dict[str, float]:
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), values.tolist(), strict=True))


def measure(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, dict[str, float]]:
    """Seconds a call, the peers by turns, each first as often as the others."""
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, turn, end = list(calls), 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < 2 * len(names):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - begin)
        turn += 1
    return {name: quantiles(times) for name, times in samples.items()}


def rows(shapes: Iterable[Shape], dtypes: Iterable[str], seconds: float) -> Iterable[dict[str, Any]]:
    for shape in shapes:
        for dtype in dtypes:
            for causal in (False, True):
                problem = Problem(shape, DTYPES[dtype], causal)
                peers = {"fused": problem.fused, "concat": problem.concat, "tokens": problem.tokens}
                with torch.no_grad():
                    peaks = {name: added_peak(peer, torch.device("cpu")) for name, peer in peers.items()}
                for direction, wrap in (("forward", problem.forward_of), ("forward+backward", problem.both_of)):
                    times = measure({name: wrap(peer) for name, peer in peers.items()}, seconds)
                    fused, scale = times["fused"]["p50"], 1 + shape.P / shape.M
                    yield {
                        **asdict(shape),
                        "dtype": dtype,
                        "causal": causal,
                        "direction": direction,
                        "seconds": times,
                        "over_concat": times["concat"]["p50"] / fused,
                        "of_tokens": fused / (scale * times["tokens"]["p50"]),
                        "forward_peak_bytes": peaks,
                    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means and worst cells, for each dtype and direction."""
    lines = []
    for (dtype, direction), target in TARGETS.items():
        cells = [row for row in results if row["dtype"] == dtype and row["direction"] == direction and row["N"] > 1]
        if cells:
            over, of = [row["over_concat"] for row in cells], [row["of_tokens"] for row in cells]
            lines.append(
                {
                    "dtype": dtype,
                    "direction": direction,
                    "over_concat": geometric_mean(over),
                    "target": target,
                    "least_over_concat": min(over),
                    "of_tokens": geometric_mean(of),
                    "most_of_tokens": max(of),
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--shape", type=int, nargs="+", default=list(range(len(SHAPES))), help="indices into SHAPES")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    for row in rows([SHAPES[i] for i in options.shape], options.dtype, options.seconds):
        results.append(row)
        shape = ", ".join(str(row[name]) for name in asdict(SHAPES[0]))
        print(
            f"({shape}) {row['dtype']:8} {'causal' if row['causal'] else 'full':6} {row['direction']:16} "
            f"fused {1e3 * row['seconds']['fused']['p50']:8.3f} ms, over concat {row['over_concat']:5.2f}, "
            f"of tokens {row['of_tokens']:5.2f}",
            flush=True,
        )
    for line in summary(results):
        print(json.dumps(line))
    if options.out:
        facts = environment.describe(torch.device("cpu"))
        report.write_json({"environment": facts, "results": results, "summary": summary(results)}, options.out)


if __name__ == "__main__":
    main()
