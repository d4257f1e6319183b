"""The composed backend: flash attention for the tokens, Triton for the prefix, against the float64 reference.

On the CPU, PyTorch's flash attention for CPUs has the place of that for GPUs.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastprefix
from fastprefix.ops import backends
from fastprefix.ops.prefix_attention import composed_backend
from fastprefix.ops.prefix_attention.arguments import AttentionArguments
from fastprefix.ops.prefix_attention.composed_backend import flash
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import make_attention_case, measure

CASES: dict[str, dict[str, Any]] = {
    "causal, gate of keys": {"gate": "BhP", "P": 40, "Hq": 4, "N": 37, "M": 37, "D": 24, "is_causal": True},
    "grouped heads, [B, N, H, D]": {"Hq": 4, "Hkv": 1, "N": 20, "M": 31, "P": 19, "gate": "P", "layout": "BNHD"},
    "more queries than keys": {"N": 50, "M": 3, "P": 40, "scale": 0.3},
    "one query": {"prefix_a_row": True, "bias": "BHNP", "N": 1, "M": 33, "P": 5, "layout": "strided"},
    "spans, gate of queries": {
        **{"spans": "ragged", "B": 4, "P": 40, "gate": "B1NP", "key_bias": "hT", "frozen": 3},
        **{"N": 20, "M": 20, "is_causal": True},
    },
    "large biases": {"bias": "BHNP", "level": 100.0, "key_bias": "hP"},
    "a hidden prefix": {"N": 20, "M": 20, "P": 5, "prefix_bias": torch.full((5,), float("-inf"))},
    "no prefix keys": {"P": 0, "N": 20, "M": 20, "is_causal": True},
    "plain attention": {"P": None, "N": 20, "M": 20},
}


def make(device: str, **named: Any) -> dict[str, Any]:
    inputs = make_attention_case(**{"N": 20, "M": 20, "D": 16} | named).build(find_dtype(device), device)
    return inputs.tensors | inputs.options


def find_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_parity(device: str, name: str) -> None:
    case = make_attention_case(**{"D": 16} | CASES[name])
    report = measure(case, find_dtype(device), "composed", device, draws=1)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("wanted", [("prefix_key",), ("query",), ("value", "prefix_gate"), ("prefix_key_bias",)])
def test_only_the_gradients_asked_for(device: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    differentiate = flash.differentiate

    def record(*arguments: Any) -> tuple[Tensor, ...]:
        called.append("tokens")
        return differentiate(*arguments)

    monkeypatch.setattr(flash, "differentiate", record)
    case = make_attention_case(N=20, M=20, D=16, gate="P", key_bias="P")
    report = measure(case, find_dtype(device), "composed", device, draws=1, grad=wanted)
    assert report.ok, f"\n{report}"
    assert bool(called) == bool({"query", "value"}.intersection(wanted))


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_operators_keep_pytorch_rules(device: str, layout: str) -> None:
    x = {name: value.requires_grad_() for name, value in make(device, N=5, M=5, gate="P", layout=layout).items()}
    arguments = tuple(canonical_arguments(**x, is_causal=True))
    torch.library.opcheck(torch.ops.fastprefix.prefix_attention.composed, arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"output_gate": "BH"}, "no output_gate"),
        ({"mask": "padding"}, "no attn_mask"),
        ({"segments": True}, "no segment_ids"),
        ({"sinks": True}, "no sinks"),
        ({"dropout_p": 0.1}, "no dropout_p"),
        ({"window_size": 3}, "no window_size"),
        ({"softcap": 3.0}, "no softcap"),
        ({"D": 12}, "multiples of 8, not 12"),
        ({"Dv": 8}, "Dv = 8"),
        ({"M": 0}, "rows, queries and keys"),
        ({"M": 21, "is_causal": True}, "not 20 and 21"),
        ({"D": 264}, "head sizes up to 256"),
    ],
)
def test_says_what_it_does_not_take(device: str, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fastprefix.prefix_attention(**make(device, **change), backend="composed")


def test_says_which_dtypes_it_takes(device: str) -> None:
    x = make(device)
    other = torch.float16 if device == "cpu" else torch.float32
    with pytest.raises(ValueError, match=f"not {other}"):
        fastprefix.prefix_attention(**{name: value.to(other) for name, value in x.items()}, backend="composed")


@pytest.mark.parametrize("is_causal", [False, True])
def test_calls_of_flash_attention_on_cuda(is_causal: bool) -> None:
    """Check the calls against PyTorch's own schemas and shapes, for tensors that a GPU would hold."""
    with FakeTensorMode():
        q, do = (torch.empty(2, 33, 8, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(2))
        k, v = (torch.empty(2, 2, 33, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        output, logsumexp = flash.attend(q, k, v, is_causal, 0.1)
        assert output.shape == q.shape
        assert (logsumexp.shape, logsumexp.dtype) == ((2, 8, 33), torch.float32)
        gradients = flash.differentiate(do, q, k, v, output, logsumexp, is_causal, 0.1)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_the_default_follows_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(N: int, **options: Any) -> AttentionArguments:
        x, prefix = (torch.empty(1, 2, length, 64, device="cuda", dtype=torch.bfloat16) for length in (N, 3))
        return canonical_arguments(x, x, x, prefix, prefix, **options)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        causal, shorter, full = call(100, is_causal=True), call(99, is_causal=True), call(100)
    assert [composed_backend.refusal(a) for a in (causal, shorter, full)] == [None] * 3
    is_preferred = composed_backend.is_preferred
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert not is_preferred(causal)
    monkeypatch.setitem(composed_backend.FEWEST_QUERIES, ("sm_90", True, 64), 100)
    assert [is_preferred(a) for a in (causal, shorter, full)] == [True, False, False]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not is_preferred(causal)


@pytest.mark.parametrize(("preferred", "chosen"), [(True, "first"), (False, "second")])
def test_a_backend_is_the_default_only_where_it_is_preferred(
    preferred: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = {name: backends.Backend(name, None, lambda device: None) for name in ("first", "second")}
    monkeypatch.setattr(backends, "BACKENDS", usable)
    refusals = dict.fromkeys(usable, lambda arguments: None)
    preferences = {"first": lambda arguments: preferred}
    assert backends.choose(None, torch.device("cpu"), refusals, preferences=preferences) == chosen
    assert backends.choose("first", torch.device("cpu"), refusals, preferences=preferences) == "first"
