"""What a call allocates at its peak on the CPU: its results, and scratch memory that does not grow with the batch.

So keys and values are not copied, nor is the prefix expanded to the batch.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastprefix
from benchmarks.measure import added_peak
from fastprefix.ops.backends import BACKENDS

REASON = BACKENDS["cpu"].refusal(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HEADS, KV_HEADS, N, M, P, D = 8, 2, 96, 1024, 256, 64
SMALL_CHANGE = 16 * 1024  # bytes of tensors of a few elements, and of alignment


def peak_a_row(work: Callable[[int], Callable[[], object]]) -> float:
    """By how much the peak grows with each row of the batch."""
    few, many = 4, 20
    peaks = [added_peak(work(rows), torch.device("cpu")) for rows in (few, many)]
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
