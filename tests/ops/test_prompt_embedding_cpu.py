"""Test the C++ backend of ``prompt_embedding`` against the float64 reference."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import reference
from fastprefix.ops.prompt_embedding.registration import OPERATION
from fastprefix.ops.prompt_embedding.validation import canonical_arguments
from fastprefix.parity import EmbeddingCase, measure
from tests.instruction_sets import EVERY, LOWER, needs_kernels, run_tests

pytestmark = needs_kernels

OFFSETS = {"pt": None, "dept": "low_rank", "accept": "position_offset", "adept": "ffn"}


def make_case(kind: str, **named: Any) -> EmbeddingCase:
    """Return a case with sizes in the letters of the formulas. Other names become options of the call."""
    fields = {"B": 3, "N": 37, "S": 5, "V": 29, "d": 65, "r": 7, "spare": 3, "spans": None, "K": None, "index": None}
    fields |= {name: named.pop(name) for name in fields if name in named}
    return EmbeddingCase(**fields, offset=OFFSETS[kind], options={"offset_scale": 0.5, **named})


def make_bank_case(kind: str, **named: Any) -> EmbeddingCase:
    """Return a case whose rows have separate, overlapping prompts and, except for prompt tuning, separate offsets."""
    B = named.setdefault("B", 6)
    index = None if kind == "pt" else [(4, 0, -1, 4, 2, 0)[row % 6] for row in range(B)]
    spans = [((0, 5), (1, 3), (3, 0), (2, 3))[row % 4] for row in range(B)]
    return make_case(kind, spans=spans, index=index, K=None if index is None else 5, **named)


def tensors(case: EmbeddingCase, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Return the ids and the differentiable inputs."""
    inputs = case.build(dtype).tensors
    offset = inputs.get(case.offset, ())
    offsets = offset if isinstance(offset, tuple) else (offset,)
    return inputs["input_ids"], [inputs["weight"], inputs["prompt"], *offsets]


def call(function, case: EmbeddingCase, ids: Tensor, inputs: Sequence[Tensor], **options) -> Tensor:
    weight, prompt, *offset = inputs
    torch.manual_seed(5)  # dropout's seed
    chosen: dict[str, Any] = {}
    if case.offset:
        chosen[case.offset] = offset[0] if case.offset == "position_offset" else tuple(offset)
    if case.spans is not None:
        chosen["prompt_spans"] = torch.tensor(case.spans, dtype=torch.int64).view(-1, 2)
    if case.index is not None:
        chosen["index"] = torch.tensor(case.index, dtype=torch.int64)
    return function(ids, weight, prompt, **chosen, **case.options, **options)


