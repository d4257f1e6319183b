"""The backends, in one table: which there are, where each runs, and, where one is not usable, why.

An operation registers its operators once for every backend that has an implementation of it (see ``registration``);
``choose`` picks the one to call. A backend that was named is used or refused, never replaced.
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
    """A way to run the operations: its name, the device types it runs on, and why not on a device (None: it does)."""

    name: str
    devices: tuple[str, ...] | None  # None: all
    reason_unusable: Callable[[torch.device], str | None]
    interpretable: bool = False  # with TRITON_INTERPRET=1 it runs on the CPU too, if it is named
    partial: bool = False  # it is made for some kinds of calls, and refuses all others

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
        return f"it needs a device of compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("composed", ("cuda",), _no_triton, interpretable=True, partial=True),
        Backend("triton", ("cuda",), _no_triton, interpretable=True),
        Backend("cpu", ("cpu",), _no_libraries),
        Backend("eager", None, _always),
    )
}
"""In order of preference: ``backend=None`` takes the first that is usable."""


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

    ``refusals``: for each backend that has the operation, a function that explains why it cannot serve ``arguments``.
    ``eager_only``: why this call is served by the eager backend alone, if it is. ``preferences``: for some backends, a
    function that says whether they are worth taking for ``arguments`` if none was named.

    Raises ``TypeError`` for a name that is no string, ``ValueError`` for a backend that is unknown or not usable.
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
        reason = "it does not have this operation"
    if reason is None and name != "eager":
        reason = eager_only or refusals[name](arguments)
    if reason is not None:
        raise ValueError(f"backend {name!r} is not usable here: {reason}")
    return name
