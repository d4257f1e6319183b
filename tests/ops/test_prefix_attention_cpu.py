"""Test the CPU kernels against the float64 reference: output and every gradient, on every instruction set."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.ops.prefix_attention.arguments import DIFFERENTIABLE
from fastprefix.ops.prefix_attention.registration import OPERATION
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase, make_attention_case, measure
from tests.instruction_sets import EVERY, LOWER, needs_kernels, run_tests

pytestmark = needs_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Case = dict[str, Any]


@pytest.fixture(autouse=True)
def _poison(poisoned: None) -> None:
    """Fill uninitialized memory with NaN in every test."""


def make(dtype: torch.dtype, **named: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return differentiable tensors that ``dtype`` represents exactly, and the other arguments."""
    inputs = make_case(**named).build(dtype)
    return inputs.tensors, inputs.options


def make_case(**named: Any) -> AttentionCase:
    return make_attention_case(**({"Hq": 4, "N": 33, "M": 45, "P": 11, "D": 64} | named))


def run(function: Any, tensors: dict[str, Tensor], options: Case, dtype: torch.dtype, **more: Any) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    options = {
        name: option.to(dtype) if isinstance(option, Tensor) and option.is_floating_point() else option
        for name, option in options.items()
    }
    torch.manual_seed(7)
    output = function(**leaves, **options, **more)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(tensors["query"].dtype)
    output.backward(grad.to(dtype))
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_as_good(dtype: torch.dtype, **named: Any) -> None:
    """Check parity as in ``fastprefix.testing``, or in float64 with PyTorch's comparison of float64 tensors."""
    if dtype is not torch.float64:
        report = measure(make_case(**named), dtype, "cpu", draws=4)
        assert report.ok, f"\n{report}"
        return
    tensors, options = make(dtype, **named)
    exact = run(fastprefix.reference.prefix_attention, tensors, options, dtype)
    torch.testing.assert_close(run(fastprefix.prefix_attention, tensors, options, dtype, backend="cpu"), exact)


def hide(*size: int) -> Tensor:
    """Return a float mask that hides about half of the columns."""
    seen = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64) > 0
    return torch.where(seen, 0.0, -torch.inf)


def ids(*size: int) -> Tensor:
    return torch.randint(0, 3, size, generator=torch.Generator().manual_seed(4))


