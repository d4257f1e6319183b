"""Test recordings of calls: their contents, when they are repeated, and that the results are those of the call."""

import ctypes
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix.ops import targets
from fastprefix.ops.replay import Replays, describe_layouts

TILE = SimpleNamespace(warps=4, stages=2)


class Kernel:
    """A kernel that doubles ``count`` float32 numbers at one address and stores them at another."""

    arg_names = ("pair", "count", "factor")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.function, self.packed_metadata = "function", "metadata"

    def run(self, *given: Any) -> None:
        self.launches.append(given)
        (source, target), count, factor = given[9:]
        numbers, results = ((ctypes.c_float * count).from_address(at) for at in (source, target))
        for i, number in enumerate(numbers):
            results[i] = factor * number


class Device(targets.Device):
    """A device that launches ``Kernel``."""

    architecture, processors, split_from = "sm_90", 4, 64

    def __init__(self) -> None:
        self._device = torch.device("cpu")

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
    ) -> Any:
        pair, count = arguments
        addresses = tuple(x.data_ptr() for x in pair)
        kernel.run(*(*grid, 1, 1)[:3], 0, None, None, None, None, None, addresses, count, constants["factor"])
        return kernel


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 77)
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(targets, "_import_runtime", lambda: (SimpleNamespace(active=active), runtime))
    return Device()


def test_a_recording_computes_the_same(device: Device) -> None:
    kernel, replays = Kernel(), Replays()

    def call(target: targets.Target, x: Tensor, y: Tensor, absent: None) -> list[Tensor]:
        assert absent is None
        doubled = torch.empty_like(x)
        target.launch(kernel, (3, 2), ((x, doubled), x.numel()), {"factor": 2.0}, TILE)
        result = torch.empty(x.shape[0], dtype=torch.float64)
        result.copy_((doubled.transpose(0, 1) + y.view(torch.int32)).sum(0))
        result[1:].zero_()
        return [result, doubled]

    for number in range(5):
        x, y = torch.randn(2, 3), torch.randn(3, 2)
        result, doubled = replays.run("key", device, (x, y, None), call)
        assert torch.equal(doubled, 2 * x)
        expected = (2 * x.T + y.view(torch.int32)).sum(0).double()
        assert torch.equal(result, expected * torch.tensor([1.0, 0.0]))
        assert kernel.launches[-1][:4] == (3, 2, 1, 0 if number < 2 else 77)
    assert len(kernel.launches) == 5


def test_a_recording_frees_what_it_no_longer_needs(device: Device) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = function(*args, **(kwargs or {}))
            alive.append(weakref.ref(result))
            most = max(most, sum(of() is not None for of in alive))
            return result

    def call(target: targets.Target, x: Tensor) -> Tensor:
        for _ in range(9):
            x = x + 1
        return x

    replays, x = Replays(), torch.zeros(3)
    for _ in range(3):
        alive.clear()
        most = 0
        with Counter():
            result = replays.run("key", device, (x,), call)
        assert torch.equal(result, x + 9)
    assert most == 2


def test_tensors_that_were_the_same_may_differ(device: Device) -> None:
    replays = Replays()
    x = torch.randn(3)
    for y in (x, x, torch.randn(3)):
        assert torch.equal(replays.run("key", device, (x, y), lambda target, x, y: (x - y,))[0], x - y)


@pytest.mark.parametrize("reason", ["two results", "a foreign tensor", "nothing compiled", "hooks"])
def test_calls_that_are_not_recorded(device: Device, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, foreign, replays = [], torch.randn(3), Replays()
    if reason == "hooks":
        monkeypatch.setattr(device, "can_replay", lambda: False)

    def call(target: targets.Target, x: Tensor) -> Tensor:
        calls.append(x)
        if reason == "two results":
            return x.sort()[0]
        if reason == "nothing compiled":
            monkeypatch.setattr(device, "launch", lambda *_: None)
            target.launch(Kernel(), (1,), (), {}, TILE)
        return x + foreign if reason == "a foreign tensor" else x.clone()

    for _ in range(4):
        replays.run("key", device, (foreign,), call)
    assert len(calls) == 4


def test_recordings_are_forgotten_when_there_are_too_many(device: Device) -> None:
    calls, replays = [], Replays(most=2)

    def call(target: targets.Target, x: Tensor) -> Tensor:
        calls.append(x)
        return x.clone()

    for key in (1, 1, 1, 2, 2, 2, 3, 1, 1, 1):
        replays.run(key, device, (torch.zeros(1),), call)
    assert len(calls) == 2 + 2 + 1 + 2


def test_layouts_include_alignment() -> None:
    x = torch.randn(8, 4)
    assert describe_layouts((x, None)) == describe_layouts((x.clone(), None))
    different = (x[1:], x.T, x.double(), x.flatten()[1:29].view(7, 4))
    assert len({describe_layouts((of,)) for of in (x, *different)}) == 5
