"""Registration of an operation's operators with PyTorch: schema, fake, autograd, autocast, once for every backend.

An operation is a forward and a backward operator. Each backend is an overload of both (``prefix_attention.eager``), so
backends share every rule below, and one written in C++ registers its kernels under the same names.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

NAMESPACE = "fastprefix"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_AUTOCAST = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}

Kernel = Callable[..., Any]


class Operation:
    """The operators of one operation: ``<name>.<backend>`` and ``<name>_backward.<backend>``."""

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        backward_schema: str,
        fake: Kernel,
        backward_fake: Kernel,
        setup_context: Kernel,
        call_backward: Callable[[Any, Kernel, Sequence[Tensor | None]], tuple[Any, ...]],
        autocast: Callable[[tuple[Any, ...], torch.dtype], tuple[Any, ...]],
    ) -> None:
        """``call_backward(ctx, operator, grads)`` returns a gradient, or None, for every argument of the schema;
        ``autocast(arguments, dtype)`` returns the arguments, cast.
        """
        self.name = name
        self._schemas = (schema, backward_schema)
        self._fakes = (fake, backward_fake)
        self._setup_context = setup_context
        self._call_backward = call_backward
        self._autocast = autocast
        self._operators: dict[str, Kernel] = {}

    @property
    def implemented(self) -> tuple[str, ...]:
        """The backends that have this operation."""
        return tuple(self._operators)

    def operator(self, backend: str) -> Kernel:
        """The forward operator of a backend."""
        return self._operators[backend]

    def define(self, backend: str) -> None:
        """Declare the operators of a backend, with every rule but the kernels."""
        for name, schema, fake in zip((self.name, f"{self.name}_backward"), self._schemas, self._fakes, strict=True):
            _LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", fake, lib=_LIBRARY)
        forward, backward = self._overload(self.name, backend), self._overload(f"{self.name}_backward", backend)
        _LIBRARY.impl(f"{self.name}.{backend}", self._autograd_kernel(backend, forward, backward), "Autograd")
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}_backward.{backend}", self._double_backward, lib=_LIBRARY
        )
        for key, device_type in _AUTOCAST.items():
            _LIBRARY.impl(f"{self.name}.{backend}", self._autocast_kernel(forward, device_type), key)
        self._operators[backend] = forward

    def implement(
        self, backend: str, forward: Kernel, backward: Kernel, key: str = "CompositeExplicitAutograd"
    ) -> None:
        """Give a declared backend its kernels, written in Python, for one dispatch key."""
        _LIBRARY.impl(f"{self.name}.{backend}", forward, key)
        _LIBRARY.impl(f"{self.name}_backward.{backend}", backward, key)

    def _overload(self, name: str, backend: str) -> Kernel:
        operator: Kernel = getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)
        return operator

    def _autograd_kernel(self, name: str, forward: Kernel, backward: Kernel) -> Kernel:
        """What ``torch.library.register_autograd`` would make, less the time it takes in each call: for every argument
        it asks for the schema's list of all, to add defaults, of which these schemas have none.
        """

        def forward_and_save(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward(*arguments)
            self._setup_context(ctx, arguments, output)
            return output

        def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return self._call_backward(ctx, backward, grads)

        methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(differentiate)}
        function: Any = type(f"{self.name}_{name}", (torch.autograd.Function,), methods)

        def kernel(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
                return function.apply(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*arguments)

        return kernel

    def _autocast_kernel(self, operator: Kernel, device_type: str) -> Kernel:
        def kernel(*arguments: Any) -> Any:
            cast = self._autocast(arguments, torch.get_autocast_dtype(device_type))
            with torch.autocast(device_type, enabled=False):
                return operator(*cast)

        return kernel

    def _double_backward(self, ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"fastprefix.{self.name} has no second derivative: its backward pass cannot itself be differentiated "
            f"(create_graph=True). fastprefix.reference.{self.name} can."
        )
