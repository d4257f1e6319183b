"""Check that a fast version of a function is as accurate as plain PyTorch in the same dtype.

You do not need to set a tolerance. Three versions run on the same inputs: the function, its plain version in the same
dtype, and the plain version in float64. The error of the function against float64 must be at most twice the error of
the plain version plus two ulp. This bound applies to the maximum error and to the root mean square error, for every
output and every gradient.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import reference as _reference
from .ops.prefix_attention import prefix_attention
from .ops.prompt_embedding import prompt_embedding

__all__ = ["Report", "Row", "assert_parity", "measure_parity"]

_REFERENCES: dict[Callable[..., Any], Callable[..., Any]] = {
    prefix_attention: _reference.prefix_attention,
    prompt_embedding: _reference.prompt_embedding,
}


@dataclass(frozen=True)
class Row:
    """The errors of one output or gradient against float64, those of plain PyTorch, and the bounds."""

    name: str
    error: float
    plain_error: float
    bound: float
    rms_error: float
    plain_rms_error: float
    rms_bound: float
    problem: str | None = None  # a wrong shape or dtype, or NaN or infinity where they do not belong

    @property
    def ratio(self) -> float:
        """The error divided by its bound, the larger of maximum and root mean square. A ratio above 1 is a miss."""
        if self.problem is not None:
            return float("inf")
        return max(_ratio(self.error, self.bound), _ratio(self.rms_error, self.rms_bound))

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


@dataclass(frozen=True)
class Report:
    """The measurements, with one row for each output and each gradient."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row with the largest ratio."""
        return max(self.rows, key=lambda row: row.ratio)

    def __str__(self) -> str:
        """Return a table with one line for each result."""
        width = max(len("result"), *(len(row.name) for row in self.rows))
        lines = [
            f"{'result':<{width}}  {'error':>9}  {'plain':>9}  {'bound':>9}  {'rms':>9}  {'bound':>9}  {'ratio':>6}"
        ]
        for row in self.rows:
            numbers = (row.error, row.plain_error, row.bound, row.rms_error, row.rms_bound)
            verdict = "" if row.ok else f"  MISS {row.problem or ''}".rstrip()
            lines.append(f"{row.name:<{width}}  {'  '.join(f'{n:9.2e}' for n in numbers)}  {row.ratio:6.2f}{verdict}")
        return "\n".join(lines)


def assert_parity(
    function: Callable[..., Any],
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    reference: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
    grad: bool | Collection[str] = True,
    draws: int = 1,
    seed: int = 0,
) -> Report:
    """Assert that ``function`` is as accurate as its plain version, and return the measurements.

    >>> assert_parity(fastprefix.prefix_attention, (q, k, v, pk, pv), options={"is_causal": True})
    >>> assert_parity(MyFastModule(w), (x,), reference=MyPlainModule(w))

    Args:
        function: a callable or an ``nn.Module``. It returns a tensor, or tuples, lists or dicts of tensors.
        inputs: the inputs of the function, by position (a sequence) or by name (a mapping). Tuples of tensors are
            allowed.
        reference: the plain version, which is called with the same arguments. It must compute in float64 if its
            arguments are float64. It is optional for the operations of fastprefix. If both versions are modules, the
            gradients of their parameters are compared too. Their names must be the same, and their values should be.
        options: more keyword arguments. Tensors in it are cast like inputs but get no gradient. ``backend`` is not
            passed to the reference of an operation of fastprefix.
        grad: True compares the gradients of all floating-point inputs, False of none, and names those of the named
            inputs. The name of a tuple selects all of its tensors.
        draws: number of variants that are measured together. The first has the inputs as given. In the others, each
            element differs by up to a thousandth. Each variant has a different random upstream gradient. Results with
            few elements need several variants, because plain PyTorch can be exact by chance. A miss is therefore
            measured again with ten times as many variants.
        seed: random seed of the variants, and of dropout, for which it is set before each version runs.

    Raises:
        AssertionError: a result misses its bound. The message is a table of all results.
        TypeError: the function returns no tensors, or anything other than tensors and numbers.
        ValueError: ``grad`` names anything other than floating-point inputs, or an input is float64.
    """
    report = measure_parity(function, inputs, reference=reference, options=options, grad=grad, draws=draws, seed=seed)
    if not report.ok:
        raise AssertionError(f"the error is above its bound, which is twice plain PyTorch's plus two ulp\n{report}")
    return report