SHAPES: list[Case] = [
    {"N": 1, "M": 1, "P": 1},
    {"N": 3, "M": 3, "P": 0},
    {"N": 113, "M": 203, "P": 37},
    {"N": 239, "M": 1, "P": 3},
    {"N": 0},
    {"M": 0},
    {"P": 0},
    {"M": 0, "P": 0},
    {"B": 0},
    {"N": 0, "M": 0, "P": 0},
    {"P": 128, "N": 70},
    {"P": 2048, "N": 5, "B": 1},
    {"N": 2, "M": 300, "P": 100},
    {"Hkv": 4},
    {"Hq": 3, "Hkv": 1},
    {"Hq": 1, "Hkv": 1, "B": 1, "N": 200, "M": 200},
    {"D": 8},
    {"D": 13, "Dv": 7},
    {"D": 80, "Dv": 96},
    {"D": 96, "Dv": 80},
    {"D": 128, "Dv": 33},
    {"D": 256, "Dv": 8},
    {"D": 1, "Dv": 1},
    {"prefix_a_row": True},
    {"prefix_a_row": True, "Hq": 1, "Hkv": 1, "N": 150},
    {"layout": "BNHD"},
    {"layout": "sliced"},
    {"layout": "strided"},
]
# Queries of all rows and heads go through one prefix together: in parts, in blocks of which the last has few queries.
SHAPES += [
    {"B": 9, "N": 1, "M": 40, "P": 1000},
    {"B": 33, "Hq": 2, "Hkv": 1, "N": 1, "M": 3, "P": 100},
    {"B": 5, "Hq": 6, "Hkv": 2, "N": 2, "M": 30, "P": 130, "is_causal": True},
    {"B": 8, "N": 1, "M": 0, "P": 200},
    {"B": 8, "N": 1, "M": 20, "P": 200, "sinks": True, "softcap": 3.0, "key_bias": "hP"},
    {"B": 8, "N": 1, "M": 20, "P": 200, "sinks": True, "output_gate": "BH"},
    {"B": 8, "N": 1, "M": 20, "P": 200, "spans": "equal", "key_bias": "hT"},
    {"B": 8, "N": 2, "M": 20, "P": 200, "D": 13, "Dv": 7, "layout": "BNHD"},
    {"B": 9, "N": 1, "M": 4, "P": 96, "scale": 12.5},  # with scores that two kinds of products round differently
    {"B": 9, "N": 2, "M": 20, "P": 200, "scale": 12.5, "output_gate": "BH"},
    {
        "B": 12,
        "N": 1,
        "M": 20,
        "Hkv": 1,
        "spans": tuple([(0, 100), (0, 150), (9, 100), (0, 20), (0, 0)][b % 5] for b in range(12)),
    },
]
FEATURES: list[Case] = [
    {"gate": "P"},
    {"gate": "B1P"},
    {"gate": "B11", "prefix_a_row": True},
    {"gate": "1h1"},
    {"gate": "BHNP"},
    {"gate": "1H1P"},
    {"gate": "B1N1"},
    {"gate": "1111", "N": 70},
    {"output_gate": "1H"},
    {"output_gate": "B1", "gate": "BhP", "N": 130},
    {"output_gate": "BH", "gate": "1HN1"},
    {"output_gate": "1H", "P": 0},
    {"output_gate": "1H", "M": 0},
    {"sinks": True},
    {"sinks": True, "M": 0, "P": 0},
    {"sinks": True, "output_gate": "11", "N": 70},
    {"is_causal": True, "N": 150, "M": 150},
    {"is_causal": True, "N": 40, "M": 300},
    {"is_causal": True, "N": 150, "M": 40},
    {"is_causal": True, "N": 1, "M": 200},
    {"is_causal": True, "P": 0, "N": 70, "M": 30},
    {"is_causal": True, "window_size": 1, "N": 100, "M": 100},
    {"is_causal": True, "window_size": 40, "N": 200, "M": 210},
    {"window_size": 30, "N": 200, "M": 190},
    {"window_size": 1, "N": 20, "M": 90},
    {"segment_ids": (ids(2, 33), ids(2, 45))},
    {"segment_ids": (ids(1, 33).int(), ids(2, 45).int()), "is_causal": True},
    {"softcap": 2.0, "gate": "B1P"},
    {"softcap": 30.0, "is_causal": True},
    {"mask": "padding"},
    {"mask": "bool 1HNM"},
    {"mask": "bool B1N1", "P": 0},
    {"mask": "float BHNM"},
    {"mask": "float N1"},
    {"attn_mask": hide(45)},
    {"attn_mask": torch.full((1,), -torch.inf)},
    {"bias": "B11P"},
    {"bias": "HN1"},
    {"prefix_bias": hide(11), "output_gate": "1H"},
    {"prefix_bias": torch.full((1,), -torch.inf), "output_gate": "1H"},
    {"dropout_p": 0.3, "gate": "B1P"},
    {"dropout_p": 0.5, "output_gate": "1H", "N": 70, "is_causal": True},
    {"dropout_p": 1.0},
    {"scale": -0.3},
    {"scale": 0.0},
    {
        "is_causal": True,
        "window_size": 90,
        "gate": "BHNP",
        "sinks": True,
        "softcap": 5.0,
        "mask": "float B1NM",
        "bias": "NP",
        "segment_ids": (ids(2, 130), ids(2, 130)),
        "dropout_p": 0.1,
        "N": 130,
        "M": 130,
    },
]


