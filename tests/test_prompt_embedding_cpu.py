"""The C++ backend of ``prompt_embedding`` against the float64 reference.

An error may be at most twice the one that the reference makes when it is run in the same dtype, plus two units in the
last place of the largest value.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import _native, reference
from fastprefix.ops.prompt_embedding.registration import OPERATION

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=f"no C++ backend: {_native.load()}")

NAMES = ("weight", "prompt", "w1", "b1", "w2", "b2")


class Case(NamedTuple):
    """Sizes in the letters of the formulas; ``kind``: pt, dept or adept."""

    kind: str
    B: int = 3
    N: int = 37
    S: int = 5
    V: int = 29
    d: int = 65
    r: int = 7
    dropout_p: float = 0.0
    scale: float = 0.5


def tensors(case: Case, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Ids, and the differentiable inputs in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ids = torch.randint(0, case.V, (case.B, case.N), generator=g)
    inputs = [normal(case.V, case.d), normal(case.S, case.d)]
    if case.kind == "adept":
        inputs += [normal(case.d, case.r) / case.d**0.5, normal(case.r), normal(case.r, case.d), normal(case.d)]
    if case.kind == "dept":
        inputs += [normal(case.N + 3, case.r), normal(case.r, case.d)]
    return ids, inputs


def call(function, case: Case, ids: Tensor, inputs: Sequence[Tensor], **options) -> Tensor:
    weight, prompt, *offset = inputs
    torch.manual_seed(5)  # dropout's seed
    return function(
        ids,
        weight,
        prompt,
        ffn=tuple(offset) if case.kind == "adept" else None,
        low_rank=tuple(offset) if case.kind == "dept" else None,
        offset_scale=case.scale,
        dropout_p=case.dropout_p,
        **options,
    )


def results(function, case: Case, ids: Tensor, inputs: Sequence[Tensor], dy: Tensor, **options) -> list[Tensor]:
    """The output, then every gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = call(function, case, ids, inputs, **options)
    return [output.detach(), *torch.autograd.grad(output, inputs, dy.to(output.dtype))]


def assert_parity(case: Case, dtype: torch.dtype, ids: Tensor | None = None) -> None:
    own_ids, inputs = tensors(case)
    ids = own_ids if ids is None else ids
    inputs = [x.to(dtype) for x in inputs]
    dy = torch.randn(ids.shape[0], case.S + ids.shape[1], case.d, dtype=dtype)
    exact = results(reference.prompt_embedding, case, ids, [x.double() for x in inputs], dy)
    same = results(reference.prompt_embedding, case, ids, inputs, dy)
    got = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")
    for index, (x, y, z) in enumerate(zip(got, same, exact, strict=True)):
        assert x.shape == z.shape
        assert x.dtype == dtype
        if z.numel() == 0:
            continue
        error, allowed = (x.double() - z).abs().max(), (y.double() - z).abs().max()
        if dtype is torch.float64:  # the reference itself; there is nothing more exact to compare with
            allowed = 50 * torch.finfo(dtype).eps * z.abs().max()
        bound = 2 * allowed + 2 * torch.finfo(dtype).eps * z.abs().max()
        assert error <= bound, f"result {index}: error {error:.3g}, bound {bound:.3g}"


