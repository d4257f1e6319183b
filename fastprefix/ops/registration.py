"""Register an operation's operators with PyTorch for every backend: schema, fake, autograd and autocast.

An operation has a forward and a backward operator. Each backend is an overload of both (``prefix_attention.eager``), so
all backends share the rules below. A backend written in C++ registers its kernels under the same names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import checks
from .declaration import Declaration

NAMESPACE = "fastprefix"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_PLAIN = (Tensor, nn.Parameter)
_AUTOCAST = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda", "AutocastXPU": "xpu", "AutocastMPS": "mps"}

Kernel = Callable[..., Any]
Refusal = Callable[[Any], str | None]
"""A function of the canonical arguments that returns why a backend does not support them, or None if it does."""
Preference = Callable[[Any], bool]
"""A function of the canonical arguments that returns whether to select a backend when none is chosen by name.

It is called before the backend's refusal.
"""


def is_observed(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether anything other than autograd must see a call of an operator with these tensors.

    This may be a mode, autocast, a functorch transform, a trace, a profiler, a tensor subclass or a lazily negated
    tensor.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._get_tracing_state() is not None or torch._C._autograd._profiler_enabled():
        return True
    for x in tensors:  # noqa: SIM110 (any() is twice as slow)
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return True
    return False


def _raise_value_errors(kernel: Kernel) -> Kernel:
    """Return a kernel that raises ValueError where C++ kernels raise IndexError: for values that are out of range."""

    def convert(*arguments: Any) -> Any:
        try:
            return kernel(*arguments)
        except IndexError as error:
            raise ValueError(*error.args) from error

    return convert


def _switch_autocast_off(function: Kernel, device_type: str) -> Kernel:
    """Return a function that runs without autocast, so that the operations in it keep the dtypes of their inputs."""

    def run(*arguments: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return function(*arguments)

    return run


class Operation:
    """The operators of one operation: ``<name>.<backend>`` and ``<name>_backward.<backend>``.

    The forward operator accepts the declared arguments in order. The backward operator accepts the upstream gradient,
    the saved outputs and one flag per gradient (True: requested), followed by the declared arguments. It returns the
    requested gradients.
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
        """Derive the schemas and fakes.

        ``saved`` names the forward operator's outputs, all of which are saved for the backward pass. If it is empty,
        the operator has a single output, which is not saved. ``autocast(arguments, dtype)`` returns the cast arguments.
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
        """The names of the backends that implement this operation."""
        return tuple(self._operators)

    def operator(self, backend: str) -> Kernel:
        """Return the forward operator of a backend."""
        return self._overload(self.name, backend)

    def call(self, backend: str, arguments: tuple[Any, ...]) -> Any:
        """Call the forward operator of a backend, and skip PyTorch's dispatcher if only autograd must see the call.

        The dispatcher converts all arguments four times, which takes a large part of the time of a short call.
        """
        if not torch.compiler.is_compiling():
            direct = self._direct.get((backend, arguments[0].device.type))
            if direct is not None and not is_observed(arguments[: self._declaration.tensors]):
                return direct(*arguments)
        return self._operators[backend](*arguments)

    def run_formulas(self, formulas: Callable[[Any], Tensor], arguments: Any) -> Tensor:
        """Return ``formulas(arguments)``, computed by PyTorch's operations, with the operators' rule for autocast."""
        dtype = checks.autocast_dtype(arguments[0].device)
        if dtype is None:
            return formulas(arguments)
        kind = type(arguments)
        output: Tensor = self._run_cast(lambda *cast: formulas(kind(*cast)), arguments, arguments[0].device.type, dtype)
        return output

    @property
    def refusals(self) -> Mapping[str, Refusal]:
        """Return the function that refuses unsupported calls, for each backend that implements this operation."""
        return self._refusals

    @property
    def preferences(self) -> Mapping[str, Preference]:
        """Return the functions that decide whether to prefer a backend for a call, for the backends that need one."""
        return self._preferences

    def define(
        self, backend: str, refusal: Refusal = lambda arguments: None, is_preferred: Preference | None = None
    ) -> None:
        """Declare the operators of a backend with every rule except the kernels."""
        if is_preferred is not None:
            self._preferences[backend] = is_preferred
        for name, schema, fake in zip((self.name, f"{self.name}_backward"), self._schemas, self._fakes, strict=True):
            _LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", fake, lib=_LIBRARY)
        forward, backward = self._overload(self.name, backend), self._overload(f"{self.name}_backward", backend)
        kernel = _raise_value_errors(self._autograd_kernel(backend, forward, backward, backward))
        _LIBRARY.impl(f"{self.name}.{backend}", kernel, "Autograd")
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}_backward.{backend}", self._double_backward, lib=_LIBRARY
        )
        for key, device_type in _AUTOCAST.items():
            _LIBRARY.impl(f"{self.name}_backward.{backend}", _switch_autocast_off(backward, device_type), key)
        self._add(backend, refusal)

    def define_composite(self, backend: str, forward: Kernel, refusal: Refusal) -> None:
        """Declare and implement a backend that consists of differentiable PyTorch operations.

        It has no backward operator and saves nothing, because PyTorch differentiates its operations.
        """
        _LIBRARY.define(f"{self.name}.{backend}{self._schemas[0]}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(f"{self.name}.{backend}", forward, "CompositeImplicitAutograd")
        self._add(backend, refusal)

    def implement(
        self, backend: str, forward: Kernel, backward: Kernel, key: str = "CompositeExplicitAutograd"
    ) -> None:
        """Register the Python kernels of a declared backend for one dispatch key.

        Kernels with the dispatch key CPU or CUDA can be called without the dispatcher.
        """
        _LIBRARY.impl(f"{self.name}.{backend}", forward, key)
        _LIBRARY.impl(f"{self.name}_backward.{backend}", backward, key)
        if key in ("CPU", "CUDA"):
            operator = self._overload(f"{self.name}_backward", backend)
            self._direct[backend, key.lower()] = self._autograd_kernel(backend, forward, backward, operator)

    def _add(self, backend: str, refusal: Refusal) -> None:
        forward = self._overload(self.name, backend)
        for key, device_type in _AUTOCAST.items():
            _LIBRARY.impl(f"{self.name}.{backend}", self._autocast_kernel(forward, device_type), key)
        self._operators[backend] = _raise_value_errors(forward)  # in inference mode, no autograd kernel runs
        self._refusals[backend] = refusal

    def _overload(self, name: str, backend: str) -> Kernel:
        operator: Kernel = getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)
        return operator

    def _backward_fake(self, *arguments: Any) -> list[Tensor]:
        needs_grad = arguments[-self._declaration.arity - 1]
        differentiable = arguments[-self._declaration.arity :][self._declaration.gradients]
        asked = zip(differentiable, needs_grad, strict=True)
        return [self._allocate_gradient(tensor) for tensor, needed in asked if needed]

    def _autograd_kernel(self, name: str, forward: Kernel, backward: Kernel, operator: Kernel) -> Kernel:
        """Make the autograd kernel that ``torch.library.register_autograd`` would make, with less overhead per call.

        PyTorch's version lists all of the schema's arguments once per argument to fill in defaults, which these schemas
        do not have. ``operator`` replaces ``backward`` if anything other than autograd must see the backward call.
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
            if torch.is_grad_enabled():  # a second derivative is requested, which the operator refuses
                found = iter(operator(*given))
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    found = iter((operator if is_observed(grads[:1]) else backward)(*given))
            return (*before, *[next(found) if needed else None for needed in needs], *after)

        methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(differentiate)}
        function: Any = type(f"{self.name}_{name}", (torch.autograd.Function,), methods)
        apply = function.apply
        if operator is not backward:  # a direct call: skip the work that ``apply`` does for functorch transforms
            apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # the class has type Any

        def kernel(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0:
                self._refuse_tangents(arguments[gradients])
            if torch.is_grad_enabled():
                for x in arguments[gradients]:
                    if x is not None and x.requires_grad:
                        if torch._C._are_functorch_transforms_active():
                            raise self._make_refusal("rules for the transforms of torch.func")
                        return apply(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*arguments)

        return kernel

    def _autocast_kernel(self, operator: Kernel, device_type: str) -> Kernel:
        def kernel(*arguments: Any) -> Any:
            return self._run_cast(operator, arguments, device_type, torch.get_autocast_dtype(device_type))

        return kernel

    def _run_cast(self, function: Kernel, arguments: tuple[Any, ...], device_type: str, dtype: torch.dtype) -> Any:
        """Call a function with cast arguments, without autocast in it."""
        return _switch_autocast_off(function, device_type)(*self._autocast(arguments, dtype))

    def _refuse_tangents(self, tensors: Sequence[Tensor | None]) -> None:
        """Refuse forward-mode differentiation. PyTorch would silently return tangents of 0."""
        if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise self._make_refusal("forward-mode derivative (jvp)")

    def _make_refusal(self, missing: str) -> NotImplementedError:
        return NotImplementedError(
            f"this backend of fastprefix.{self.name} has no {missing}. Leave out `backend`: the function then runs "
            f"PyTorch's operations in such a call, like fastprefix.reference.{self.name}."
        )

    def _double_backward(self, ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"fastprefix.{self.name} has no second derivative: its backward pass cannot be differentiated "
            f"(create_graph=True). Use fastprefix.reference.{self.name}, which supports it."
        )
