"""Whole models in float64: transformers' norms, rotary positions and routers round to float32 of their own accord."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """In this context nothing in float64 is rounded to float32, and nothing starts in float32."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            return args[0] if args[0].dtype is torch.float64 else args[0].double()
        widened = {name: self._widen(value) for name, value in (kwargs or {}).items()}
        return function(*map(self._widen, args), **widened)

    def _widen(self, value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value
