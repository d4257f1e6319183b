"""Test the choice of a backend, and the agreement of schemas and arguments."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import fastprefix
from fastprefix.ops import backends
from fastprefix.ops.prefix_attention.arguments import AttentionArguments
from fastprefix.ops.prefix_attention.registration import OPERATION as ATTENTION
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.ops.prompt_embedding.arguments import EmbeddingArguments
from fastprefix.ops.prompt_embedding.registration import OPERATION as EMBEDDING
from fastprefix.parity import AttentionCase, EmbeddingCase

CASES = [AttentionCase(), EmbeddingCase()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operation.__name__)
def test_unknown_and_unusable_backends_are_refused(case, monkeypatch):
    tensors = case.build(torch.float32).tensors
    with pytest.raises(ValueError, match=r"^`backend` .*'eager'.*got str 'fastest'"):
        case.operation(**tensors, backend="fastest")
    with pytest.raises(TypeError, match=r"^`backend`"):
        case.operation(**tensors, backend=1)
    monkeypatch.setitem(
        backends.BACKENDS, "broken", backends.Backend("broken", None, lambda device: "it was not built")
    )
    with pytest.raises(ValueError, match="backend 'broken' is not usable here: it was not built"):
        case.operation(**tensors, backend="broken")
    monkeypatch.setitem(backends.BACKENDS, "cuda_only", backends.Backend("cuda_only", ("cuda",), lambda device: None))
    with pytest.raises(ValueError, match="it runs on cuda tensors, not on cpu"):
        case.operation(**tensors, backend="cuda_only")
    monkeypatch.setitem(backends.BACKENDS, "other", backends.Backend("other", None, lambda device: None))
    with pytest.raises(ValueError, match="does not implement this operation"):
        case.operation(**tensors, backend="other")


def test_triton_looks_at_the_device_of_the_inputs(monkeypatch):
    """One of two devices, the current one, is too old for the kernels."""
    capabilities = {None: (7, 5), torch.device("cuda", 0): (7, 5), torch.device("cuda", 1): (8, 0)}
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[device])
    monkeypatch.setattr(torch.version, "hip", None)
    refusal = backends._no_triton.__wrapped__
    assert "8.0 or newer, not 7.5" in refusal(torch.device("cuda", 0))
    assert refusal(torch.device("cuda", 1)) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in refusal(torch.device("cuda", 1))


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "meta", "privateuseone"])
def test_other_devices_run_pytorch_operations(device):
    a = canonical_arguments(**AttentionCase().build(torch.float32).tensors)
    assert backends.choose(None, torch.device(device), ATTENTION.refusals, a) == "sdpa"
    assert backends.choose(None, torch.device(device), ATTENTION.refusals, a._replace(softcap=1.0)) == "eager"
    assert backends.choose(None, torch.device(device), EMBEDDING.refusals) == "eager"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operation.__name__)
def test_operations_run_on_any_device(case):
    """Tensors on ``meta`` have no memory."""
    inputs = case.build(torch.float32)
    tensors = {name: x.to("meta").requires_grad_(x.is_floating_point()) for name, x in inputs.tensors.items()}
    options = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.options.items()}
    output = case.operation(**tensors, **options)
    output.sum().backward()
    assert output.is_meta
    assert all(x.grad.is_meta for x in tensors.values() if x.requires_grad)


@pytest.mark.parametrize("name", ["attn_mask", "prefix_bias"])
def test_a_bias_with_a_gradient_is_served_by_eager_alone(name, monkeypatch):
    case = AttentionCase()
    tensors = case.build(torch.float32).tensors
    bias = torch.zeros(case.N, case.M if name == "attn_mask" else case.P, requires_grad=True)
    fastprefix.prefix_attention(**tensors, **{name: bias}).sum().backward()
    assert bias.grad is not None
    reason = f"{name} requires a gradient"
    assert backends.choose(None, torch.device("cpu"), {"eager": lambda a: None}, eager_only=reason) == "eager"
    for other in set(ATTENTION.implemented) - {"eager"}:
        usable = backends.Backend(other, None, lambda device: None)  # on any device, so that the argument is the reason
        monkeypatch.setitem(backends.BACKENDS, other, usable)
        with pytest.raises(ValueError, match=f"not usable here: {reason}"):
            fastprefix.prefix_attention(**tensors, **{name: bias}, backend=other)


def test_a_trained_bias_needs_eager_for_gradients_only():
    case = AttentionCase()
    tensors, bias = case.build(torch.float32).tensors, torch.zeros(case.N, case.M, requires_grad=True)
    with torch.no_grad():
        output = fastprefix.prefix_attention(**tensors, attn_mask=bias, backend="sdpa")
    torch.testing.assert_close(output, fastprefix.prefix_attention(**tensors))


ARGUMENTS = {"prefix_attention": AttentionArguments, "prompt_embedding": EmbeddingArguments}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_schemas_follow_from_the_declaration(name):
    fields = ARGUMENTS[name]._fields
    schema = getattr(torch.ops.fastprefix, name).eager._schema
    assert tuple(argument.name for argument in schema.arguments) == fields
    backward = getattr(torch.ops.fastprefix, f"{name}_backward").eager._schema
    assert tuple(argument.name for argument in backward.arguments)[-len(fields) :] == fields


@pytest.mark.parametrize("name", ARGUMENTS)
def test_cpp_declares_the_same_arguments(name):
    """The dispatcher compares types, not names."""
    header = Path(__file__).parents[2] / "csrc" / name / "arguments.h"
    if not header.exists():
        pytest.skip("no sources")
    macros = re.findall(r"#define FASTPREFIX_\w+_(\w+)\(X, SEPARATOR\)((?:.*\\\n)+.*)", header.read_text())
    lists = {macro: re.findall(r"X\([\w:<>]+, (\w+)\)|(DIFFERENTIABLE)", body) for macro, body in macros}
    differentiable = [name for name, _ in lists["DIFFERENTIABLE"]]
    names = []
    for argument, nested in lists["ARGUMENTS"]:
        names += differentiable if nested else [argument]
    assert tuple(names) == ARGUMENTS[name]._fields


@pytest.mark.parametrize("name", ["prefix_attention", "prompt_embedding"])
def test_the_reference_takes_the_same_arguments_less_the_backend(name):
    public = dict(inspect.signature(getattr(fastprefix, name)).parameters)
    del public["backend"]
    assert dict(inspect.signature(getattr(fastprefix.reference, name)).parameters) == public