SHAPES = [
    Case("pt"),
    Case("dept"),
    Case("dept", B=9, N=2, d=13, r=3),
    Case("adept"),
    Case("adept", d=8, r=1),
    Case("adept", d=13, r=33, V=500),
    Case("adept", d=770, r=19, N=130, V=1000),
    Case("adept", d=1024, r=64, V=64),
    Case("adept", d=2500, r=5, B=1, N=7),
    Case("adept", d=16, r=512, B=1, N=30),
    Case("adept", d=1, r=2),
    Case("adept", B=2, N=300, V=2, d=24),
    Case("adept", dropout_p=0.3),
    Case("adept", dropout_p=1.0),
    Case("adept", d=770, r=19, dropout_p=0.1),
    *(Case(kind, **{size: 0}) for kind in ("pt", "dept", "adept") for size in ("B", "N", "S")),
    Case("adept", N=0, S=0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    assert_parity(case, dtype)


def test_is_the_default() -> None:
    case = Case("adept")
    ids, inputs = tensors(case)
    torch.testing.assert_close(
        call(fastprefix.prompt_embedding, case, ids, inputs),
        call(fastprefix.prompt_embedding, case, ids, inputs, backend="cpu"),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("kind", ["pt", "dept", "adept"])
def test_any_strides(kind: str) -> None:
    case = Case(kind)
    ids, inputs = tensors(case)
    inputs = [x.float() for x in inputs]
    dy = torch.randn(case.d, case.S + case.N, case.B).permute(2, 1, 0)
    wanted = results(fastprefix.prompt_embedding, case, ids, inputs, dy.contiguous(), backend="cpu")
    odd = [x.t().contiguous().t() if x.ndim == 2 else x.repeat_interleave(2)[::2] for x in inputs]
    got = results(fastprefix.prompt_embedding, case, ids.int().t().contiguous().t(), odd, dy, backend="cpu")
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_gradient_of_a_sum() -> None:
    case = Case("adept")
    ids, inputs = tensors(case)
    dy = torch.ones((), dtype=torch.float64).expand(case.B, case.S + case.N, case.d)
    got = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")
    for x, y in zip(got, results(reference.prompt_embedding, case, ids, inputs, dy), strict=True):
        torch.testing.assert_close(x, y)


def test_dropout_drops_what_eager_drops() -> None:
    case = Case("adept", dropout_p=0.5, N=70, r=40)
    ids, inputs = tensors(case)
    torch.testing.assert_close(
        call(fastprefix.prompt_embedding, case, ids, inputs, backend="cpu"),
        call(fastprefix.prompt_embedding, case, ids, inputs, backend="eager"),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", ["dept", "adept"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_partial_gradients(kind: str, dropout_p: float) -> None:
    case = Case(kind, dropout_p=dropout_p if kind == "adept" else 0.0)
    ids, inputs = tensors(case)
    dy = torch.randn(case.B, case.S + case.N, case.d, dtype=torch.float64)
    wanted = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")[1:]
    for index in range(len(inputs)):
        one = [x.detach().clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        output = call(fastprefix.prompt_embedding, case, ids, one, backend="cpu")
        (gradient,) = torch.autograd.grad(output, one[index], dy)
        torch.testing.assert_close(gradient, wanted[index], rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", [Case("adept", N=200, V=90), Case("dept"), Case("adept", dropout_p=0.2)], ids=str)
def test_threads_and_determinism(case: Case, threads: int) -> None:
    ids, inputs = tensors(case)
    dy = torch.randn(case.B, case.S + case.N, case.d, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = (results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    wanted = results(reference.prompt_embedding, case, ids, inputs, dy)
    for x, again, y in zip(first, second, wanted, strict=True):
        torch.testing.assert_close(x, again, rtol=0, atol=0)
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "case", [Case("adept"), Case("dept", d=770), Case("pt"), Case("adept", dropout_p=0.2)], ids=str
)
def test_reads_nothing_that_was_not_written(case: Case) -> None:
    """With deterministic algorithms new memory is filled with NaN."""
    ids, inputs = tensors(case)
    inputs = [x.float() for x in inputs]
    dy = torch.randn(case.B, case.S + case.N, case.d)
    torch.use_deterministic_algorithms(True)
    try:
        got = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("wrong", [-1, 29, 2**40])
def test_ids_out_of_range(wrong: int) -> None:
    case = Case("adept")
    ids, inputs = tensors(case)
    ids[1, 2] = wrong
    message = f"input_ids takes ids from 0 to V - 1 = 28, got {wrong}"
    for backend in ("cpu", "eager"):
        with pytest.raises(ValueError, match=message):
            call(fastprefix.prompt_embedding, case, ids, inputs, backend=backend)


def test_rows_of_a_token_are_the_same() -> None:
    case = Case("adept", V=4)
    ids, inputs = tensors(case)
    output = call(fastprefix.prompt_embedding, case, ids, inputs, backend="cpu")[:, case.S :]
    for token in range(case.V):
        rows = output[ids == token]
        torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=0, atol=0)


def arguments(case: Case, dtype: torch.dtype = torch.float64) -> tuple:
    """The operator's own."""
    ids, inputs = tensors(case)
    weight, prompt, *offset = (x.to(dtype).requires_grad_() for x in inputs)
    ffn = offset if case.kind == "adept" else [None] * 4
    low_rank = offset if case.kind == "dept" else [None] * 2
    seed = torch.tensor([123456789012345]) if case.dropout_p else None
    return (ids, weight, prompt, *ffn, *low_rank, seed, case.scale, case.dropout_p)


@pytest.mark.parametrize("case", [Case("adept"), Case("dept"), Case("pt"), Case("adept", dropout_p=0.2)], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(OPERATION.operator("cpu"), arguments(case))


@pytest.mark.parametrize("case", [Case("adept"), Case("dept"), Case("pt"), Case("adept", dropout_p=0.2)], ids=str)
def test_gradcheck(case: Case) -> None:
    case = case._replace(B=2, N=4, S=2, V=3, d=5, r=3)
    assert torch.autograd.gradcheck(lambda *a: OPERATION.operator("cpu")(*a), arguments(case))


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs these tests itself")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "parity", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout
