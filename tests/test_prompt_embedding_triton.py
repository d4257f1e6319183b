"""The Triton kernels of ``prompt_embedding``: parity in Triton's interpreter on the CPU, and compilation for GPUs.

Whether Triton interprets is settled when it is imported. So this module, run as usual, runs itself in a fresh process
with ``TRITON_INTERPRET=1``, and only there are the cases of the interpreter defined.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastprefix.ops.prompt_embedding import reference
from fastprefix.ops.prompt_embedding.arguments import EmbeddingArguments
from fastprefix.ops.prompt_embedding.registration import OPERATION

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def arguments(
    kind: str,
    B: int = 2,
    N: int = 21,
    S: int = 3,
    V: int = 17,
    d: int = 65,
    r: int = 7,
    p: float = 0.0,
    ids_dtype: torch.dtype = torch.int64,
) -> EmbeddingArguments:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ids = torch.randint(0, V, (B, N), generator=g).to(ids_dtype)
    ffn = [normal(d, r) / d**0.5, normal(r), normal(r, d), normal(d)] if kind == "adept" else [None] * 4
    low_rank = [normal(N + 2, r), normal(r, d)] if kind == "dept" else [None] * 2
    seed = torch.tensor([987654321987654321]) if p else None
    return EmbeddingArguments(ids, normal(V, d), normal(S, d), *ffn, *low_rank, seed, 0.5, p)


def cast(a: EmbeddingArguments, dtype: torch.dtype) -> EmbeddingArguments:
    return EmbeddingArguments(*(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in a))


def results(function, a: EmbeddingArguments, dy: Tensor) -> list[Tensor]:
    """The output, then every gradient."""
    inputs = [x.detach().clone().requires_grad_() if _differentiable(x) else x for x in a]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if _differentiable(x)], dy)]


def _differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


if INTERPRETING:
    CASES = [
        {"kind": "pt"},
        {"kind": "pt", "S": 0, "ids_dtype": torch.int32},
        {"kind": "dept"},
        {"kind": "dept", "B": 9, "N": 2, "d": 13, "r": 3},
        {"kind": "adept"},
        {"kind": "adept", "d": 8, "r": 1},
        {"kind": "adept", "d": 13, "r": 33},
        {"kind": "adept", "d": 130, "r": 19, "N": 60},
        {"kind": "adept", "d": 40, "r": 130},
        {"kind": "adept", "p": 0.3},
        {"kind": "adept", "p": 1.0},
        *({"kind": kind, size: 0} for kind in ("pt", "dept", "adept") for size in ("B", "N", "S")),
    ]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_parity(case: dict, dtype: torch.dtype) -> None:
        a = cast(arguments(**case), dtype)
        torch.manual_seed(0)
        dy = torch.randn(a.input_ids.shape[0], a.prompt_length + a.input_ids.shape[1], a.weight.shape[1], dtype=dtype)

        def formula(*values: object) -> Tensor:
            return reference.embed(EmbeddingArguments(*values))

        exact = results(formula, cast(a, torch.float64), dy.double())
        same = results(formula, a, dy)
        got = results(OPERATION.operator("triton"), a, dy)
        for index, (x, y, z) in enumerate(zip(got, same, exact, strict=True)):
            assert x.shape == z.shape
            assert x.dtype == dtype
            if z.numel() == 0:
                continue
            error, allowed = (x.double() - z).abs().max(), (y.double() - z).abs().max()
            bound = 2 * allowed + 2 * torch.finfo(dtype).eps * z.abs().max()
            assert error <= bound, f"result {index}: error {error:.3g}, bound {bound:.3g}"

    def test_any_strides() -> None:
        a = cast(arguments("adept"), torch.float32)
        dy = torch.randn(65, 24, 2).permute(2, 1, 0)
        odd = EmbeddingArguments(*(x.t().contiguous().t() if isinstance(x, Tensor) and x.ndim == 2 else x for x in a))
        got = results(OPERATION.operator("triton"), odd, dy)
        wanted = results(OPERATION.operator("triton"), a, dy.contiguous())
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)

    def test_ids_out_of_range() -> None:
        a = cast(arguments("adept"), torch.float32)
        a.input_ids[0, 0] = 17
        with pytest.raises(ValueError, match="input_ids takes ids from 0 to V - 1 = 16, got 17"):
            OPERATION.operator("triton")(*a)

else:

    def test_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
