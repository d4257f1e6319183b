"""Check that a fast version of a function is as exact as plain PyTorch at the same precision.

There are no tolerances to set. A function, its plain version at the same dtype, and the plain version in float64 run
on the same inputs. The function's error against float64 may be twice the plain version's, plus two ulp; that holds for
the largest error and for the root mean square, forward and for every gradient.
"""

import inspect
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
    """One result, an output or a gradient: its error against float64, plain PyTorch's, and the bound."""

    name: str
    error: float
    plain_error: float
    bound: float
    rms_error: float
    plain_rms_error: float
    rms_bound: float
    problem: str | None = None  # what no error can say: another shape or dtype, a NaN or an infinity out of place

    @property
    def ratio(self) -> float:
        """Error by bound, the worse of largest and root mean square: above 1 is a miss."""
        if self.problem is not None:
            return float("inf")
        return max(_ratio(self.error, self.bound), _ratio(self.rms_error, self.rms_bound))

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


@dataclass(frozen=True)
class Report:
    """The measurements, a row for each result."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row with the largest ratio."""
        return max(self.rows, key=lambda row: row.ratio)

    def __str__(self) -> str:
        """Format a table with one line for each result."""
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
    """Assert that ``function`` is as exact as its plain version; returns what was measured.

    >>> assert_parity(fastprefix.prefix_attention, (q, k, v, pk, pv), options={"is_causal": True})
    >>> assert_parity(MyFastModule(w), (x,), reference=MyPlainModule(w))

    Args:
        function: a callable or an ``nn.Module``; returns a tensor, or tuples, lists or dicts of them.
        inputs: its inputs, by position (a sequence) or by name (a mapping); tensors may stand in tuples.
        reference: the plain version, called with the same arguments; it must run in float64 on float64 arguments.
            fastprefix's own operations find theirs by themselves. Where both versions are modules, their parameters
            must have the same names, take part in the comparison, and should hold the same values.
        options: further keyword arguments. Tensors among them are cast like inputs but get no gradient; ``backend``
            is for fastprefix's operations and not handed to their reference.
        grad: compare the gradients of all floating inputs (True), of none (False), or of those named.
        draws: how many variants are measured together: the inputs as they are, then each element changed by up to a
            thousandth, each with a random upstream gradient of its own. Results of few elements need several: a single
            number of plain PyTorch's can be right by luck. A miss is therefore measured again, on ten times as many.
        seed: of the variants and, set before each version runs, of dropout.

    Raises:
        AssertionError: a result misses its bound; the message is a table of all of them.
    """
    report = measure_parity(function, inputs, reference=reference, options=options, grad=grad, draws=draws, seed=seed)
    if not report.ok:
        raise AssertionError(f"the error is above twice plain PyTorch's plus two ulp\n{report}")
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
    """``assert_parity`` that reports and does not judge."""
    named = (
        dict(inputs) if isinstance(inputs, Mapping) else dict(zip(_name_inputs(function, inputs), inputs, strict=True))
    )
    by_name = isinstance(inputs, Mapping)
    options = dict(options or {})
    if any(tensor.dtype is torch.float64 for _, tensor in _collect_tensors(named)):
        raise ValueError(
            "`inputs` must be of dtypes below float64: nothing more exact is there to compare float64 with"
        )
    plain_options = dict(options)
    if function in _REFERENCES and reference is None:
        reference = _REFERENCES[function]
        plain_options.pop("backend", None)
    if reference is None:
        raise ValueError(
            "`reference` is missing: give the plain version of the function (only fastprefix's own operations have one)"
        )
    _check_parameter_names(function, reference)
    parameters = isinstance(function, nn.Module) and isinstance(reference, nn.Module)

    def results(
        count: int, callee: Callable[..., Any], extra: Mapping[str, Any], dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        runs = [
            _Run(callee, _vary(named, draw, seed), by_name, extra, dtype, grad, parameters).results(seed + draw)
            for draw in range(count)
        ]
        return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}

    def measure(count: int) -> Report:
        fast, plain = results(count, function, options, None), results(count, reference, plain_options, None)
        exact = results(count, reference, plain_options, torch.float64)
        if fast.keys() != plain.keys():
            raise AssertionError(f"the function's results are {', '.join(fast)}, its reference's {', '.join(plain)}")
        return Report(tuple(_compare(name, fast[name], plain[name], exact[name]) for name in fast))

    report = measure(draws)
    return report if report.ok else measure(10 * draws)