def describe(case: Case) -> str:
    return ",".join(
        f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in case.items() if k != "segment_ids"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (SHAPES + FEATURES)[::EVERY], ids=describe)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    assert_as_good(dtype, **case)


def test_is_the_default_backend() -> None:
    tensors, _ = make(torch.float32)
    output = fastprefix.prefix_attention(**{name: t.requires_grad_() for name, t in tensors.items()})
    assert "PrefixAttention" in type(output.grad_fn).__name__ or "cpu" in type(output.grad_fn).__name__
    assert torch.equal(output, fastprefix.prefix_attention(**tensors, backend="cpu"))


def test_unseen_rows_are_zero() -> None:
    tensors, options = make(torch.float32, P=0, N=70, M=30, is_causal=True)
    results = run(fastprefix.prefix_attention, tensors, options, torch.float32, backend="cpu")
    assert (results["output"][:, :, :40] == 0).all()
    assert (results["query"][:, :, :40] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask_of_the_least_number_averages(dtype: torch.dtype) -> None:
    """The least finite number in every element of a mask hides nothing, also for gradients."""
    assert_as_good(dtype, P=0, attn_mask=torch.full((33, 45), torch.finfo(dtype).min))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e6, 1e10, 1e30])
@pytest.mark.parametrize(("N", "P"), [(1, 5), (1, 100), (33, 5)])
def test_large_scores(size: float, N: int, P: int, dtype: torch.dtype) -> None:
    """Scores of any size give the value of the largest one, and finite gradients."""
    tensors, _ = make(dtype, B=8, N=N, P=P, D=16)
    grown = ("query", "key", "prefix_key")
    tensors = {name: t * size**0.5 if name in grown else t for name, t in tensors.items()}
    exact = run(fastprefix.reference.prefix_attention, tensors, {"scale": 0.3}, torch.float64)
    results = run(fastprefix.prefix_attention, tensors, {"scale": 0.3}, dtype, backend="cpu")
    assert all(result.isfinite().all() for result in results.values())
    # Where float32 cannot tell the largest two scores apart, the result is between both values.
    errors = (results["output"].double() - exact["output"]).abs().amax(-1)
    assert (errors < (1e-2 if dtype is torch.bfloat16 else 1e-5)).double().mean() > 0.98


@pytest.mark.parametrize("case", [{"gate": "B1P", "sinks": True}, {"output_gate": "1H", "gate": "P"}], ids=describe)
def test_only_gradients_asked_for(case: Case) -> None:
    tensors, _ = make(torch.float32, **case)
    full = run(fastprefix.prefix_attention, tensors, {}, torch.float32, backend="cpu")
    for wanted in [*((name,) for name in tensors), ("prefix_key", "prefix_value"), ("query", "value")]:
        leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        output = fastprefix.prefix_attention(**leaves, backend="cpu")
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        output.backward(grad)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, full[name], rtol=0, atol=1e-5 * float(full[name].abs().max()))


def test_gradients_of_masks_are_refused() -> None:
    tensors, _ = make(torch.float32)
    with pytest.raises(ValueError, match="prefix_bias requires a gradient"):
        fastprefix.prefix_attention(**tensors, prefix_bias=torch.zeros(11, requires_grad=True), backend="cpu")


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [{"Hq": 1, "Hkv": 1}, {}])
def test_same_bits_twice(threads: int, heads: Case) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case: Case = {**heads, "B": 1, "N": 300, "M": 200, "gate": "11P"}
        tensors, options = make(torch.float32, **case)
        first, second = (run(fastprefix.prefix_attention, tensors, options, torch.float32, backend="cpu") for _ in "12")
        assert all(torch.equal(first[name], second[name]) for name in first)
        for dtype in (torch.float32, torch.bfloat16):
            assert_as_good(dtype, **case)
    finally:
        torch.set_num_threads(before)


