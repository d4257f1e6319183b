"""Choose the target on which Triton kernels are launched: a CUDA device or Triton's interpreter."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .._once import once


class Target(Protocol):
    """The architecture, the number of multiprocessors and the launch functions of a device."""

    architecture: str  # a key of the tile tables
    processors: int  # multiprocessors to fill
    split_from: int  # the number of keys from which decoding splits them over programs

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
    ) -> Any:
        """Launch a kernel with the warps and stages of its tile, and return the compiled kernel, or None."""


class Device:
    """The CUDA device of the inputs, even if another one is current, or for a CPU device the interpreter."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.split_from = 256 if device.type == "cuda" else 64
        self.architecture, self.processors = find_architecture(device), 4
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
    ) -> Any:
        """Launch on the device's current stream."""
        here = torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
        with here:
            # ``kernel[grid]`` calls the same function through one more frame
            return kernel.run(*arguments, grid=grid, warmup=False, **constants, **compile_options(tile))

    def can_replay(self) -> bool:
        """Return whether kernels are compiled and Triton's hooks, e.g. those of a profiler, need not see launches."""
        if self.architecture == "interpreter":
            return False
        hooks = _import_runtime()[1]
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        return not (getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

    def replay(self, recorded: Callable[..., Any], tensors: Sequence[Tensor | None]) -> Any:
        """Launch on the device's current stream."""
        driver = _import_runtime()[0].active
        current = driver.get_current_device()
        index = self._device.index
        if index is None or index == current:
            return recorded(*tensors, driver.get_current_stream(current))
        with torch.cuda.device(self._device):
            return recorded(*tensors, driver.get_current_stream(index))


@functools.cache
def _import_runtime() -> tuple[Any, Any]:
    """Import Triton's driver and hooks."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def compile_options(tile: Any) -> dict[str, Any]:
    """Return Triton's options for compiling a kernel with a tile.

    Fused multiply-adds are an option, because Triton 3.9 warns that its next version leaves them out by default.
    """
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def divide_up(size: int, block: int) -> int:
    """Return the number of blocks that cover ``size``."""
    return -(-size // block)


@once
def find_architecture(device: torch.device) -> str:
    """Return the key of the tile tables for a device."""
    return name_architecture(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "interpreter"


def name_architecture(capability: tuple[int, int]) -> str:
    """Return the key of the tile tables for a compute capability.

    It is the newest architecture that is no newer than the device and needs no more shared memory than the device has.
    """
    if capability[0] == 12:  # 99 KB of shared memory per block, and the matrix instructions of sm_80
        return "sm_120"
    if capability[0] in (10, 11):
        return "sm_100"
    if capability[0] == 9:
        return "sm_90"
    if capability in ((8, 6), (8, 9)):  # 99 KB of shared memory per block
        return "sm_86"
    return "sm_80"


@functools.cache
def find_target(device: torch.device) -> Device:
    """Return the target for tensors on ``device``."""
    return Device(device)
