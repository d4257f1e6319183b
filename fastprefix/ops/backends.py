"""The table of backends, with the devices each one runs on and the reasons that make it unusable.

An operation registers its operators once for every backend that implements it (see ``registration``). ``choose`` picks
the backend to call. A backend chosen by name is used or raises an error. It is never replaced.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import _native
from .._once import once
from . import checks


@dataclass(frozen=True)
class Backend:
    """A way to run the operations."""

    name: str
    devices: tuple[str, ...] | None  # the device types it runs on; None: all
    reason_unusable: Callable[[torch.device], str | None]  # why it cannot run on a device, or None if it can
    interpretable: bool = False  # with TRITON_INTERPRET=1 it also runs on the CPU, if it is chosen by name
    partial: bool = False  # it supports only some kinds of calls and refuses the rest

    def refusal(self, device: torch.device) -> str | None:
        """Return why this backend cannot run on ``device``, or None if it can."""
        if self.interpretable and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if self.devices is not None and device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)} tensors, not on {device.type} tensors"
        return self.reason_unusable(device)


def _always(device: torch.device) -> str | None:
    return None


def _no_libraries(device: torch.device) -> str | None:
    return _native.load()


@once
def _no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.version.hip is not None:
        return "its kernels are for CUDA, and this PyTorch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it requires a device of compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("composed", ("cuda",), _no_triton, interpretable=True, partial=True),
        Backend("triton", ("cuda",), _no_triton, interpretable=True),
        Backend("cpu", ("cpu",), _no_libraries),
        Backend("sdpa", None, _always, partial=True),
        Backend("eager", None, _always),
    )
}
"""The backends in order. ``backend=None`` selects the first usable one that supports and prefers the call."""


_NONE: Mapping[str, Callable[[Any], bool]] = {}


def _list_backends() -> str:
    return "None or one of " + ", ".join(repr(known) for known in BACKENDS)


def choose(
    name: str | None,
    device: torch.device,
    refusals: Mapping[str, Callable[[Any], str | None]],
    arguments: Any = None,
    eager_only: str | None = None,
    preferences: Mapping[str, Callable[[Any], bool]] = _NONE,
) -> str:
    """Return the name of the backend to call on ``device``.

    ``refusals`` maps each backend that implements the operation to a function that explains why it does not support
    ``arguments``. ``eager_only`` is the reason why only the eager backend supports this call, or None. ``preferences``
    maps some backends to a function that returns whether to select them for ``arguments`` when ``name`` is None.

    Raises ``TypeError`` if ``name`` is not a string, ``ValueError`` if the backend is unknown or not usable.
    """
    if name is None:
        if eager_only is not None:
            return "eager"
        for backend in BACKENDS.values():
            refusal = refusals.get(backend.name)
            if refusal is None or (backend.interpretable and device.type == "cpu"):
                continue
            if backend.name in preferences and not preferences[backend.name](arguments):
                continue
            if backend.refusal(device) is None and refusal(arguments) is None:
                return backend.name
    if not isinstance(name, str):
        raise checks.wrong_type("backend", name, _list_backends())
    if name not in BACKENDS:
        raise checks.wrong_value("backend", name, _list_backends())
    reason = BACKENDS[name].refusal(device)
    if reason is None and name not in refusals:
        reason = "it does not implement this operation"
    if reason is None and name != "eager":
        reason = eager_only or refusals[name](arguments)
    if reason is not None:
        raise ValueError(f"backend {name!r} is not usable here: {reason}")
    return name