class _Run:
    """One version on its own copy of the inputs, cast to a dtype (None: left as they are)."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Mapping[str, Any],
        by_name: bool,
        options: Mapping[str, Any],
        dtype: torch.dtype | None,
        grad: bool | Collection[str],
        parameters: bool,
    ) -> None:
        self._function = function
        self._by_name = by_name
        self._inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
        self._options = {name: _cast(value, dtype) for name, value in options.items()}
        self._state: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        for name, tensor in _collect_tensors(self._inputs):
            if tensor.is_floating_point() and (grad if isinstance(grad, bool) else name in grad):
                self._leaves[name] = tensor.requires_grad_()
        if isinstance(function, nn.Module):
            self._copy_state(function, dtype, grad is not False and parameters)

    def _copy_state(self, module: nn.Module, dtype: torch.dtype | None, grad: bool) -> None:
        for name, parameter in module.named_parameters():
            self._state[name] = _cast(parameter, dtype)
            if grad and parameter.requires_grad:
                self._leaves[f"parameter {name}"] = self._state[name].requires_grad_()
        self._state |= {name: _cast(buffer, dtype).clone() for name, buffer in module.named_buffers()}

    def results(self, seed: int) -> dict[str, Tensor]:
        """Return outputs and gradients by name."""
        devices = {tensor.device for _, tensor in _collect_tensors([self._inputs, self._state]) if tensor.is_cuda}
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            torch.manual_seed(seed)
            outputs = dict(_collect_tensors(self._call(), "output"))
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
        # bfloat16 draws are exact in every wider dtype (and nearly so in float16): all versions get the same.
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
    """Return the inputs, or for later draws a variant in the same dtype, so that errors do not depend on one draw."""
    generator = torch.Generator().manual_seed(seed + draw)

    def vary(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            factor = 1.0 + 1e-3 * (2.0 * torch.rand(value.shape, generator=generator) - 1.0)
            varied = torch.empty_like(value)  # in value's own layout
            return varied.copy_(value.detach() * factor.to(value.device))
        if isinstance(value, Mapping):
            return {key: vary(item) for key, item in value.items()}
        return type(value)(map(vary, value)) if isinstance(value, tuple | list) else value

    return {name: value if draw == 0 else vary(value) for name, value in inputs.items()}


def _compare(name: str, fast: Tensor, plain: Tensor, exact: Tensor) -> Row:
    problem: str | None
    if fast.shape != plain.shape or fast.dtype != plain.dtype:
        problem = f"{fast.dtype} {tuple(fast.shape)}, expected {plain.dtype} {tuple(plain.shape)}"
        nan = float("nan")
        return Row(name, nan, nan, nan, nan, nan, nan, problem)
    ulp = torch.finfo(fast.dtype).eps if fast.is_floating_point() else 0.0
    fast, plain, exact = fast.double(), plain.double(), exact.double()
    problem = _misplaced(fast, plain, exact)
    finite = fast.isfinite() & plain.isfinite() & exact.isfinite()
    fast, plain, exact = fast[finite], plain[finite], exact[finite]
    error, plain_error = _largest(fast - exact), _largest(plain - exact)
    rms, plain_rms = _rms(fast - exact), _rms(plain - exact)
    bound, rms_bound = 2 * plain_error + 2 * ulp * _largest(exact), 2 * plain_rms + 2 * ulp * _rms(exact)
    return Row(name, error, plain_error, bound, rms, plain_rms, rms_bound, problem)


def _misplaced(fast: Tensor, plain: Tensor, exact: Tensor) -> str | None:
    """NaN and infinity must stand where float64 has them, and elsewhere only where plain PyTorch overflows too."""
    wrong = ~fast.isfinite() & exact.isfinite() & plain.isfinite()
    missing = ~exact.isfinite() & ~torch.isclose(fast, exact, equal_nan=True)
    if wrong.any():
        return f"{int(wrong.sum())} values are NaN or infinite"
    if missing.any():
        return f"{int(missing.sum())} NaN or infinite values of the exact result are not there"
    return None


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _ratio(error: float, bound: float) -> float:
    if bound == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / bound


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """``value`` with every tensor detached, and floating ones in ``dtype``."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if dtype is not None and value.is_floating_point() else value.detach()
    if isinstance(value, tuple | list):
        return type(value)(_cast(entry, dtype) for entry in value)
    return value


def _collect_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in ``value`` with a name that says where it stands."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _collect_tensors(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from _collect_tensors(entry, f"{name}[{index}]")


def _name_inputs(function: Callable[..., Any], inputs: Sequence[Any]) -> list[str]:
    """Return the names of positional inputs, which are the function's own where it has them."""
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
            f"`reference` must be a module with the function's parameters; not in both: {sorted(ours ^ theirs)}"
        )