def measure_parity(
    function: Callable[..., Any],
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    reference: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
    grad: bool | Collection[str] = True,
    draws: int = 1,
    seed: int = 0,
) -> Report:
    """Return the measurements of ``assert_parity`` without raising an error for a miss."""
    if not isinstance(inputs, Mapping | tuple | list):
        raise TypeError(f"`inputs` must be a sequence or a mapping of inputs, got {type(inputs).__name__}")
    if draws < 1:
        raise ValueError(f"`draws` must be at least 1, got {draws}")
    named = (
        dict(inputs) if isinstance(inputs, Mapping) else dict(zip(_name_inputs(function, inputs), inputs, strict=True))
    )
    by_name = isinstance(inputs, Mapping)
    leaves = _find_leaves(named, grad)
    options = dict(options or {})
    if any(tensor.dtype is torch.float64 for _, tensor in _collect_tensors(named)):
        raise ValueError("`inputs` must have dtypes below float64, because float64 is the reference")
    plain_options = dict(options)
    if function in _REFERENCES and reference is None:
        reference = _REFERENCES[function]
        plain_options.pop("backend", None)
    if reference is None:
        raise ValueError(
            "`reference` must be the plain version of the function. Only the operations of fastprefix have a default"
        )
    _check_parameter_names(function, reference)
    parameters = isinstance(function, nn.Module) and isinstance(reference, nn.Module)

    def results(
        count: int, callee: Callable[..., Any], extra: Mapping[str, Any], dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        runs = [
            _Run(callee, _vary(named, draw, seed), by_name, extra, dtype, leaves, parameters).results(seed + draw)
            for draw in range(count)
        ]
        return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}

    def measure(count: int) -> Report:
        fast, plain = results(count, function, options, None), results(count, reference, plain_options, None)
        exact = results(count, reference, plain_options, torch.float64)
        if fast.keys() != plain.keys():
            raise AssertionError(
                f"the function returns results {', '.join(fast)}, but its reference returns {', '.join(plain)}"
            )
        return Report(tuple(_compare(name, fast[name], plain[name], exact[name]) for name in fast))

    report = measure(draws)
    return report if report.ok else measure(10 * draws)


class _Run:
    """One version of the function, and its own copy of the inputs, cast to a dtype (None keeps their dtypes).

    ``leaves`` has the names of the inputs whose gradients are computed, or is None if no gradients are.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Mapping[str, Any],
        by_name: bool,
        options: Mapping[str, Any],
        dtype: torch.dtype | None,
        leaves: Collection[str] | None,
        parameters: bool,
    ) -> None:
        self._function = function
        self._by_name = by_name
        self._inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
        self._options = {name: _cast(value, dtype) for name, value in options.items()}
        self._state: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        for name, tensor in _collect_tensors(self._inputs):
            if leaves is not None and name in leaves:
                self._leaves[name] = tensor.requires_grad_()
        if isinstance(function, nn.Module):
            self._copy_state(function, dtype, leaves is not None and parameters)

    def _copy_state(self, module: nn.Module, dtype: torch.dtype | None, grad: bool) -> None:
        for name, parameter in module.named_parameters():
            self._state[name] = _cast(parameter, dtype)
            if grad and parameter.requires_grad:
                self._leaves[f"parameter {name}"] = self._state[name].requires_grad_()
        self._state |= {name: _cast(buffer, dtype) for name, buffer in module.named_buffers()}

    def results(self, seed: int) -> dict[str, Tensor]:
        """Return outputs and gradients by name."""
        tensors = _collect_tensors([self._inputs, self._state])
        devices = {tensor.device.index for _, tensor in tensors if tensor.is_cuda}
        with torch.random.fork_rng(devices=devices):
            # ``torch.manual_seed`` would also seed the other devices, whose generators are not restored.
            for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
                generator.manual_seed(seed)
            outputs = _read_outputs(self._call())
            grads = self._gradients(outputs, seed) if self._leaves else {}
        return {name: output.detach() for name, output in outputs.items()} | grads

    def _call(self) -> Any:
        arguments = () if self._by_name else tuple(self._inputs.values())
        keywords = {**(self._inputs if self._by_name else {}), **self._options}
        if isinstance(self._function, nn.Module):
            return torch.func.functional_call(self._function, self._state, arguments, keywords)
        return self._function(*arguments, **keywords)

    def _gradients(self, outputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        differentiable = [output for output in outputs.values() if output.requires_grad]
        generator = torch.Generator().manual_seed(seed + 1)
        # Rounded to bfloat16, draws are exact in wider dtypes (nearly so in float16), so all versions get the same.
        upstream = [
            torch.randn(o.shape, generator=generator).bfloat16().to(device=o.device, dtype=o.dtype)
            for o in differentiable
        ]
        leaves = list(self._leaves.values())
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if differentiable:
            grads = torch.autograd.grad(differentiable, leaves, upstream, allow_unused=True)
        named = zip(self._leaves, leaves, grads, strict=True)
        return {f"grad {name}": torch.zeros_like(leaf) if g is None else g.detach() for name, leaf, g in named}


def _vary(inputs: Mapping[str, Any], draw: int, seed: int) -> dict[str, Any]:
    """Return the inputs for draw 0, and for later draws a variant of them in the same dtype."""
    generator = torch.Generator().manual_seed(seed + draw)

    def vary(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        factor = 1.0 + 1e-3 * (2.0 * torch.rand(tensor.shape, generator=generator) - 1.0)
        return _copy(tensor.detach() * factor.to(tensor.device), tensor.stride(), tensor.dtype)

    return {name: value if draw == 0 else _map_tensors(vary, value) for name, value in inputs.items()}


def _compare(name: str, fast: Tensor, plain: Tensor, exact: Tensor) -> Row:
    problem: str | None
    if fast.shape != plain.shape or fast.dtype != plain.dtype:
        problem = f"{fast.dtype} {tuple(fast.shape)}, expected {plain.dtype} {tuple(plain.shape)}"
        nan = float("nan")
        return Row(name, nan, nan, nan, nan, nan, nan, problem)
    ulp = torch.finfo(fast.dtype).eps if fast.is_floating_point() or fast.is_complex() else 0.0
    fast, plain, exact = (torch.view_as_real(x) if x.is_complex() else x for x in (fast, plain, exact))
    fast, plain, exact = fast.double(), plain.double(), exact.double()
    problem = _explain_misplaced(fast, plain, exact)
    finite, of_plain = fast.isfinite() & exact.isfinite(), plain.isfinite() & exact.isfinite()
    errors, plain_errors = (fast - exact)[finite], (plain - exact)[of_plain]
    error, plain_error = _largest(errors), _largest(plain_errors)
    rms, plain_rms = _rms(errors), _rms(plain_errors)
    exact = exact[finite | of_plain]
    bound, rms_bound = 2 * plain_error + 2 * ulp * _largest(exact), 2 * plain_rms + 2 * ulp * _rms(exact)
    return Row(name, error, plain_error, bound, rms, plain_rms, rms_bound, problem)


def _explain_misplaced(fast: Tensor, plain: Tensor, exact: Tensor) -> str | None:
    """Return a message about NaN and infinity in wrong places, or None.

    They must occur where the float64 result has them. Elsewhere, they may occur only where plain PyTorch overflows too.
    """
    wrong = ~fast.isfinite() & exact.isfinite() & plain.isfinite()
    missing = ~exact.isfinite() & ~torch.isclose(fast, exact, equal_nan=True)
    if wrong.any():
        return f"{int(wrong.sum())} values are NaN or infinite"
    if missing.any():
        return f"{int(missing.sum())} NaN or infinite values of the exact result are missing"
    return None


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _ratio(error: float, bound: float) -> float:
    if bound == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    ratio = error / bound
    return ratio if ratio == ratio else float("inf")  # ``max`` would skip NaN


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Return ``value`` with every tensor copied, and floating-point ones cast to ``dtype``."""

    def cast(tensor: Tensor) -> Tensor:
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return _copy(tensor.detach(), tensor.stride(), to)

    return _map_tensors(cast, value)


