"""A few cases for pytest-benchmark, to compare runs with its tools: ``pytest benchmarks --benchmark-only``.

Nothing here fails for being slow, and ``make test`` does not collect it. Peers run one after another and not in turns,
so published figures come from ``python -m benchmarks``.
"""

from collections.abc import Callable

import pytest
import torch

from . import attention, embedding, models, shared_prompt, suite

CPU = torch.device("cpu")
SHAPE = attention.Shape(4, 8, 2, 128, 128, 64, 20)
SETTING = embedding.Setting(32_000, 768, 8, 256, embedding.S, 19, "text")
PROMPT_PEERS = {peer.name: peer for peer in shared_prompt.list_peers(60, 128) if peer.trains}

Benchmark = Callable[[Callable[[], object]], object]

FORWARD = {"attention": ("fused", "concat", "tokens"), "embedding": ("adept", "adept_eager", "merged", "lookup")}
BOTH = {"attention": ("fused", "concat", "tokens"), "embedding": ("adept", "adept_eager")}
CASES = [
    pytest.param(operation, direction, name, marks=pytest.mark.benchmark(group=f"{operation} {direction}"))
    for direction, of in (("forward", FORWARD), ("forward+backward", BOTH))
    for operation, names in of.items()
    for name in names
]


@pytest.mark.parametrize(("operation", "direction", "name"), CASES)
def test_kernel(benchmark: Benchmark, operation: str, direction: str, name: str) -> None:
    if operation == "attention":
        works = attention.Inputs(SHAPE, torch.float32, True, CPU).works()
    else:
        works = embedding.Inputs(SETTING, torch.float32, CPU).works()
    benchmark(works[name].calls[direction])


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("name", list(PROMPT_PEERS))
def test_training_step(benchmark: Benchmark, name: str) -> None:
    size = models.SIZES["cpu"]
    base = models.build("causal_lm", models.configure("causal_lm", size), CPU)
    batch = models.draw_batch("causal_lm", size, size.length, CPU)
    peer = PROMPT_PEERS[name]
    benchmark(suite.build_model_work(peer.role, peer.copy_and_prepare(base), batch).calls["step"])
