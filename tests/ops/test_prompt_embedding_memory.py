"""Test that separate prompts and offsets of the rows are not copied for each row on the CPU.

A call allocates its results, and scratch memory that does not grow with the batch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.parity import EmbeddingCase

from ..instruction_sets import needs_kernels
from .test_memory import SMALL_CHANGE, peak_a_row

pytestmark = needs_kernels

N = 96


def embedding_tensors(rows: int, offset: str | None) -> tuple[dict[str, Any], list[Tensor]]:
    """Return separate prompts and offsets for the rows, and the tensors that have a gradient."""
    spans, bank = [(row % 3, 60) for row in range(rows)], {}
    if offset is not None:
        bank = {"K": 3, "index": [row % 4 - 1 for row in range(rows)]}
    x = EmbeddingCase(B=rows, N=N, S=64, V=100, d=256, r=19, offset=offset, spans=spans, **bank).build(torch.float32)
    leaves = [x for v in x.tensors.values() for x in (v if isinstance(v, tuple) else (v,)) if x.is_floating_point()]
    return x.tensors, leaves[1:]  # the table is frozen


@pytest.mark.parametrize("offset", [None, "ffn", "low_rank", "position_offset"])
def test_forward_allocates_its_results(offset: str | None) -> None:
    def work(rows: int) -> Callable[[], object]:
        x, _ = embedding_tensors(rows, offset)
        return lambda: fastprefix.prompt_embedding(**x, backend="cpu")

    assert peak_a_row(work) <= (60 + N) * 256 * 4 + SMALL_CHANGE


@pytest.mark.parametrize("offset", [None, "ffn", "low_rank", "position_offset"])
def test_backward_needs_nothing_for_a_row(offset: str | None) -> None:
    def work(rows: int) -> Callable[[], object]:
        x, leaves = embedding_tensors(rows, offset)
        for leaf in leaves:
            leaf.requires_grad_()
        output = fastprefix.prompt_embedding(**x, backend="cpu")
        grad = torch.ones_like(output)
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    assert peak_a_row(work) <= SMALL_CHANGE
