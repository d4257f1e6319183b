"""A few cases for pytest-benchmark, to compare runs with its tools: ``pytest benchmarks --benchmark-only``.

Nothing here fails for being slow, and ``make test`` does not collect it. Peers run one after another and not in turns,
so published figures come from ``python -m benchmarks``.
"""

from collections.abc import Callable

import pytest
import torch

from . import attention, embedding, kernels, models, shared_prompt

CPU = torch.device("cpu")
SHAPE = attention.Shape(4, 8, 2, 128, 128, 64, 20)
SETTING = embedding.Setting(32_000, 768, 8, 256, embedding.S, 19, "text")
PROMPT_PEERS = {peer.name: peer for peer in shared_prompt.list_peers(60, 128) if peer.trains}

Benchmark = Callable[[Callable[[], object]], object]


FORWARD = {"attention": ("fused", "concat", "tokens"), "embedding": ("adept", "adept_eager", "merged", "lookup")}
BOTH = {"attention": ("fused", "concat", "tokens"), "embedding": ("adept", "adept_eager")}
CASES = [
    pytest.param(suite, direction, name, marks=pytest.mark.benchmark(group=f"{suite} {direction}"))
    for direction, of in (("forward", FORWARD), ("forward+backward", BOTH))
    for suite, names in of.items()
    for name in names
]


@pytest.mark.parametrize(("suite", "direction", "name"), CASES)
def test_kernel(benchmark: Benchmark, suite: str, direction: str, name: str) -> None:
    if suite == "attention":
        inputs = attention.Inputs(SHAPE, torch.float32, True, CPU)
        problem = kernels.Problem({}, inputs.peers(), inputs.grad)
    else:
        problem = embedding.Inputs(SETTING, torch.float32, CPU).problem(SETTING, "float32")
    benchmark(problem.works()[direction][name])


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("name", list(PROMPT_PEERS))
def test_training_step(benchmark: Benchmark, name: str) -> None:
    works = shared_prompt.build_works(models.SIZES["cpu"], [PROMPT_PEERS[name]], CPU)
    benchmark(works[name].step)
