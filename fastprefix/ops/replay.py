"""Record what a call allocates and launches, and repeat it for later calls of the same kind.

Choosing kernels, grids and tiles in Python takes longer than a short kernel. Calls with equal layouts and options make
the same choices, so a recording becomes one Python function without them: it allocates results, reads the addresses of
tensors, and passes them to the launchers of the compiled kernels.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .targets import Device, Target

Results = list[Tensor] | tuple[Tensor, ...] | Tensor
Call = Callable[..., Results]
"""A function of a target and tensors, or a recording, which is a function of tensors and a stream."""

_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
)
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default, torch.ops.aten.alias.default)
_SEEN, _FAILED = "seen once", "cannot be recorded"


def describe_layouts(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Return the shapes, strides, dtypes and alignments of tensors, which include all that a kernel is compiled for."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors])


class Replays:
    """The recordings of an operation, by the signature of a call."""

    def __init__(self, most: int = 2048) -> None:
        self._most = most
        self._known: dict[Hashable, Any] = {}

    def run_function(
        self,
        function: Callable[..., Results],
        a: Any,
        count: int,
        target: Target,
        tensors: Sequence[Tensor | None] = (),
        options: tuple[Hashable, ...] = (),
        state: Hashable = None,
    ) -> Any:
        """Return ``function(a, target, *tensors, *options)`` by ``run``.

        ``a`` is a named tuple of canonical arguments, of which the first ``count`` are tensors. ``state`` is anything
        else that the function depends on, such as a setting of PyTorch.
        """
        given, rest = (*a[:count], *tensors), a[count:]

        def call(target: Target, *given: Any) -> Results:
            return function(type(a)(*given[:count], *rest), target, *given[count:], *options)

        return self.run((function, target, describe_layouts(given), rest, options, state), target, given, call)

    def run(self, signature: Hashable, target: Target, tensors: Sequence[Tensor | None], call: Call) -> Any:
        """Return ``call(target, *tensors)``. The second call with a signature is recorded, and later ones repeat it.

        ``signature`` must include all that ``call`` depends on, except the values of tensors.
        """
        known = self._known.get(signature)
        if known is _FAILED or not (isinstance(target, Device) and target.can_replay()):
            return call(target, *tensors)
        if callable(known):
            return target.replay(known, tensors)
        if known is None:  # a call that is made only once is not worth recording
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[signature] = _SEEN
            return call(target, *tensors)
        # Tensors that are the same in this call may differ in the next one, so each gets its own name.
        aliases = [None if x is None else x.detach() for x in tensors]
        with _Recorder(target, aliases) as recorder:
            results = call(recorder, *aliases)
        self._known[signature] = recorder.compile(results) or _FAILED
        return results


class _Recorder(TorchDispatchMode):
    """A target that writes down launches, in a mode that writes down PyTorch's operators."""

    def __init__(self, target: Target, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch declares no types for it
        self._target = target
        self.architecture, self.processors, self.split_from = target.architecture, target.processors, target.split_from
        self._kept: list[Tensor | None] = list(tensors)  # an id stays unique as long as its tensor exists
        self._names = {id(x): f"x{i}" for i, x in enumerate(tensors) if x is not None}
        self._parameters = ", ".join(f"x{i}" for i in range(len(tensors)))
        self._addresses: dict[str, str] = {}
        self._constants: dict[str, Any] = {"empty_strided": torch.empty_strided}
        self._lines: list[str] = []
        self._is_complete = True

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
    ) -> Any:
        """Launch a kernel and write it down."""
        compiled = self._target.launch(kernel, grid, arguments, constants, tile)
        if compiled is None:
            self._is_complete = False
            return None
        self._write_constant(compiled)  # keeps its code loaded
        names = kernel.arg_names[len(arguments) :]
        given = (*arguments, *(constants[name] for name in names))
        values = [self._write_address(value) for value in given]
        launcher, function, metadata = (
            self._write_constant(of) for of in (compiled.run, compiled.function, compiled.packed_metadata)
        )
        x, y, z = (*grid, 1, 1)[:3]
        head = f"{x}, {y}, {z}, stream, {function}, {metadata}, None, None, None"
        self._lines.append(f"{launcher}({', '.join([head, *values])})")
        return compiled

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and write it down."""
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            self._is_complete = False
            return result
        if function in _EMPTY:
            options = f"dtype={result.dtype}, device={self._write_constant(result.device)}"
            size, stride = tuple(result.shape), result.stride()
            self._lines.append(f"{self._name_result(result)} = empty_strided({size}, {stride}, {options})")
            return result
        if function in _ALIASES and id(args[0]) in self._names:
            self._kept.append(result)
            self._names[id(result)] = self._names[id(args[0])]
            return result
        given = [self._write_value(value) for value in args]
        given += [f"{name}={self._write_value(value)}" for name, value in (kwargs or {}).items()]
        call = f"{self._write_constant(function)}({', '.join(given)})"
        if function._schema.is_mutable:
            self._lines.append(call)
        elif id(result) not in self._names:
            self._lines.append(f"{self._name_result(result)} = {call}")
        return result

    def compile(self, results: Results) -> Call | None:
        """Return the recording as a function of the tensors and the stream, or None if it is incomplete."""
        if isinstance(results, Tensor):
            text = self._write_value(results)
        else:
            names = "".join(f"{self._write_value(of)}, " for of in results)
            text = f"[{names}]" if isinstance(results, list) else f"({names})"
        if not self._is_complete:
            return None
        lines = [f"def replay({self._parameters}, stream):", *self._delete_unused(text), f"return {text}"]
        code = compile("\n    ".join(lines), "<recording>", "exec")
        defined: dict[str, Any] = self._constants | {"torch": torch}
        exec(code, defined)
        function: Call = defined["replay"]
        return function

    def _delete_unused(self, returned: str) -> list[str]:
        """Return the lines with each intermediate result deleted after its last use, so that memory can be reused."""
        last = {name: number for number, line in enumerate(self._lines) for name in re.findall(r"y\d+", line)}
        lines: list[str] = []
        for number, line in enumerate(self._lines):
            unused = [name for name, use in last.items() if use == number and name not in re.findall(r"y\d+", returned)]
            lines += [line, *(f"del {name}" for name in unused)]
        return lines

    def _name_result(self, result: Tensor) -> str:
        self._kept.append(result)
        return self._names.setdefault(id(result), f"y{len(self._kept)}")

    def _write_value(self, value: Any) -> str:
        """Return the source of an argument of an operator."""
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                self._is_complete = False
            return self._names.get(id(value), "None")
        if isinstance(value, list | tuple):
            items = "".join(f"{self._write_value(of)}, " for of in value)
            return f"[{items}]" if isinstance(value, list) else f"({items})"
        if value is None or type(value) in (bool, int):
            return repr(value)
        return self._write_constant(value)

    def _write_address(self, value: Any) -> str:
        """Return the source of an argument of a kernel, with plain tuples and numbers, which launchers read fastest."""
        if isinstance(value, tuple):
            return f"({''.join(f'{self._write_address(of)}, ' for of in value)})"
        if not isinstance(value, Tensor):
            return self._write_value(value)
        name = self._write_value(value)
        if name not in self._addresses:
            self._addresses[name] = f"p_{name}"
            self._lines.append(f"p_{name} = {name}.data_ptr()")
        return self._addresses[name]

    def _write_constant(self, value: Any) -> str:
        for name, known in self._constants.items():
            if known is value:
                return name
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name
