"""Test the sdpa backend against the float64 reference, and the calls for which it is chosen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix.ops.backends import BACKENDS, choose
from fastprefix.ops.prefix_attention import cpu, sdpa
from fastprefix.ops.prefix_attention.registration import OPERATION
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase, attention_cases, make_attention_case, measure


def refusal(case: AttentionCase) -> str | None:
    inputs = case.build(torch.float32)
    return sdpa.refusal(canonical_arguments(**inputs.tensors, **inputs.options))


WITHOUT: dict[str, Any] = {
    **{"bias": None, "key_bias": None, "spans": None, "sinks": False, "level": 0.0},
    **{"softcap": None, "dropout_p": 0.0},
}
CASES = [case for case in attention_cases(132, fixed=WITHOUT) if case.scores < 100_000 and refusal(case) is None]
MORE: dict[str, dict[str, Any]] = {
    "causal, gate of keys": {"gate": "BhP", "P": 40, "Hq": 4, "N": 37, "M": 37, "D": 24, "is_causal": True},
    "output gate, causal": {"output_gate": "BH", "gate": "P", "N": 9, "M": 9, "is_causal": True},
    "output gate, cross": {"output_gate": "1H", "N": 9, "M": 4, "prefix_a_row": True},
    "frozen": {"gate": "B1P", "P": 9, "frozen": 4, "Hq": 4},
    "padding, [B, N, H, D]": {"mask": "padding", "layout": "BNHD", "N": 20, "M": 20, "Hq": 4, "is_causal": True},
    "float mask": {"mask": "float BHNM", "N": 6, "M": 20, "is_causal": True, "window_size": 3},
    "segments": {"segments": True, "N": 20, "M": 20, "layout": "strided"},
    "plain attention": {"P": None, "N": 20, "M": 20, "is_causal": True},
    "plain attention, negative scale": {"P": None, "N": 20, "M": 20, "is_causal": True, "scale": -0.3},
    "plain attention, scale of 0": {"P": None, "N": 20, "M": 20, "is_causal": True, "scale": 0.0},
    "output gate, negative scale": {"output_gate": "BH", "N": 9, "M": 9, "is_causal": True, "scale": -0.3},
    "more queries than keys": {"N": 50, "M": 3, "P": 40, "scale": 0.3, "is_causal": True},
    "other values": {"Dv": 12, "N": 20, "M": 11, "Hq": 6},
}


@pytest.fixture
def _without_flash() -> Iterator[None]:
    """Use PyTorch's other kernel. In float32, gradients of its flash kernel can have several times as large errors."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MORE)
def test_parity_in_16_bits(name: str, dtype: torch.dtype) -> None:
    report = measure(make_attention_case(**MORE[name]), dtype, "sdpa", "cpu")
    assert report.ok, f"\n{report}"


