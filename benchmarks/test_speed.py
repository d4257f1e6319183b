"""A few cells for those used to ``pytest-benchmark``, for its ``--benchmark-compare`` and ``pytest-benchmark compare``:

    pytest benchmarks --benchmark-only --benchmark-autosave

Nothing here fails for being slow, and ``make test`` does not collect it. Competitors run one after another and not by
turns, so what ``python -m benchmarks`` writes is what figures are taken from.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import attention, embedding, kernels, models, shared_prompt

CPU = torch.device("cpu")
SHAPE = attention.Shape(4, 8, 2, 128, 128, 64, 20)
SETTING = embedding.Setting(32_000, 768, 8, 256, embedding.S, 19, "text")
PROMPT_TOKENS = 60

Benchmark = Callable[[Callable[[], object]], object]


def _attention() -> kernels.Problem:
    inputs = attention.Inputs(SHAPE, torch.float32, True, CPU)
    return kernels.Problem({}, inputs.peers(), inputs.grad)


def _embedding() -> kernels.Problem:
    inputs = embedding.Inputs(SETTING, torch.float32, CPU)
    return kernels.Problem({}, inputs.peers(), inputs.grad)


PROBLEMS = {"attention": _attention, "embedding": _embedding}
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"forward": ("fused", "concat", "tokens"), "forward+backward": ("fused", "concat", "tokens")},
    "embedding": {
        "forward": ("adept", "adept_eager", "merged", "lookup"),
        "forward+backward": ("adept", "adept_eager"),
    },
}
CELLS = [
    pytest.param(suite, direction, name, marks=pytest.mark.benchmark(group=f"{suite} {direction}"))
    for suite, directions in KERNELS.items()
    for direction, names in directions.items()
    for name in names
]


@pytest.mark.parametrize(("suite", "direction", "name"), CELLS)
def test_kernel(benchmark: Benchmark, suite: str, direction: str, name: str) -> None:
    """One competitor of an operation."""
    benchmark(kernels.works(PROBLEMS[suite]())[direction][name])


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("name", [rival.name for rival in shared_prompt.rivals(PROMPT_TOKENS, 128) if rival.trains])
def test_training_step(benchmark: Benchmark, name: str) -> None:
    """Forward and backward of a small decoder with a prompt."""
    size = models.SIZES["cpu"]
    base: Any = models.build_decoder(size, pad=0, end=1, seed=0)
    (rival,) = (rival for rival in shared_prompt.rivals(PROMPT_TOKENS, size.length) if rival.name == name)
    ids = torch.randint(2, size.vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(0))
    benchmark(shared_prompt.Work(rival.prepare(base), ids, rival.role).step)
