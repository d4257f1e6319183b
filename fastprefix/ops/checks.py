"""Check arguments of the operations. Every message names the argument, what it must be and what it got.

These checks never read a tensor's values, so they do not synchronize with a device and they trace under
``torch.compile``.
"""

import os
import reprlib
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Size = int | torch.SymInt

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """Describe the value of an argument for an error message.

    A tensor is described by its dtype, shape and device, another array by its type and shape, and a module by its type.
    Any other value is described by its type and its repr, which is shortened if it is long.
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


def wrong_type(name: str, value: object, requirement: str) -> TypeError:
    return TypeError(f"`{name}` must be {requirement}, got {describe(value)}")


def wrong_value(name: str, value: object, requirement: str) -> ValueError:
    return ValueError(f"`{name}` must be {requirement}, got {describe(value)}")


def check_tensor(name: str, value: object, requirement: str) -> None:
    """Raise unless ``value`` is a strided tensor."""
    if not isinstance(value, Tensor):
        raise wrong_type(name, value, requirement)
    if value.layout is not torch.strided:
        raise wrong_type(name, value, f"a strided tensor, not layout {value.layout}: {requirement}")


def check_tuple(name: str, value: object, length: int, requirement: str) -> None:
    """Raise unless ``value`` is a tuple or list of ``length`` entries."""
    if not isinstance(value, tuple | list):
        raise wrong_type(name, value, requirement)
    if len(value) != length:
        raise ValueError(f"`{name}` must be {requirement}, got {len(value)} entries")


def check_floating(name: str, value: Tensor, requirement: str) -> None:
    check_tensor(name, value, requirement)
    if value.dtype not in _FLOATING:
        raise wrong_type(name, value, f"{requirement}, float32, float64, bfloat16 or float16")


def check_integer(name: str, value: Tensor, requirement: str) -> None:
    check_tensor(name, value, requirement)
    if value.dtype not in (torch.int64, torch.int32):
        raise wrong_type(name, value, f"{requirement}, int64 or int32")


def has_shape(value: Tensor, expected: Sequence[Size | None]) -> bool:
    """Return whether the shape is ``expected``, where ``None`` matches any size."""
    if value.ndim != len(expected):
        return False
    for size, wanted in zip(value.shape, expected, strict=True):  # noqa: SIM110 (all() is twice as slow)
        if wanted is not None and size != wanted:
            return False
    return True


def check_shape(name: str, value: Tensor, expected: Sequence[Size | None], requirement: str) -> None:
    """Raise unless the shape is ``expected``, where ``None`` matches any size."""
    if not has_shape(value, expected):
        raise wrong_value(name, value, requirement)


def check_broadcastable(name: str, value: Tensor, full: Sequence[Size], requirement: str) -> None:
    """Raise unless ``value`` broadcasts to exactly the shape ``full``."""
    if value.ndim > len(full):
        raise wrong_value(name, value, requirement)
    for size, wanted in zip(reversed(value.shape), reversed(full), strict=False):
        if size != 1 and size != wanted:
            raise wrong_value(name, value, requirement)


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    if value.device != device:
        raise wrong_value(name, value, f"a tensor on the device of {of} ({device})")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast casts to on this device, or None if autocast is off."""
    if not torch._C._is_any_autocast_enabled():  # ten times as fast as the check for one device
        return None
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def apply_autocast(dtype: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a floating-point tensor after autocast. Float64 is not cast, as in PyTorch's autocast."""
    return dtype if cast is None or dtype is torch.float64 else cast


def check_dtype(name: str, value: Tensor, dtype: torch.dtype, of: str, cast: torch.dtype | None = None) -> None:
    if apply_autocast(value.dtype, cast) != apply_autocast(dtype, cast):
        raise wrong_type(name, value, f"a tensor with the dtype of {of} ({dtype})")


def needs_plain_operations() -> bool:
    """Return whether a call must consist of PyTorch's own operations.

    ONNX has no translation of this package's operators. They also have no rules for the transforms of ``torch.func``
    (``grad``, ``vmap``, ``jvp``) and no forward-mode derivative.
    """
    if torch._C._are_functorch_transforms_active() or torch.onnx.is_in_onnx_export():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def can_read_values(values: Tensor) -> bool:
    """Return whether the values of ids or spans can be checked.

    On a CPU they are checked, except in traces, ONNX exports and if ``vmap`` maps over them. On other devices reading
    them waits for the device, so they are checked only with ``FASTPREFIX_CHECK_IDS=1`` in the environment.
    """
    if values.device.type != "cpu" and os.environ.get("FASTPREFIX_CHECK_IDS") != "1":
        return False
    return not (torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or is_mapped(values))


def is_mapped(x: Tensor) -> bool:
    """Return whether ``vmap`` maps over a tensor, possibly outside of other transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise wrong_type(name, value, "True or False")


def check_number(name: str, value: object, requirement: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_type(name, value, requirement)


def check_probability(name: str, value: float) -> None:
    check_number(name, value, "a probability from 0 to 1")
    if not 0.0 <= value <= 1.0:
        raise wrong_value(name, value, "a probability from 0 to 1")
