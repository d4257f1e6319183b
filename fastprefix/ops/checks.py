"""Checks of arguments, shared by the operations: every message names the argument, what it got and what it takes.

Nothing here reads a tensor's values, so nothing synchronises with a device and everything traces under
``torch.compile``.
"""

import os
import reprlib
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

Size = int | torch.SymInt


def describe(value: object) -> str:
    """Say what an argument got: dtype, shape and device of a tensor, type and shape of another array, the type of a
    module, type and value, if need be shortened, of anything else.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, nn.Module):
        hint = ": pass its .weight" if isinstance(getattr(value, "weight", None), Tensor) else ""
        return f"a module, {kind.__name__}{hint}"
    if isinstance(shape := getattr(value, "shape", None), tuple):
        return f"{kind.__module__}.{kind.__name__} of shape {shape}"
    return f"{kind.__name__} {reprlib.repr(value)}"


def wrong_type(name: str, value: object, takes: str) -> TypeError:
    return TypeError(f"`{name}` must be {takes}, got {describe(value)}")


def wrong_value(name: str, value: object, takes: str) -> ValueError:
    return ValueError(f"`{name}` must be {takes}, got {describe(value)}")


def check_tensor(name: str, value: object, takes: str) -> None:
    """Raise unless ``value`` is a strided tensor."""
    if not isinstance(value, Tensor):
        raise wrong_type(name, value, takes)
    if value.layout is not torch.strided:
        raise wrong_type(name, value, f"a strided tensor, not layout {value.layout}: {takes}")


def check_floating(name: str, value: Tensor, takes: str) -> None:
    check_tensor(name, value, takes)
    if not value.is_floating_point():
        raise wrong_type(name, value, f"{takes}, floating point")


def check_integer(name: str, value: Tensor, takes: str) -> None:
    check_tensor(name, value, takes)
    if value.dtype not in (torch.int64, torch.int32):
        raise wrong_type(name, value, f"{takes}, int64 or int32")


def has_shape(value: Tensor, expected: Sequence[Size | None]) -> bool:
    """Return whether the shape is ``expected``; ``None`` stands for any size."""
    if value.ndim != len(expected):
        return False
    for size, wanted in zip(value.shape, expected, strict=True):  # noqa: SIM110 (all() takes twice the time)
        if wanted is not None and size != wanted:
            return False
    return True


def check_shape(name: str, value: Tensor, expected: Sequence[Size | None], takes: str) -> None:
    """Raise unless the shape is ``expected``; ``None`` stands for any size."""
    if not has_shape(value, expected):
        raise wrong_value(name, value, takes)


def check_broadcastable(name: str, value: Tensor, full: Sequence[Size], takes: str) -> None:
    """Raise unless ``value`` broadcasts to the shape ``full`` (and not beyond it)."""
    if value.ndim > len(full):
        raise wrong_value(name, value, takes)
    for size, wanted in zip(reversed(value.shape), reversed(full), strict=False):
        if size != 1 and size != wanted:
            raise wrong_value(name, value, takes)


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    if value.device != device:
        raise wrong_value(name, value, f"a tensor on the device of {of} ({device})")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast casts to on this device, or None where autocast is off."""
    if not torch._C._is_any_autocast_enabled():  # a tenth of the time that the question for one device takes
        return None
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def after_autocast(dtype: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a floating tensor after autocast, which like PyTorch's own leaves float64 alone."""
    return dtype if cast is None or dtype is torch.float64 else cast


def check_dtype(name: str, value: Tensor, dtype: torch.dtype, of: str, cast: torch.dtype | None = None) -> None:
    if after_autocast(value.dtype, cast) != after_autocast(dtype, cast):
        raise wrong_type(name, value, f"the dtype of {of} ({dtype})")


def can_read_values(device: torch.device) -> bool:
    """Return whether the values of ids and spans are checked: on a CPU always; elsewhere, where looking would wait for
    the device, only with ``FASTPREFIX_CHECK_IDS=1`` in the environment. A trace for ONNX cannot look at them.
    """
    if device.type != "cpu" and os.environ.get("FASTPREFIX_CHECK_IDS") != "1":
        return False
    return not torch.onnx.is_in_onnx_export()


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise wrong_type(name, value, "True or False")


def check_number(name: str, value: object, takes: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_type(name, value, takes)


def check_probability(name: str, value: float) -> None:
    check_number(name, value, "a probability from 0 to 1")
    if not 0.0 <= value <= 1.0:
        raise wrong_value(name, value, "a probability from 0 to 1")
