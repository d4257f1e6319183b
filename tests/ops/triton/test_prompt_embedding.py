"""The Triton kernels of ``prompt_embedding`` against the float64 reference, forward and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix.ops.prompt_embedding.arguments import EmbeddingArguments
from fastprefix.ops.prompt_embedding.registration import OPERATION
from fastprefix.ops.prompt_embedding.validation import canonical_arguments
from fastprefix.parity import EmbeddingCase, measure

OFFSETS = {"pt": None, "dept": "low_rank", "adept": "ffn"}


def make_case(kind: str, **named: Any) -> EmbeddingCase:
    sizes = {"B": 2, "N": 21, "S": 3, "V": 17, "d": 65, "r": 7, "spare": 2}
    sizes |= {name: named.pop(name) for name in sizes if name in named}
    return EmbeddingCase(**sizes, offset=OFFSETS[kind], options={"offset_scale": 0.5, **named})


def arguments(device: str, kind: str, **named: Any) -> EmbeddingArguments:
    """The operator's own."""
    inputs = make_case(kind, **named).build(torch.float32, device)
    return canonical_arguments(**inputs.tensors, **inputs.options)


def results(function, a: EmbeddingArguments, dy: Tensor) -> list[Tensor]:
    """The output, then every gradient."""
    inputs = [x.detach().clone().requires_grad_() if _differentiable(x) else x for x in a]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if _differentiable(x)], dy)]


def _differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


CASES = [
    {"kind": "pt"},
    {"kind": "pt", "S": 0},
    {"kind": "dept"},
    {"kind": "dept", "B": 9, "N": 2, "d": 13, "r": 3},
    {"kind": "adept"},
    {"kind": "adept", "d": 8, "r": 1},
    {"kind": "adept", "d": 13, "r": 33},
    {"kind": "adept", "d": 130, "r": 19, "N": 60},
    {"kind": "adept", "d": 40, "r": 130},
    {"kind": "adept", "dropout_p": 0.3},
    {"kind": "adept", "dropout_p": 1.0},
    *({"kind": kind, size: 0} for kind in ("pt", "dept", "adept") for size in ("B", "N", "S")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(device: str, case: dict, dtype: torch.dtype) -> None:
    report = measure(make_case(**case), dtype, "triton", device, draws=2)
    assert report.ok, f"\n{report}"


def test_ids_of_32_bits(device: str) -> None:
    a = arguments(device, "adept")
    dy = torch.randn(2, 24, 65, device=device)
    got = results(OPERATION.operator("triton"), a._replace(input_ids=a.input_ids.int()), dy)
    for x, y in zip(got, results(OPERATION.operator("triton"), a, dy), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_any_strides(device: str) -> None:
    a = arguments(device, "adept")
    dy = torch.randn(65, 24, 2, device=device).permute(2, 1, 0)
    odd = EmbeddingArguments(*(x.t().contiguous().t() if isinstance(x, Tensor) and x.ndim == 2 else x for x in a))
    got = results(OPERATION.operator("triton"), odd, dy)
    wanted = results(OPERATION.operator("triton"), a, dy.contiguous())
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_ids_out_of_range(device: str) -> None:
    a = arguments(device, "adept")
    a.input_ids[0, 0] = 17
    with pytest.raises(ValueError, match="input_ids takes ids from 0 to V - 1 = 16, got 17"):
        OPERATION.operator("triton")(*a)