def _copy(tensor: Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor with these strides. An expanded one, in which PyTorch does not write, stays expanded."""
    if all(step != 0 or size == 1 for step, size in zip(stride, tensor.shape, strict=True)):
        return torch.empty_strided(tensor.shape, stride, dtype=dtype, device=tensor.device).copy_(tensor)
    return tensor.to(dtype)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with a function applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(function, entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        entries = [_map_tensors(function, entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def _find_leaves(named: Mapping[str, Any], grad: bool | Collection[str]) -> Collection[str] | None:
    """Return the names of the tensors whose gradients are compared, or None if gradients are not compared."""
    if grad is False:
        return None
    known = [name for name, tensor in _collect_tensors(named) if tensor.is_floating_point()]
    if grad is True:
        return known
    wanted = {grad} if isinstance(grad, str) else set(grad)
    found = {name: {name, re.split(r"[.\[]", name)[0]} & wanted for name in known}
    if wrong := wanted.difference(*found.values()):
        raise ValueError(f"`grad` must have names of floating-point inputs, {known}, but has {sorted(wrong)}")
    return [name for name, names in found.items() if names]


def _read_outputs(value: Any) -> dict[str, Tensor]:
    """Return the tensors in the value that a function returned, by name."""
    outputs = dict(_collect_tensors(value, "output"))
    if not outputs or not _is_of_tensors(value):
        raise TypeError(
            f"`function` and `reference` must return a tensor, or tuples, lists or dicts of tensors, but one returned "
            f"{type(value).__name__}"
        )
    return outputs


def _is_of_tensors(value: Any) -> bool:
    """Return whether a value has only parts that can be compared, or need not be."""
    if isinstance(value, Mapping):
        return all(map(_is_of_tensors, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_of_tensors, value))
    return value is None or isinstance(value, Tensor | int | float | str)


def _collect_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in ``value`` with a name that contains its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _collect_tensors(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from _collect_tensors(entry, f"{name}[{index}]")


def _name_inputs(function: Callable[..., Any], inputs: Sequence[Any]) -> list[str]:
    """Return names of positional inputs: those of the function's parameters, or numbered ones for the rest."""
    callee = function.forward if isinstance(function, nn.Module) else function
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        names = [p.name for p in inspect.signature(callee).parameters.values() if p.kind in positional]
    except (TypeError, ValueError):  # builtins without a signature
        names = []
    return names[: len(inputs)] + [f"inputs[{index}]" for index in range(len(names), len(inputs))]


def _check_parameter_names(function: Callable[..., Any], reference: Callable[..., Any]) -> None:
    if not (isinstance(function, nn.Module) and isinstance(reference, nn.Module)):
        return
    ours, theirs = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (function, reference))
    if ours != theirs:
        raise ValueError(
            "`reference` must be a module with the same parameters as the function. These are not in both: "
            f"{sorted(ours ^ theirs)}"
        )
