"""Test calls without PyTorch's dispatcher, and calls that other code must observe."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix import prefix_attention
from fastprefix.ops import targets
from fastprefix.ops.prefix_attention import eager
from fastprefix.ops.prefix_attention.registration import OPERATION
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase

CASE = AttentionCase(gate="BhP", N=4, M=4)


class Mode(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A subclass of Tensor."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the passes that were called without the dispatcher, on the eager backend."""
    called: list[str] = []

    def record(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            called.append(name)
            return function(*arguments)

        return run

    passes = (record("forward", eager.forward), record("backward", eager.backward))
    operator = OPERATION._overload("prefix_attention_backward", "eager")
    direct = OPERATION._autograd_kernel("eager", *passes, operator)
    monkeypatch.setitem(OPERATION._direct, ("eager", "cpu"), direct)
    return called


def build(**changed: Any) -> dict[str, Any]:
    return {name: x.requires_grad_() for name, x in (CASE.build(torch.float32).tensors | changed).items()}


def test_a_call_that_nothing_looks_at(called: list[str]) -> None:
    x = build()
    output = prefix_attention(**x, backend="eager")
    gradients = torch.autograd.grad(output, list(x.values()), torch.ones_like(output))
    assert called == ["forward", "backward"]
    wanted = OPERATION.operator("eager")(*canonical_arguments(**x))[0]
    assert torch.equal(output, wanted)
    expected = torch.autograd.grad(wanted, list(x.values()), torch.ones_like(wanted))
    assert all(map(torch.equal, gradients, expected))
    with torch.no_grad():
        assert not prefix_attention(**x, backend="eager").requires_grad
    assert called == ["forward", "backward", "forward"]


@pytest.mark.parametrize(
    "context",
    [Mode, profile, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("cpu")],
    ids=["a mode", "a profiler", "autocast", "a mode of functions"],
)
def test_calls_that_something_looks_at(called: list[str], context: Callable[[], AbstractContextManager[Any]]) -> None:
    x = build()
    with context():
        output = prefix_attention(**x, backend="eager")
    assert not called
    output = prefix_attention(**x, backend="eager")
    with context() if context is not Mode else nullcontext():
        output.float().sum().backward()
    assert called[0] == "forward"


def test_tensors_that_are_not_plain(called: list[str]) -> None:
    numbers = torch.randn(2, 2, 4, 8, dtype=torch.complex64)
    negative = numbers.conj().imag
    assert negative.is_neg()
    output = prefix_attention(**build(query=negative.detach()), backend="eager")
    torch.testing.assert_close(output, prefix_attention(**build(query=-numbers.imag.clone()), backend="eager"))
    assert called == ["forward"]
    prefix_attention(**build(query=torch.randn(2, 2, 4, 8).as_subclass(Subclass)), backend="eager")
    assert called == ["forward"]


def test_a_gradient_that_is_not_plain(called: list[str]) -> None:
    x = build()
    output = prefix_attention(**x, backend="eager")
    numbers = torch.randn(*output.shape, dtype=torch.complex64)
    found, wanted = (
        torch.autograd.grad(output, x["query"], of, retain_graph=True)[0]
        for of in (numbers.conj().imag, -numbers.imag.clone())
    )
    torch.testing.assert_close(found, wanted)
    assert called == ["forward", "backward"]


def test_no_second_derivative(called: list[str]) -> None:
    x = build()
    output = prefix_attention(**x, backend="eager")
    (gradient,) = torch.autograd.grad(output.square().sum(), x["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("hooks", [[], ["a hook"]])
def test_hooks_of_launches(hooks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording does not call hooks, so it is not repeated while hooks exist."""
    chain = SimpleNamespace(calls=hooks)
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 10 * device)
    runtime = SimpleNamespace(launch_enter_hook=chain, launch_exit_hook=None)
    monkeypatch.setattr(targets, "_import_runtime", lambda: (SimpleNamespace(active=active), runtime))
    device = targets.Device(torch.device("cpu"))
    assert not device.can_replay()  # the interpreter
    device.architecture = "sm_90"
    assert device.can_replay() is not bool(hooks)
    assert device.replay(lambda *given: given, ("x", "y")) == ("x", "y", 30)
