"""The Triton kernels of ``prefix_attention`` against the float64 reference, forward and every gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.ops.prefix_attention.arguments import DIFFERENTIABLE, EAGER_ALONE
from fastprefix.ops.prefix_attention.layout import allocate_heads
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase, make_attention_case, measure
from fastprefix.testing import assert_parity

Inputs = dict[str, Any]
NAMES = [name for name in DIFFERENTIABLE if name not in EAGER_ALONE]


def make_case(**named: Any) -> AttentionCase:
    defaults = {"Hq": 4, "N": 37, "M": 45, "P": 19, "D": 24, "Dv": 40}
    return make_attention_case(**(defaults | named))


def make(device: str, dtype: torch.dtype = torch.float32, **named: Any) -> Inputs:
    """All arguments of a call."""
    inputs = make_case(**named).build(dtype, device)
    return inputs.tensors | inputs.options


Run = tuple[Tensor, dict[str, Tensor]]


def run(function: Callable[..., Tensor], x: Inputs, wanted: Sequence[str] = NAMES) -> Run:
    """Output and gradients of a call."""
    leaves = {name: x[name].detach().requires_grad_() for name in wanted if name in x}
    torch.manual_seed(5)  # the same dropout everywhere
    output = function(**(x | leaves))
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def triton_backend(**arguments: Any) -> Tensor:
    return fastprefix.prefix_attention(**arguments, backend="triton")


def assert_close(case: AttentionCase, dtype: torch.dtype, device: str, grad: bool | Sequence[str] = True) -> None:
    """The parity of ``fastprefix.testing``."""
    report = measure(case, dtype, "triton", device, draws=2, grad=grad)
    assert report.ok, f"\n{report}"


CASES: dict[str, Inputs] = {
    "plain": {},
    "heads of the width of a tile": {"D": 32, "Dv": 32, "N": 64, "M": 64, "P": 32, "Hq": 2},
    "wide heads": {"D": 80, "Dv": 256, "Hq": 2, "Hkv": 1, "N": 33, "M": 31, "B": 1},
    "narrow heads": {"D": 8, "Dv": 8, "B": 1},
    "one query, one key": {"N": 1, "M": 1, "P": 1},
    "three": {"N": 3, "M": 3, "P": 3, "is_causal": True},
    "short prefix of many queries": {"P": 5, "N": 70, "M": 70, "B": 1, "gate": "hP"},
    "multi query": {"Hq": 3, "Hkv": 1, "is_causal": True},
    "causal": {"is_causal": True, "N": 70, "M": 70, "B": 1},
    "causal, more keys": {"is_causal": True, "N": 40, "M": 101, "B": 1},
    "causal, more queries": {"is_causal": True, "N": 70, "M": 33, "B": 1},
    "causal window": {"is_causal": True, "window_size": 9, "N": 70, "M": 75, "B": 1},
    "causal window of many tiles": {"is_causal": True, "window_size": 70, "N": 100, "M": 130, "B": 1, "Hq": 2},
    "window": {"window_size": 5, "N": 70, "M": 66, "B": 1},
    "narrow window": {"window_size": 2, "N": 40, "M": 40, "B": 1, "P": 0},
    "window of 32 bits": {"is_causal": True, "window_size": 2**31 - 1, "N": 40, "M": 45, "B": 1},
    "window of 63 bits": {"window_size": 2**63 - 1, "N": 45, "M": 40, "B": 1},
    "segments": {"segments": True},
    "padding": {"mask": "padding"},
    "bool mask": {"mask": "bool B1NM"},
    "bool mask of heads, nothing seen": {"mask": "bool H11", "P": 0, "sinks": True},
    "float mask": {"mask": "float 1HNM"},
    "nothing but the least number": {"P": 0, "attn_mask": torch.full((37, 45), torch.finfo(torch.float32).min)},
    "float mask of keys": {"mask": "float B11M", "is_causal": True},
    "prefix bias": {"bias": "B1NP"},
    "prefix bias of keys": {"bias": "P", "prefix_a_row": True},
    "softcap": {"softcap": 1.5, "gate": "P"},
    "sinks": {"sinks": True, "is_causal": True, "N": 50, "M": 40},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3, "is_causal": True, "mask": "padding"},
    "no scale": {"scale": 0.0, "is_causal": True},
    "prefix of each row": {"prefix_a_row": True, "P": 40},
    "gate of keys": {"gate": "P"},
    "gate of heads": {"gate": "h1"},
    "gate of rows": {"gate": "BhP"},
    "gate of rows, prefix of each": {"gate": "B1P", "prefix_a_row": True},
    "one gate": {"gate": "1"},
    "gate of queries": {"gate": "BHNP"},
    "gate of queries, shared by heads": {"gate": "B1N1", "P": 40},
    "gate of heads in four dimensions": {"gate": "1H1P"},
    "separate": {"output_gate": "BH"},
    "separate, gated": {"output_gate": "H", "gate": "BhP", "is_causal": True},
    "separate, gate of queries": {"output_gate": "H", "gate": "BHNP", "P": 19},
    "separate, sinks, softcap": {"output_gate": "B1", "sinks": True, "softcap": 2.0, "window_size": 9},
    "separate, dropout": {"output_gate": "BH", "dropout_p": 0.4, "gate": "P"},
    "dropout": {"dropout_p": 0.3},
    "dropout of everything": {"dropout_p": 1.0, "B": 1},
    "everything": {
        "is_causal": True,
        "window_size": 30,
        "segments": True,
        "mask": "float BHNM",
        "bias": "BHNP",
        "gate": "BHNP",
        "softcap": 4.0,
        "sinks": True,
        "dropout_p": 0.2,
    },
    "no prefix": {"P": 0},
    "no prefix, separate": {"P": 0, "output_gate": "BH", "gate": "BhP"},
    "no tokens": {"M": 0},
    "no tokens, separate": {"M": 0, "output_gate": "BH"},
    "no keys": {"M": 0, "P": 0},
    "no keys but sinks": {"M": 0, "P": 0, "sinks": True},
    "no queries": {"N": 0, "gate": "BhP", "sinks": True},
    "no rows": {"B": 0, "gate": "P", "output_gate": "H"},
    "no rows, prefix of each": {"B": 0, "prefix_a_row": True, "gate": "P"},
    "decoding": {"N": 1, "M": 140, "P": 70, "is_causal": True},
    "decoding, a few": {"N": 5, "M": 100, "P": 40, "is_causal": True, "B": 3, "Hq": 8},
    "decoding, prefix of each row": {"N": 2, "M": 100, "P": 70, "prefix_a_row": True, "gate": "BhP"},
    "decoding, separate": {"N": 2, "M": 100, "P": 70, "output_gate": "BH", "sinks": True, "softcap": 2.0},
    "decoding, window, masks": {
        "N": 3,
        "M": 100,
        "is_causal": True,
        "window_size": 40,
        "mask": "padding",
        "sinks": True,
    },
    "decoding, gate of queries, dropout": {
        "N": 3,
        "M": 100,
        "gate": "BHNP",
        "dropout_p": 0.3,
        "bias": "H1P",
    },
    "decoding, segments": {"N": 4, "M": 100, "segments": True, "mask": "float BHNM"},
    "decoding, no prefix": {"N": 1, "M": 100, "P": 0},
    "decoding, no tokens": {"N": 1, "M": 0, "P": 100},
}
HALF_CASES = (
    "plain",
    "multi query",
    "causal window",
    "segments",
    "padding",
    "softcap",
    "negative scale",
    "no scale",
    "prefix bias",
    "gate of queries",
    "separate, gated",
    "separate, sinks, softcap",
    "decoding, a few",
)


@pytest.mark.parametrize("name", CASES)
def test_parity_float32(device: str, name: str) -> None:
    assert_close(make_case(**CASES[name]), torch.float32, device)


@pytest.mark.parametrize("name", HALF_CASES)
def test_parity_float16(device: str, name: str) -> None:
    assert_close(make_case(**CASES[name]), torch.float16, device)


@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), ("query", "value"), ("key", "prefix_gate")])
def test_only_the_gradients_asked_for(device: str, wanted: tuple[str, ...]) -> None:
    case = make_case(N=20, M=33, gate="BhP", output_gate="BH", sinks=True)
    assert_close(case, torch.float32, device, wanted)


def test_frozen_tokens_cost_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastprefix.ops import targets

    launched: list[str] = []
    launch = targets.Device.launch

    def record(self: Any, kernel: Any, grid: Any, arguments: Any, constants: Any, tile: Any) -> None:
        launched.append(
            kernel.__name__
            + ("" if arguments[2] is not None and getattr(arguments[2], "pointer", 0) is not None else " without dq")
        )
        launch(self, kernel, grid, arguments, constants, tile)

    monkeypatch.setattr(targets.Device, "launch", record)
    run(triton_backend, make(device, gate="P"), ("prefix_key", "prefix_value", "prefix_gate"))
    assert not any("dkv" in name for name in launched)
    assert "prefix_attention_bwd_dq_kernel without dq" in launched


def test_dropout_drops_what_the_eager_backend_drops(device: str) -> None:
    x = make(device, M=0, P=32, Dv=32, dropout_p=0.5)
    x["query"] = torch.zeros_like(x["query"])
    x["prefix_value"] = torch.eye(32, device=device).expand(2, 32, 32)  # the output is the probabilities
    kept = [
        run(lambda name=name, **a: fastprefix.prefix_attention(**a, backend=name), x)[0] != 0
        for name in ("eager", "triton")
    ]
    assert torch.equal(*kept)
    assert 0.4 < kept[0].double().mean() < 0.6


def test_twice_the_same_bits(device: str) -> None:
    x = make(device, B=3, P=40, gate="P", sinks=True)
    first, second = (run(triton_backend, x) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_strided_views_and_layouts(device: str) -> None:
    x = make(device, N=20, M=33, layout="BNHD")
    x["prefix_key"] = x["prefix_key"].transpose(0, 1).contiguous().transpose(0, 1)
    x["prefix_value"] = torch.stack([x["prefix_value"], x["prefix_value"]], -1)[..., 0]  # columns two apart
    assert_parity(fastprefix.prefix_attention, x, options={"backend": "triton"}, draws=2)
    output = triton_backend(**x)
    assert output.stride() == allocate_heads(x["query"], x["value"].shape[3]).stride()


def test_columns_further_apart_than_32_bits_say(device: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU has no memory that is never touched")
    apart = 2**23 + 2**16
    memory = torch.from_numpy(numpy.empty(256 * apart, dtype=numpy.float16))  # few of its pages are ever touched
    x = make(device, torch.float16, B=1, Hq=1, Hkv=1, N=20, M=20, P=3, D=256, Dv=16)
    far = memory.as_strided(x["key"].shape, (1, 1, 1, apart)).copy_(x["key"])
    assert torch.equal(triton_backend(**{**x, "key": far}), triton_backend(**x))


def test_operators_keep_pytorch_rules(device: str) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in make(device, N=5, M=6, P=3, gate="P", sinks=True).items()}
    torch.library.opcheck(torch.ops.fastprefix.prefix_attention.triton, tuple(canonical_arguments(**x, is_causal=True)))


@pytest.mark.parametrize(
    ("dtype", "precision", "used"),
    [(torch.float32, "tf32", "tf32"), (torch.float32, "ieee", "ieee"), (torch.bfloat16, "tf32", "ieee")],
)
def test_precision_of_products(
    device: str, dtype: torch.dtype, precision: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's, by PyTorch's newer switch: once it is set, the older one cannot be read."""
    from fastprefix.ops import targets

    seen: set[str] = set()
    launch = targets.Device.launch

    def record(self: Any, kernel: Any, grid: Any, arguments: Any, constants: Any, tile: Any) -> None:
        seen.add(constants["T"].PRECISION)
        launch(self, kernel, grid, arguments, constants, tile)

    monkeypatch.setattr(targets.Device, "launch", record)
    x = make(device, dtype, N=20, M=20, B=1)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        triton_backend(**x)
    finally:
        matmul.fp32_precision = before
    assert seen == {used}


def test_compiles_whole(device: str) -> None:
    x = make(device, N=5, M=6, P=3, gate="P")
    compiled = torch.compile(triton_backend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x), triton_backend(**x))


@pytest.mark.parametrize(
    ("change", "match"),
    [({"dtype": torch.float64}, "not torch.float64"), ({"D": 264}, "head sizes up to 256")],
)
def test_says_what_it_does_not_take(device: str, change: dict[str, Any], match: str) -> None:
    x = torch.zeros(1, 1, 1, change.get("D", 16), dtype=change.get("dtype", torch.float32), device=device)
    with pytest.raises(ValueError, match=match):
        triton_backend(query=x, key=x, value=x, prefix_key=x[0], prefix_value=x[0])
    assert fastprefix.prefix_attention(x, x, x, x[0], x[0]).shape == x.shape