def test_in_another_thread() -> None:
    tensors, options = make(torch.float32, gate="P")
    expected = run(fastprefix.prefix_attention, tensors, options, torch.float32, backend="cpu")
    results: list[dict[str, Tensor]] = []

    def work() -> None:
        torch.set_num_threads(1)
        results.append(run(fastprefix.prefix_attention, tensors, options, torch.float32, backend="cpu"))

    before = torch.get_num_threads()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    torch.testing.assert_close(results[0], expected)


@pytest.mark.parametrize("dropout_p", [0.2, 0.9])
def test_drops_what_eager_drops(dropout_p: float) -> None:
    """Values are one-hot and all scores are equal, so an output is 0 exactly if its column was dropped."""
    B, H, N, M, P = 2, 3, 70, 100, 28
    eye = torch.eye(M + P)
    arguments: Case = {
        "query": torch.zeros(B, H, N, 4),
        "key": torch.zeros(B, H, M, 4),
        "value": eye[P:].expand(B, H, -1, -1),
        "prefix_key": torch.zeros(H, P, 4),
        "prefix_value": eye[:P].expand(H, -1, -1),
        "dropout_p": dropout_p,
    }
    outputs = []
    for backend in ("cpu", "eager"):
        torch.manual_seed(11)
        outputs.append(fastprefix.prefix_attention(**arguments, backend=backend))
    assert torch.equal(outputs[0] == 0, outputs[1] == 0)


@pytest.mark.parametrize(
    "case",
    [
        {"gate": "1hP", "sinks": True, "softcap": 3.0},
        {"output_gate": "1H", "gate": "1HNP", "is_causal": True},
    ],
    ids=describe,
)
def test_gradcheck(case: Case) -> None:
    tensors, options = make(torch.float64, B=1, **({"Hq": 2, "N": 4, "M": 5, "P": 3, "D": 3, "Dv": 2} | case))
    names = list(tensors)

    def call(*values: Tensor) -> Tensor:
        return fastprefix.prefix_attention(**dict(zip(names, values, strict=True)), **options, backend="cpu")

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("layout", ["BHND", "BNHD", "strided"])
@pytest.mark.parametrize("case", [{"gate": "B1P"}, {"output_gate": "1H", "sinks": True}], ids=describe)
def test_opcheck(case: Case, layout: str) -> None:
    tensors, options = make(torch.float32, layout=layout, **case)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    arguments = canonical_arguments(**leaves, **options)
    forward = OPERATION.operator("cpu")
    torch.library.opcheck(forward, arguments)
    output, normalizers = forward(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
    needs = [isinstance(a, Tensor) and a.requires_grad for a in arguments[: len(DIFFERENTIABLE)]]
    inputs = (
        torch.ones_like(output),
        output,
        normalizers,
        needs,
        *(a.detach() if isinstance(a, Tensor) else a for a in arguments),
    )
    torch.library.opcheck(torch.ops.fastprefix.prefix_attention_backward.cpu, inputs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("avx512") else []) for name in LOWER]
)
def test_lower_instruction_sets(name: str) -> None:
    dtypes = "bfloat16" if name.startswith("avx512") else "float32 or bfloat16"
    run_tests(__file__, name, f"(test_parity and ({dtypes})) or gradcheck or drops")


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "named",
    [
        {"P": 9000},
        {"P": 9000, "frozen": 500, "gate": "hP", "key_bias": "h1", "output_gate": "BH"},
        {"P": 6000, "spans": tuple((40 * row, (6000, 9, 0, 3000)[row % 4]) for row in range(64)), "gate": "BHNP"},
    ],
    ids=["shared", "frozen", "spans"],
)
@pytest.mark.usefixtures("many_threads")
def test_prefixes_whose_gradients_are_summed_in_ranges(dtype: torch.dtype, named: Case) -> None:
    """64 threads with 8,192 keys of 16 columns exceed ``kPrefixSumsBytes``."""
    case = make_case(**({"B": 64, "Hq": 1, "Hkv": 1, "N": 3, "M": 5, "D": 16} | named))
    report = measure(case, dtype, "cpu", draws=1)
    assert report.ok, f"\n{report}"
