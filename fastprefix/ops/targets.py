"""The targets on which Triton kernels are launched: a CUDA device or Triton's interpreter."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Target(Protocol):
    """The architecture, the number of multiprocessors and the launch functions of a device."""

    architecture: str  # a key of the tile tables
    processors: int  # multiprocessors to fill
    split_from: int  # the number of keys from which decoding splits them over programs

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
    ) -> Any:
        """Launch a kernel with the warps and stages of its tile, and return the compiled kernel, or None."""

    def launch_again(self, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch a compiled kernel with arguments of the same kinds, followed by the constants."""


class Device:
    """The CUDA device of the inputs, even if another one is current, or for a CPU device the interpreter."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.split_from = 256 if device.type == "cuda" else 64
        if device.type == "cuda":
            self.architecture = architecture(torch.cuda.get_device_capability(device))
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        else:
            self.architecture, self.processors = "interpreter", 4

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
    ) -> Any:
        """Launch on the device's current stream."""
        here = torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
        with here:
            return kernel.run(
                *arguments, grid=grid, warmup=False, **constants, num_warps=tile.warps, num_stages=tile.stages
            )  # ``kernel[grid]`` calls the same function through one more frame

    def launch_again(self, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch on the device's current stream, as ``kernel.run`` does after it has found the compiled kernel."""
        index = self._device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self._run(compiled, grid, arguments, index)
        else:
            self._run(compiled, grid, arguments, index)

    def _run(self, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], index: int | None) -> None:
        driver, hooks = _import_runtime()
        active = driver.active
        stream = active.get_current_stream(active.get_current_device() if index is None else index)
        x, y, z = (*grid, 1, 1)[:3]
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        # A hook chain without calls is dropped here, so that it adds no time to the launch.
        enter = enter if getattr(enter, "calls", enter) else None
        leave = leave if getattr(leave, "calls", leave) else None
        metadata = None if enter is None else compiled.launch_metadata(grid, stream, *arguments)
        known = (compiled.function, compiled.packed_metadata)
        compiled.run(x, y, z, stream, *known, metadata, enter, leave, *arguments)


@functools.cache
def _import_runtime() -> tuple[Any, Any]:
    """Import Triton's driver and hooks. It is called only after a first launch."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def divide_up(size: int, block: int) -> int:
    """Return the number of blocks that cover ``size``."""
    return -(-size // block)


def architecture(capability: tuple[int, int]) -> str:
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
def target_of(device: torch.device) -> Device:
    """Return the target for tensors on ``device``."""
    return Device(device)
