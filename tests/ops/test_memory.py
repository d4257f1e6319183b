"""Test that a call on the CPU allocates its results, and scratch memory that does not grow with the batch.

Keys and values are not copied, and the prefix is not expanded to the batch.
"""

import gc
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastprefix

from ..instruction_sets import needs_kernels

pytestmark = needs_kernels

HEADS, KV_HEADS, N, M, P, D = 8, 2, 96, 1024, 256, 64
SMALL_CHANGE = 16 * 1024  # bytes of tensors of a few elements, and of alignment


def added_peak(work: Callable[[], object]) -> int:
    """Return the peak bytes that ``work()`` needs in addition to those held before, as PyTorch records them."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def peak_a_row(work: Callable[[int], Callable[[], object]]) -> float:
    """Return how many bytes of the peak each row of the batch adds."""
    few, many = 4, 20
    peaks = [added_peak(work(rows)) for rows in (few, many)]
    return (peaks[1] - peaks[0]) / (many - few)


def tensors(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def heads(count: int, length: int) -> Tensor:  # as attention modules make them
        return torch.randn(rows, length, count, D, generator=generator).to(dtype).transpose(1, 2)

    x = {"query": heads(HEADS, N), "key": heads(KV_HEADS, M), "value": heads(KV_HEADS, M)}
    for name in ("prefix_key", "prefix_value"):
        x[name] = torch.randn(KV_HEADS, P, D, generator=generator).to(dtype)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_allocates_its_results(dtype: torch.dtype) -> None:
    def work(rows: int) -> Callable[[], object]:
        x = tensors(rows, dtype)
        return lambda: fastprefix.prefix_attention(**x, is_causal=True, backend="cpu")

    output, normalizers = HEADS * N * D * dtype.itemsize, 2 * HEADS * N * 4
    assert peak_a_row(work) <= output + normalizers + SMALL_CHANGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_allocates_gradients(dtype: torch.dtype) -> None:
    def work(rows: int) -> Callable[[], object]:
        x = {name: tensor.requires_grad_() for name, tensor in tensors(rows, dtype).items()}
        output = fastprefix.prefix_attention(**x, is_causal=True, backend="cpu")
        grad = torch.ones_like(output)
        return lambda: torch.autograd.grad(output, list(x.values()), grad, retain_graph=True)

    gradients = (HEADS * N + 2 * KV_HEADS * M) * D * dtype.itemsize
    assert peak_a_row(work) <= gradients + SMALL_CHANGE


LONG, MOST = 40_000, 64 * 2**20  # bytes, of the sums of prefix gradients: kPrefixSumsBytes


def test_sums_of_prefix_gradients_are_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(1, HEADS, 3, D, generator=generator) for name in ("query", "key", "value")}
    for name in ("prefix_key", "prefix_value"):
        x[name] = torch.randn(HEADS, LONG, D, generator=generator)
    leaves = [x["prefix_key"].requires_grad_(), x["prefix_value"].requires_grad_()]
    output = fastprefix.prefix_attention(**x, backend="cpu")
    one_row = 2 * HEADS * LONG * D * 4  # the gradients; sums for each thread besides would take at least as much
    assert one_row > 2 * MOST
    peak = added_peak(lambda: torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True))
    assert peak <= one_row + MOST + 4 * 2**20


def test_no_row_gathers_its_span() -> None:
    def work(rows: int) -> Callable[[], object]:
        x = tensors(rows, torch.float32)
        spans = torch.tensor([(0, P)] * rows)
        return lambda: fastprefix.prefix_attention(**x, prefix_spans=spans, is_causal=True, backend="cpu")

    assert peak_a_row(work) <= HEADS * N * D * 4 + 2 * HEADS * N * 4 + SMALL_CHANGE
