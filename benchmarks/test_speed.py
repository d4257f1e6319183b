"""Run a few cases with pytest-benchmark, to compare runs with its tools: ``pytest benchmarks --benchmark-only``.

Peers run consecutively instead of in interleaved rounds, so published figures come from ``python -m benchmarks``.
"""

from typing import Any

import pytest
import torch

from . import attention, embedding

CPU = torch.device("cpu")
WORKS = {
    "attention": attention.Inputs(attention.Shape(4, 8, 2, 128, 128, 64, 20), torch.float32, True, CPU).works(),
    "embedding": embedding.build_works(embedding.Setting(32_000, 768, 8, 256, 60, 19, "text"), torch.float32, CPU)[1],
}
CASES = [(suite, name, way) for suite, works in WORKS.items() for name, work in works.items() for way in work.calls]


@pytest.mark.parametrize(("suite", "name", "direction"), CASES)
def test_kernel(benchmark: Any, suite: str, name: str, direction: str) -> None:
    benchmark.group = f"{suite} {direction}"
    benchmark(WORKS[suite][name].calls[direction])