@pytest.mark.usefixtures("_without_flash")
@pytest.mark.parametrize("case", [*(make_attention_case(**named) for named in MORE.values()), *CASES], ids=str)
def test_parity_in_float32(case: AttentionCase) -> None:
    report = measure(case, torch.float32, "sdpa", "cpu")
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("name", MORE)
def test_flash_agrees(name: str) -> None:
    inputs = make_attention_case(**MORE[name]).build(torch.float64)
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]
    found, wanted = (
        fastprefix.prefix_attention(**inputs.tensors, **inputs.options, backend=of) for of in ("sdpa", "eager")
    )
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad(x.square().sum(), leaves, allow_unused=True) for x in (found, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"softcap": 2.0}, "`softcap`"),
        ({"dropout_p": 0.1}, "`dropout_p`"),
        ({"sinks": True}, "`sinks`"),
        ({"spans": "ragged", "B": 4}, "`prefix_spans`"),
        ({"bias": "BHNP"}, "`prefix_bias`"),
        ({"key_bias": "hP"}, "`prefix_key_bias`"),
        ({"gate": "BHNP"}, "gates of pairs"),
        ({"output_gate": "BH", "mask": "padding"}, "every query sees a key"),
        ({"P": None, "window_size": 3}, "every query sees a key"),
        ({"P": None, "N": 9, "M": 4, "is_causal": True}, "every query sees a key"),
        ({"B": 0}, "at least one row"),
        ({"M": 0, "output_gate": "BH"}, "one key in each softmax"),
    ],
)
def test_other_calls_are_refused(named: dict[str, Any], reason: str) -> None:
    inputs = make_attention_case(**named).build(torch.float32)
    with pytest.raises(ValueError, match=f"backend 'sdpa' is not usable here: .*{reason}"):
        fastprefix.prefix_attention(**inputs.tensors, **inputs.options, backend="sdpa")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_under_autocast(dynamic: bool) -> None:
    inputs = make_attention_case(N=9, M=9, gate="P", is_causal=True).build(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]

    def call(**tensors: Any) -> torch.Tensor:
        return fastprefix.prefix_attention(**tensors, **inputs.options, backend="sdpa")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, wanted = (torch.autograd.grad(of(**inputs.tensors).sum(), leaves) for of in (compiled, call))
    torch.testing.assert_close(found, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(**inputs.tensors).dtype is torch.bfloat16


def test_an_empty_prefix_gets_a_gradient() -> None:
    inputs = make_attention_case(P=0).build(torch.float32)
    prefix = inputs.tensors["prefix_key"].requires_grad_()
    fastprefix.prefix_attention(**inputs.tensors, backend="sdpa").sum().backward()
    assert prefix.grad is not None
    assert prefix.grad.shape == prefix.shape


def test_derivatives_of_higher_order_exist() -> None:
    inputs = make_attention_case(N=4, M=4, gate="P").build(torch.float64)
    leaves = tuple(x.requires_grad_() for x in inputs.tensors.values())

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(inputs.tensors, tensors, strict=True))
        return fastprefix.prefix_attention(**named, **inputs.options, backend="sdpa")

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(call, leaves)


def test_no_scores_are_stored() -> None:
    q, k, v = (torch.randn(1, 2, 1024, 8) for _ in range(3))
    prefix = torch.randn(2, 2, 5, 8)
    with torch.profiler.profile(profile_memory=True) as profiler:
        fastprefix.prefix_attention(q, k, v, *prefix, backend="sdpa")
    largest = max(event.cpu_memory_usage for event in profiler.events() or [])
    assert largest < 2 * 1024 * 1029


@pytest.mark.parametrize(
    ("named", "dtype", "trains", "chosen"),
    [
        ({"N": 20, "M": 20}, torch.float32, True, "sdpa"),
        ({"N": 20, "M": 20, "is_causal": True}, torch.float32, True, "cpu"),
        ({"N": 20, "M": 20, "D": 72, "is_causal": True}, torch.float32, True, "sdpa"),
        ({"N": 20, "M": 20}, torch.bfloat16, True, "cpu"),
        ({"N": 20, "M": 20}, torch.bfloat16, False, "sdpa"),
        ({"N": 1, "M": 20}, torch.float32, False, "cpu"),
        ({"N": 20, "M": 20, "softcap": 2.0}, torch.float32, True, "cpu"),
    ],
)
def test_choice_without_avx2(
    named: dict[str, Any], dtype: torch.dtype, trains: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", BACKENDS["eager"].__class__("cpu", ("cpu",), lambda device: None))
    refusals = {**OPERATION.refusals, "cpu": lambda arguments: None}
    inputs = make_attention_case(**named).build(dtype)
    tensors = {name: x.requires_grad_(trains) for name, x in inputs.tensors.items()}
    a = canonical_arguments(**tensors, **inputs.options)
    assert choose(None, torch.device("cpu"), refusals, a, preferences={"cpu": cpu.is_preferred}) == chosen
    assert choose(None, torch.device("cpu"), refusals, a) == "cpu"