def results(
    function, case: EmbeddingCase, ids: Tensor, inputs: Sequence[Tensor], dy: Tensor, **options
) -> list[Tensor]:
    """Return the output, then every gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = call(function, case, ids, inputs, **options)
    return [output.detach(), *torch.autograd.grad(output, inputs, dy.to(output.dtype))]


SHAPES = [
    make_case("pt"),
    make_case("dept"),
    make_case("dept", B=9, N=2, d=13, r=3),
    make_case("adept"),
    make_case("adept", d=8, r=1),
    make_case("adept", d=13, r=33, V=500),
    make_case("adept", d=770, r=19, N=130, V=1000),
    make_case("adept", d=1024, r=64, V=64),
    make_case("adept", d=2500, r=5, B=1, N=7),
    make_case("adept", d=16, r=512, B=1, N=30),
    make_case("adept", d=1, r=2),
    make_case("adept", B=2, N=300, V=2, d=24),
    make_case("adept", dropout_p=0.3),
    make_case("adept", dropout_p=1.0),
    make_case("adept", d=770, r=19, dropout_p=0.1),
    *(make_case(kind, **{size: 0}) for kind in OFFSETS for size in ("B", "N", "S")),
    make_case("adept", N=0, S=0),
    make_case("accept"),
    make_case("accept", d=770, N=130),
    *(make_bank_case(kind) for kind in OFFSETS),
    *(make_bank_case(kind, **{size: 0}) for kind in OFFSETS for size in ("B", "N")),
    make_bank_case("dept", B=19, N=2, d=13, r=3),
    make_bank_case("accept", d=770, N=130, B=2),
    make_bank_case("adept", d=770, r=19, N=130, V=100),
    make_bank_case("adept", d=16, r=512, N=30),
    make_bank_case("adept", dropout_p=0.3),
]


KINDS = [
    *(make(kind) for kind in OFFSETS for make in (make_case, make_bank_case)),
    make_case("adept", dropout_p=0.2),
    make_bank_case("adept", dropout_p=0.2),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHAPES[::EVERY], ids=str)
def test_parity(case: EmbeddingCase, dtype: torch.dtype) -> None:
    if dtype is not torch.float64:
        report = measure(case, dtype, "cpu")
        assert report.ok, f"\n{report}"
        return
    ids, inputs = tensors(case)
    rows = case.S if case.spans is None else max((length for _, length in case.spans), default=0)
    dy = torch.randn(case.B, rows + case.N, case.d, dtype=dtype)
    got = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")
    for x, y in zip(got, results(reference.prompt_embedding, case, ids, inputs, dy), strict=True):
        tolerance = 100 * torch.finfo(dtype).eps * float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def test_is_the_default() -> None:
    case = make_case("adept")
    ids, inputs = tensors(case)
    torch.testing.assert_close(
        call(fastprefix.prompt_embedding, case, ids, inputs),
        call(fastprefix.prompt_embedding, case, ids, inputs, backend="cpu"),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("make", [make_case, make_bank_case])
@pytest.mark.parametrize("kind", OFFSETS)
def test_any_strides(kind: str, make: Callable[..., EmbeddingCase]) -> None:
    case = make(kind)
    ids, inputs = tensors(case, torch.float32)
    dy = torch.randn(case.d, case.S + case.N, case.B).permute(2, 1, 0)
    wanted = results(fastprefix.prompt_embedding, case, ids, inputs, dy.contiguous(), backend="cpu")
    odd = [x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in inputs]
    got = results(fastprefix.prompt_embedding, case, ids.int().t().contiguous().t(), odd, dy, backend="cpu")
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_gradient_of_a_sum() -> None:
    case = make_case("adept")
    ids, inputs = tensors(case)
    dy = torch.ones((), dtype=torch.float64).expand(case.B, case.S + case.N, case.d)
    got = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")
    for x, y in zip(got, results(reference.prompt_embedding, case, ids, inputs, dy), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("make", [make_case, make_bank_case])
def test_dropout_drops_what_eager_drops(make: Callable[..., EmbeddingCase]) -> None:
    case = make("adept", dropout_p=0.5, N=70, r=40)
    ids, inputs = tensors(case)
    torch.testing.assert_close(
        call(fastprefix.prompt_embedding, case, ids, inputs, backend="cpu"),
        call(fastprefix.prompt_embedding, case, ids, inputs, backend="eager"),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("make", [make_case, make_bank_case])
@pytest.mark.parametrize(("kind", "dropout_p"), [("dept", 0.0), ("accept", 0.0), ("adept", 0.0), ("adept", 0.3)])
def test_partial_gradients(kind: str, dropout_p: float, make: Callable[..., EmbeddingCase]) -> None:
    case = make(kind, dropout_p=dropout_p)
    ids, inputs = tensors(case)
    dy = torch.randn(case.B, case.S + case.N, case.d, dtype=torch.float64)
    wanted = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")[1:]
    for index in range(len(inputs)):
        one = [x.detach().clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        output = call(fastprefix.prompt_embedding, case, ids, one, backend="cpu")
        (gradient,) = torch.autograd.grad(output, one[index], dy)
        torch.testing.assert_close(gradient, wanted[index], rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "case",
    [
        make_case("adept", N=200, V=90),
        make_case("dept"),
        make_case("adept", dropout_p=0.2),
        *(make_bank_case(kind, N=50) for kind in OFFSETS),
        make_bank_case("adept", dropout_p=0.2),
        make_bank_case("adept", B=25, N=1),
        make_bank_case("dept", B=2, N=9),
    ],
    ids=str,
)
def test_threads_and_determinism(case: EmbeddingCase, threads: int) -> None:
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


@pytest.mark.parametrize("case", [*KINDS, make_case("dept", d=770)], ids=str)
def test_reads_nothing_that_was_not_written(case: EmbeddingCase, poisoned: None) -> None:
    ids, inputs = tensors(case, torch.float32)
    dy = torch.randn(case.B, case.S + case.N, case.d)
    got = results(fastprefix.prompt_embedding, case, ids, inputs, dy, backend="cpu")
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("wrong", [-1, 29, 2**40])
def test_ids_out_of_range(wrong: int) -> None:
    case = make_case("adept")
    ids, inputs = tensors(case)
    ids[1, 2] = wrong
    message = f"`input_ids` must hold ids from 0 to V - 1 = 28, got {wrong}"
    for backend in ("cpu", "eager"):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), pytest.raises(ValueError, match=message):
                call(fastprefix.prompt_embedding, case, ids, inputs, backend=backend)
            with mode(), torch.autocast("cpu"), pytest.raises(ValueError, match=message):
                call(fastprefix.prompt_embedding, case, ids, inputs, backend=backend)


def test_ids_out_of_range_in_compiled_code() -> None:
    table, prompt = torch.randn(29, 8), torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(lambda ids: fastprefix.prompt_embedding(ids, table, prompt, backend="cpu"), fullgraph=True)
    assert compiled(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 7, 8)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(ValueError, match=r"`input_ids` must hold ids from 0 to V - 1 = 28, got 29"):
            compiled(torch.full((1, 4), 29))


def test_rows_of_a_token_are_the_same() -> None:
    case = make_case("adept", V=4)
    ids, inputs = tensors(case)
    output = call(fastprefix.prompt_embedding, case, ids, inputs, backend="cpu")[:, case.S :]
    for token in range(case.V):
        rows = output[ids == token]
        torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=0, atol=0)


def arguments(case: EmbeddingCase) -> tuple[Any, ...]:
    """Return the arguments of the operator."""
    ids, inputs = tensors(case)
    leaves = [x.requires_grad_() for x in inputs]
    return tuple(call(canonical_arguments, case, ids, leaves))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_opcheck(case: EmbeddingCase) -> None:
    torch.library.opcheck(OPERATION.operator("cpu"), arguments(case))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradcheck(case: EmbeddingCase) -> None:
    own = {} if case.spans is None else {"spans": [(0, 2), (1, 1)]}
    own |= {} if case.index is None else {"index": [1, 0], "K": 3}
    case = replace(case, B=2, N=4, S=2, V=3, d=5, r=3, **own)
    assert torch.autograd.gradcheck(lambda *a: OPERATION.operator("cpu")(*a), arguments(case))


@pytest.mark.parametrize("name", LOWER)
def test_lower_instruction_sets(name: str) -> None:
    if name.startswith("avx512"):
        pytest.skip("they differ in products of bfloat16, of which the embedding has none")
    run_tests(__file__, name, "parity")
