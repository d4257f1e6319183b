"""Register an operation's operators with PyTorch: schema, fake, autograd, autocast, once for every backend.

An operation is a forward and a backward operator. Each backend is an overload of both (``prefix_attention.eager``), so
backends share every rule below, and one written in C++ registers its kernels under the same names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .declaration import Declaration

NAMESPACE = "fastprefix"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_PLAIN = (Tensor, nn.Parameter)
_AUTOCAST = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}

Kernel = Callable[..., Any]
Refusal = Callable[[Any], str | None]
"""A function of the canonical arguments that explains why a backend cannot serve them; None: it can."""
Preference = Callable[[Any], bool]
"""A function of the canonical arguments that says whether a backend is worth taking where none was named.

It is asked before the backend's refusal.
"""


def is_observed(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether anything but autograd has to see a call of an operator with these tensors.

    This may be a mode, autocast, a transform of functions, a trace, a profiler, or a tensor that is not a plain one.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._get_tracing_state() is not None or torch._C._autograd._profiler_enabled():
        return True
    for x in tensors:  # noqa: SIM110 (any() takes twice the time)
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return True
    return False


class Operation:
    """The operators of one operation: ``<name>.<backend>`` and ``<name>_backward.<backend>``.

    All of them take the declared arguments, in their order. Before these the backward operator takes the gradient of
    the output, the outputs that are saved for it, and which gradients are asked for; it returns those.
    """

    def __init__(
        self,
        name: str,
        declaration: Declaration,
        *,
        saved: Sequence[str] = (),
        fake: Kernel,
        allocate_gradient: Callable[[Tensor], Tensor],
        autocast: Callable[[tuple[Any, ...], torch.dtype], tuple[Any, ...]],
    ) -> None:
        """Derive the rules. ``saved`` names the forward operator's outputs where more than one is kept for the backward
        pass; ``autocast(arguments, dtype)`` returns the arguments, cast.
        """
        self.name = name
        self._declaration = declaration
        self._saved = len(saved)
        outputs = ", ".join(f"Tensor {output}" for output in saved)
        returned, kept = (f"({outputs})", f"{outputs}, ") if saved else ("Tensor", "")
        self._schemas = (
            f"({declaration.schema}) -> {returned}",
            f"(Tensor grad_output, {kept}bool[] needs_grad, {declaration.schema}) -> Tensor[]",
        )
        self._fakes = (fake, self._backward_fake)
        self._allocate_gradient = allocate_gradient
        self._autocast = autocast
        self._operators: dict[str, Kernel] = {}
        self._direct: dict[tuple[str, str], Kernel] = {}
        self._refusals: dict[str, Refusal] = {}
        self._preferences: dict[str, Preference] = {}

    @property
    def implemented(self) -> tuple[str, ...]:
        """The backends that have this operation."""
        return tuple(self._operators)

    def operator(self, backend: str) -> Kernel:
        """Return the forward operator of a backend."""
        return self._operators[backend]

    def call(self, backend: str, arguments: tuple[Any, ...]) -> Any:
        """Call the forward operator of a backend, without PyTorch's dispatcher where nothing else looks at the call.

        The dispatcher converts all arguments four times, which takes as long as half of a short call.
        """
        if not torch.compiler.is_compiling():
            direct = self._direct.get((backend, arguments[0].device.type))
            if direct is not None and not is_observed(arguments[: self._declaration.tensors]):
                return direct(*arguments)
        return self._operators[backend](*arguments)

    @property
    def refusals(self) -> Mapping[str, Refusal]:
        """For each backend that has this operation, the function that refuses what it cannot serve."""
        return self._refusals

    @property
    def preferences(self) -> Mapping[str, Preference]:
        """For backends that are not always worth taking, the function that says where they are."""
        return self._preferences

    def define(
        self, backend: str, refusal: Refusal = lambda arguments: None, is_preferred: Preference | None = None
    ) -> None:
        """Declare the operators of a backend, with every rule but the kernels."""
        if is_preferred is not None:
            self._preferences[backend] = is_preferred
        for name, schema, fake in zip((self.name, f"{self.name}_backward"), self._schemas, self._fakes, strict=True):
            _LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", fake, lib=_LIBRARY)
        forward, backward = self._overload(self.name, backend), self._overload(f"{self.name}_backward", backend)
        _LIBRARY.impl(f"{self.name}.{backend}", self._autograd_kernel(backend, forward, backward, backward), "Autograd")
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}_backward.{backend}", self._double_backward, lib=_LIBRARY
        )
        for key, device_type in _AUTOCAST.items():
            _LIBRARY.impl(f"{self.name}.{backend}", self._autocast_kernel(forward, device_type), key)
        self._operators[backend] = forward
        self._refusals[backend] = refusal

    def implement(
        self, backend: str, forward: Kernel, backward: Kernel, key: str = "CompositeExplicitAutograd"
    ) -> None:
        """Give a declared backend its kernels, written in Python, for one dispatch key.

        Those of the key of a device can be called without the dispatcher.
        """
        _LIBRARY.impl(f"{self.name}.{backend}", forward, key)
        _LIBRARY.impl(f"{self.name}_backward.{backend}", backward, key)
        if key in ("CPU", "CUDA"):
            operator = self._overload(f"{self.name}_backward", backend)
            self._direct[backend, key.lower()] = self._autograd_kernel(backend, forward, backward, operator)

    def _overload(self, name: str, backend: str) -> Kernel:
        operator: Kernel = getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)
        return operator

    def _backward_fake(self, *arguments: Any) -> list[Tensor]:
        needs_grad = arguments[-self._declaration.arity - 1]
        differentiable = arguments[-self._declaration.arity :][self._declaration.gradients]
        asked = zip(differentiable, needs_grad, strict=True)
        return [self._allocate_gradient(tensor) for tensor, needed in asked if needed]

    def _autograd_kernel(self, name: str, forward: Kernel, backward: Kernel, operator: Kernel) -> Kernel:
        """Make what ``torch.library.register_autograd`` would make, without the time that it adds to each call.

        For every argument it lists all of the schema's, to add defaults, and these schemas have none. ``operator`` is
        called in place of ``backward`` where something looks at the call.
        """
        tensors, gradients, arity = self._declaration.tensors, self._declaration.gradients, self._declaration.arity
        saved = self._saved
        before, after = (None,) * gradients.start, (None,) * (arity - gradients.stop)

        def forward_and_save(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward(*arguments)
            ctx.save_for_backward(*(output if saved else ()), *arguments[:tensors])
            ctx.options = arguments[tensors:]
            if saved:
                ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)
            return output

        def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if grads[0] is None:
                return (None,) * arity
            kept = ctx.saved_tensors
            needs = list(ctx.needs_input_grad[gradients])
            given = (grads[0], *kept[:saved], needs, *kept[saved:], *ctx.options)
            if torch.is_grad_enabled():  # a second derivative is asked for, and refused
                found = iter(operator(*given))
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    found = iter((operator if is_observed(grads[:1]) else backward)(*given))
            return (*before, *[next(found) if needed else None for needed in needs], *after)

        methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(differentiate)}
        function: Any = type(f"{self.name}_{name}", (torch.autograd.Function,), methods)
        apply = function.apply
        if operator is not backward:  # nothing looks at the call: skip what ``apply`` does for transforms of functions
            apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # a class, whose type is Any

        def kernel(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                for x in arguments[gradients]:
                    if x is not None and x.requires_grad:
                        return apply(*arguments)
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
