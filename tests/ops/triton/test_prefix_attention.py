"""Test the Triton kernels of ``prefix_attention`` against the float64 reference, forward and every gradient."""

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
    """Return all arguments of a call."""
    inputs = make_case(**named).build(dtype, device)
    return inputs.tensors | inputs.options


Run = tuple[Tensor, dict[str, Tensor]]


def run(function: Callable[..., Tensor], x: Inputs, wanted: Sequence[str] = NAMES) -> Run:
    """Return the output and gradients of a call."""
    leaves = {name: x[name].detach().requires_grad_() for name in wanted if name in x}
    torch.manual_seed(5)  # the same dropout everywhere
    output = function(**(x | leaves))
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def triton_backend(**arguments: Any) -> Tensor:
    return fastprefix.prefix_attention(**arguments, backend="triton")


def assert_close(case: AttentionCase, dtype: torch.dtype, device: str, grad: bool | Sequence[str] = True) -> None:
    """Check parity as in ``fastprefix.testing``."""
    report = measure(case, dtype, "triton", device, draws=1, grad=grad)
    assert report.ok, f"\n{report}"


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return a list to which every launch adds the name of its kernel and its arguments by name."""
    from fastprefix.ops import targets

    launched: list[tuple[str, dict[str, Any]]] = []
    launch = targets.Device.launch

    def record(self: Any, kernel: Any, grid: Any, arguments: Any, constants: Any, tile: Any) -> None:
        name = kernel.__name__.removeprefix("prefix_attention_").removesuffix("_kernel")
        launched.append((name, dict(zip(kernel.arg_names, arguments, strict=False)) | constants | {"grid": grid}))
        launch(self, kernel, grid, arguments, constants, tile)

    monkeypatch.setattr(targets.Device, "launch", record)
    return launched


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
    "a scale below the least float32": {"scale": 1e-46, "is_causal": True, "B": 1, "Hq": 2, "N": 20, "M": 20},
    "prefix of each row": {"prefix_a_row": True, "P": 40},
    "gate of keys": {"gate": "P"},
    "gate of heads": {"gate": "h1"},
    "gate of rows": {"gate": "BhP"},
    "gate of rows, prefix of each": {"gate": "B1P", "prefix_a_row": True},
    "one gate": {"gate": "1"},
    "gate of queries": {"gate": "BHNP"},
    "gate of queries, one for all keys": {"gate": "B1N1", "N": 20, "M": 20, "P": 40},
    "gate of queries, shared by heads": {"gate": "B1NP", "P": 40, "Hq": 4, "N": 21, "M": 19, "D": 16},
    "gate of queries, shared by rows": {
        "gate": "1HNP",
        "B": 3,
        "Hq": 2,
        "N": 20,
        "prefix_a_row": True,
        "is_causal": True,
    },
    "gate of queries, shared by all": {
        "gate": "11NP",
        "N": 20,
        "M": 20,
        "Hq": 2,
        "output_gate": "BH",
        "dropout_p": 0.2,
    },
    "gate of heads in four dimensions": {"gate": "1H1P"},
    "separate": {"output_gate": "BH"},
    "separate, gated": {"output_gate": "H", "gate": "BhP", "is_causal": True},
    "separate, gate of queries": {"output_gate": "H", "gate": "BHNP", "P": 19},
    "separate, sinks, softcap": {"output_gate": "B1", "sinks": True, "softcap": 2.0, "window_size": 9},
    "separate, dropout": {"N": 20, "M": 20, "output_gate": "BH", "dropout_p": 0.4, "gate": "P"},
    "dropout": {"dropout_p": 0.3},
    "dropout of everything": {"dropout_p": 1.0, "B": 1},
    "key bias": {"key_bias": "hP"},
    "key bias, softcap": {"key_bias": "P", "softcap": 1.5, "gate": "P", "is_causal": True},
    "key bias of rows, prefix shared": {"key_bias": "B1P", "frozen": 3},
    "key bias of rows, prefix of each": {"key_bias": "BhP", "prefix_a_row": True, "P": 40, "frozen": 7},
    "key bias of heads": {"key_bias": "h1", "mask": "bool"},
    "key bias, separate": {"N": 20, "M": 20, "key_bias": "hP", "output_gate": "BH", "gate": "BHNP", "dropout_p": 0.2},
    "frozen": {"frozen": 7, "P": 50},
    "all frozen": {"frozen": 19, "gate": "hP", "key_bias": "hP"},
    "spans": {"spans": "own", "B": 4, "is_causal": True},
    "spans, equal": {"spans": "equal", "B": 4, "N": 20, "gate": "hP", "mask": "padding"},
    "spans, ragged": {"spans": "ragged", "B": 4, "N": 20, "P": 50, "gate": "BhP", "segments": True, "key_bias": "hT"},
    "spans of one row": {"spans": ((3, 17),), "B": 1, "key_bias": "1T", "frozen": 5},
    "spans, a large one beside empty ones": {
        "spans": ((5, 0), (1, 150), (0, 0), (7, 1)),
        "B": 4,
        "N": 20,
        "M": 20,
        "is_causal": True,
        "segments": True,
    },
    "spans, frozen": {
        "spans": "ragged",
        "B": 4,
        "N": 20,
        "Hq": 2,
        "Hkv": 1,
        "P": 40,
        "frozen": 9,
        "key_bias": "hT",
        "softcap": 2.0,
    },
    "spans, gate of queries": {
        "spans": "ragged",
        "B": 3,
        "N": 20,
        "Hq": 2,
        "P": 40,
        "gate": "BHNP",
        "bias": "BHNP",
        "sinks": True,
    },
    "spans, gate of queries, shared": {"spans": "ragged", "B": 3, "N": 20, "P": 40, "gate": "11NP", "key_bias": "hT"},
    "no queries, gate of queries, shared": {"N": 0, "gate": "B1NP"},
    "spans, gate of queries alone": {"spans": "own", "B": 3, "N": 20, "Hq": 2, "gate": "B1N1", "window_size": 9},
    "spans, gate of keys": {"spans": "own", "B": 2, "N": 20, "gate": "1H1P", "bias": "P", "mask": "float 1HNM"},
    "spans, one gate": {"spans": "ragged", "B": 4, "N": 20, "gate": "1"},
    "spans, separate": {
        "spans": "own",
        "B": 3,
        "N": 20,
        "Hq": 2,
        "output_gate": "BH",
        "gate": "BhP",
        "sinks": True,
        "key_bias": "h1",
    },
    "spans, separate, dropout": {
        "spans": "equal",
        "B": 3,
        "N": 20,
        "Hq": 2,
        "output_gate": "H",
        "dropout_p": 0.3,
        "softcap": 2.0,
    },
    "spans, dropout": {"spans": "ragged", "B": 3, "N": 20, "Hq": 2, "P": 40, "dropout_p": 0.3},
    "spans of nothing": {"spans": "own", "P": 0, "B": 3, "N": 20},
    "spans of no rows": {"spans": "own", "B": 0, "key_bias": "hT"},
    "spans, no queries": {"spans": "own", "N": 0, "gate": "BhP", "key_bias": "hT"},
    "plain attention": {"P": None, "is_causal": True, "sinks": True, "softcap": 3.0},
    "plain attention, decoding": {"P": None, "N": 2, "M": 100, "mask": "padding"},
    **{
        f"prefix of {P}, packed rows": {
            "P": P,
            "N": 20,
            "M": 20,
            "B": 1,
            "Hq": 1,
            "Hkv": 1,
            "D": 16,
            "Dv": 16,
            "segments": True,
            "is_causal": True,
        }
        for P in (512, 2048)
    },
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
    "decoding, spans": {"spans": "own", "B": 3, "N": 1, "M": 70, "P": 100, "key_bias": "hT"},
    "decoding, equal spans": {"spans": "equal", "B": 19, "N": 1, "M": 20, "P": 70, "gate": "BhP", "Hq": 2, "Hkv": 1},
    "decoding, spans of which some are equal": {
        "spans": tuple([(7, 90), (7, 0), (7, 90), (3, 40), (8, 90)][row * row % 5] for row in range(20)),
        "B": 20,
        "N": 2,
        "M": 3,
        "Hq": 2,
        "is_causal": True,
    },
    "decoding, spans, separate": {
        "spans": "ragged",
        "B": 3,
        "N": 3,
        "M": 30,
        "P": 140,
        "Hq": 2,
        "output_gate": "BH",
        "sinks": True,
        "gate": "BHNP",
        "bias": "BHNP",
        "softcap": 2.0,
    },
    "decoding, spans, many queries of a row": {"spans": "equal", "B": 2, "N": 16, "M": 20, "P": 80, "Hq": 6},
    "decoding, spans, dropout": {"spans": "ragged", "B": 4, "N": 2, "M": 30, "P": 70, "dropout_p": 0.3},
    "decoding, spans of nothing": {"spans": "own", "B": 3, "N": 1, "M": 70, "P": 0},
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
    "a scale below the least float32",
    "prefix bias",
    "gate of queries",
    "separate, gated",
    "separate, sinks, softcap",
    "decoding, a few",
    "key bias",
    "spans, ragged",
    "spans, gate of queries",
    "decoding, spans",
)


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("name", CASES)
def test_parity_float32(device: str, name: str) -> None:
    assert_close(make_case(**CASES[name]), torch.float32, device)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", HALF_CASES)
def test_parity_float16(device: str, name: str) -> None:
    assert_close(make_case(**CASES[name]), torch.float16, device)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), ("query", "value"), ("key", "prefix_gate")])
def test_only_the_gradients_asked_for(device: str, wanted: tuple[str, ...]) -> None:
    case = make_case(N=20, M=33, gate="BhP", output_gate="BH", sinks=True)
    assert_close(case, torch.float32, device, wanted)


def test_frozen_tokens_cost_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record_launches(monkeypatch)
    run(triton_backend, make(device, gate="P"), ("prefix_key", "prefix_value", "prefix_gate"))
    assert "bwd_dkv" not in [name for name, _ in launched]
    assert [given["dq"].pointer for name, given in launched if name == "bwd_dq"] == [None]


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
    x = make(device, B=3, Hq=2, N=20, P=40, gate="P", sinks=True)
    first, second = (run(triton_backend, x) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [100.0, -100.0])
@pytest.mark.parametrize("name", ["prefix_bias", "prefix_key_bias", "attn_mask", "sinks"])
def test_large_biases_where_queries_do_not_fill_a_tile(device: str, name: str, size: float, dtype: torch.dtype) -> None:
    """Rows after the last query would have infinite probabilities: float32 cannot hold e^100."""
    x = make(device, dtype, B=1, Hq=1, Hkv=1, N=5, M=8, P=4, D=16, Dv=16, gate="BhP")
    shape = {"prefix_bias": (1, 1, 5, 4), "prefix_key_bias": (1, 4), "attn_mask": (1, 1, 5, 8), "sinks": (1,)}[name]
    x[name] = torch.full(shape, size, dtype=dtype, device=device)
    if name == "sinks":
        x["attn_mask"] = torch.zeros(5, 8, dtype=dtype, device=device)
    grad = [key for key in x if key not in EAGER_ALONE]
    assert_parity(fastprefix.prefix_attention, x, options={"backend": "triton"}, grad=grad, draws=2)


def test_expanded_upstream_gradients_are_loaded_as_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record_launches(monkeypatch)
    x = make(device, N=20, M=20, B=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    triton_backend(**leaves).sum().backward()
    strides = [given["do"].c for _, given in launched if "do" in given]
    assert strides
    assert set(strides) == {1}
    for tensor in leaves.values():
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(("gate", "shape"), [("11N1", (2, 4, 37, 1)), ("1", (2, 4, 2, 1)), ("BhP", (2, 4, 2, 19))])
def test_the_gates_gradient_is_summed_in_programs(
    device: str, gate: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = record_launches(monkeypatch)
    run(triton_backend, make(device, gate=gate), ["prefix_gate"])
    assert [given["dgate"].pointer.shape for name, given in launched if name == "bwd_dq"] == [shape]


@pytest.mark.parametrize(("gate", "kernel"), [("BHNP", "bwd_dq"), ("B1NP", "bwd_dgate"), ("11NP", "bwd_dgate")])
def test_the_gradient_of_a_gate_of_queries_and_keys_needs_no_scratch(
    device: str, gate: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = record_launches(monkeypatch)
    _, gradients = run(triton_backend, make(device, torch.float16, gate=gate, N=70, P=64), ["prefix_gate"])
    ((name, given),) = [launch for launch in launched if "dgate" in launch[1]]
    assert name == kernel
    assert given["dgate"].pointer.data_ptr() == gradients["prefix_gate"].data_ptr()


def test_a_gate_of_queries_may_be_wider_than_the_store(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of the grid must be those of the kernel, even if a shorter prefix needs smaller ones."""
    launched = record_launches(monkeypatch)
    x = make(device, spans="own", B=3, P=3, Hq=2, gate="11NP")
    x["prefix_gate"] = torch.randn(1, 2, 37, 150, device=device)
    assert_parity(fastprefix.prefix_attention, x, options={"backend": "triton"}, draws=1)
    given = next(given for name, given in launched if name == "bwd_dgate")
    blocks = -(-37 // given["T"].BM) * -(-150 // given["T"].BP)
    assert given["grid"][0] == 2 * blocks


def test_the_gradient_of_a_gate_has_its_layout(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record_launches(monkeypatch)
    x = make(device, torch.float16, gate="BHNP")
    x["prefix_gate"] = x["prefix_gate"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_parity(fastprefix.prefix_attention, x, options={"backend": "triton"}, draws=2)
    dtypes = [given["dgate"].pointer.dtype for name, given in launched if name == "bwd_dq"]
    assert dtypes
    assert set(dtypes) == {torch.float16}


def test_frozen_keys_cost_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record_launches(monkeypatch)
    x = make(device, B=1, N=5, M=5, P=70)

    def find_blocks(frozen: int, **more: Any) -> list[int]:
        """Return the blocks of keys of each launch over the prefix."""
        launched.clear()
        _, gradients = run(triton_backend, x | {"frozen_prefix": frozen} | more)
        for name in ("prefix_key", "prefix_value"):
            assert not gradients[name][:, :frozen].any()
        return [given["grid"][0] // 2 for name, given in launched if name == "bwd_dprefix"]

    assert find_blocks(0) == [3]
    assert find_blocks(1) == [3]
    assert find_blocks(6) == [2]
    assert find_blocks(70) == []
    assert find_blocks(40, prefix_key_bias=torch.zeros(70, device=device)) == [1, 2]  # biases of all keys


def test_keys_are_not_multiplied_for_the_gradient_of_values(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record_launches(monkeypatch)
    case = make_case(N=20, M=33, gate="BhP", output_gate="BH", key_bias="hP")
    assert_close(case, torch.float32, device, ["prefix_value"])
    names = [name for name, _ in launched]
    assert "bwd_dq" not in names
    assert not any(given["TOKENS"] or given["PREFIX"] for name, given in launched if name == "bwd_delta")
    assert all(given["dpk"].pointer is None for name, given in launched if name == "bwd_dprefix")


class Recorder:
    """A device with any number of processors that runs nothing."""

    architecture, split_from = "sm_90", 256

    def __init__(self, processors: int) -> None:
        self.processors = processors
        self.bytes = dict.fromkeys(("prefix", "gate"), 0)  # of gradients and their parts

    def launch(self, kernel: Any, grid: Any, arguments: Any, constants: Any, tile: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        if kernel.__name__ == "prefix_attention_bwd_dprefix_kernel":
            tensors = (given["dpk"].pointer, given["dpv"].pointer, given["p_dbias"])
            self.bytes["prefix"] = sum(x.untyped_storage().nbytes() for x in tensors)
        elif given.get("dgate") is not None and given["dgate"].pointer is not None:
            self.bytes["gate"] = given["dgate"].pointer.untyped_storage().nbytes()


def record_backward(case: AttentionCase, wanted: Sequence[str], processors: int) -> dict[str, int]:
    """Return the bytes of gradients and their parts in a backward pass on tensors without memory."""
    from fastprefix.ops.prefix_attention.triton_backend import launch

    inputs = case.build(torch.bfloat16, "meta")
    a = canonical_arguments(**inputs.tensors, **inputs.options)
    target = Recorder(processors)
    output = torch.empty_like(a.query)
    normalizers = torch.empty(a.normalizers_shape, device="meta")
    launch.backward(output, output, normalizers, [name in wanted for name in DIFFERENTIABLE], *a, target=target)
    return target.bytes


@pytest.mark.parametrize("N", [100, 8192])
@pytest.mark.parametrize("gate", ["B1NP", "1HNP", "11NP", "B1N1", "11N1", "BHNP"])
def test_gradients_of_gates_take_little_memory(gate: str, N: int) -> None:
    """A float32 per row, head, query and key would be 4 GB in the larger calls."""
    from fastprefix.ops.prefix_attention.triton_backend import launch

    case = make_case(B=2, Hq=32, Hkv=8, N=N, M=N, P=2048, D=128, Dv=128, gate=gate)
    own = 2 * case.build(torch.bfloat16, "meta").tensors["prefix_gate"].numel()
    assert 0 < record_backward(case, ["prefix_gate"], 132)["gate"] <= max(own, launch._MOST_BYTES)


@pytest.mark.parametrize("P", [16, 512, 2048, 8192, 65536])
@pytest.mark.parametrize("processors", [4, 132, 10_000])
@pytest.mark.parametrize("spans", [None, "own"])
def test_partial_sums_of_the_prefix_are_bounded(processors: int, P: int, spans: Any) -> None:
    from fastprefix.ops.prefix_attention.triton_backend import launch, tiles

    case = make_case(
        B=8, Hq=32, Hkv=8, N=8192, M=8192, P=P, D=128, Dv=128, spans=spans, key_bias="hT" if spans else "hP"
    )
    taken = record_backward(case, ["prefix_key", "prefix_value", "prefix_key_bias"], processors)["prefix"]
    BP = tiles.find_tile("sm_90", "dprefix", 128, torch.bfloat16).BP
    once = 4 * 8 * (case.store if spans else P) * (128 + 128 + 1)
    assert 0 < taken <= max(once, min(launch._MOST_BYTES, 2 * processors * BP * 4 * (128 + 128 + 1)))


def test_spans_twice_the_same_bits(device: str) -> None:
    for more in ({"N": 19}, {"N": 2}):
        x = make(device, B=3, Hq=2, M=17, P=40, spans="ragged", gate="BhP", key_bias="hT", output_gate="BH", **more)
        first, second = (run(triton_backend, x) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("N", [1, 20])
def test_what_other_rows_see_of_the_store_does_not_matter(device: str, N: int) -> None:
    x = make(device, B=3, Hq=2, N=N, M=70, P=30, spans="own", gate="BhP", key_bias="hT")
    wanted = ["query", "key", "value", "prefix_gate"]
    output, gradients = run(triton_backend, x, wanted)
    for name in ("prefix_key", "prefix_value", "prefix_key_bias"):
        x[name] = x[name].clone()
        x[name].narrow(1, 30, 30).fill_(float("nan"))  # what the row in the middle sees
    changed, changed_gradients = run(triton_backend, x, wanted)
    rows = [0, 2]
    assert torch.equal(output[rows], changed[rows])
    assert changed[1].isnan().all()
    assert all(torch.equal(gradients[name][rows], changed_gradients[name][rows]) for name in wanted)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_spans_in_any_layout(device: str, dtype: torch.dtype) -> None:
    x = make(device, B=3, Hq=2, N=20, M=20, P=30, spans="ragged", key_bias="hT")
    output, gradients = run(triton_backend, x)
    x["prefix_spans"] = x["prefix_spans"].to(dtype).mT.contiguous().mT
    again, gradients_again = run(triton_backend, x)
    assert torch.equal(output, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    x["prefix_spans"] = x["prefix_spans"][:1].expand(3, 2)
    assert_parity(fastprefix.prefix_attention, x, options={"backend": "triton"}, draws=2)


def test_spans_beyond_the_store(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREFIX_CHECK_IDS", "1")
    x = make(device, B=2, spans=((0, 5), (2, 4)))
    x["prefix_spans"] = x["prefix_spans"] + 3
    with pytest.raises(ValueError, match="prefix_spans"):
        triton_backend(**x)


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
    """Set with PyTorch's newer switch, after which the older one cannot be read."""
    launched = record_launches(monkeypatch)
    x = make(device, dtype, N=20, M=20, B=1)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        triton_backend(**x)
    finally:
        matmul.fp32_precision = before
    assert {given["T"].PRECISION for _, given in launched} == {used}


def test_compiles_whole(device: str) -> None:
    x = make(device, N=5, M=6, P=3, gate="P")
    compiled = torch.compile(triton_backend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x), triton_backend(**x))


@pytest.mark.parametrize(
    ("change", "match"),
    [({"dtype": torch.float64}, "not torch.float64"), ({"D": 264}, "head dimensions up to 256")],
)
def test_says_what_it_does_not_take(device: str, change: dict[str, Any], match: str) -> None:
    x = torch.zeros(1, 1, 1, change.get("D", 16), dtype=change.get("dtype", torch.float32), device=device)
    with pytest.raises(ValueError, match=match):
        triton_backend(query=x, key=x, value=x, prefix_key=x[0], prefix_value=x[0])
    assert fastprefix.prefix_attention(x, x, x, x[0], x[0]).shape == x.shape
