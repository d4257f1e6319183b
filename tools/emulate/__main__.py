"""Compile the CPU kernels for aarch64, run them in QEMU, and compare them with the float64 reference.

PyTorch itself is not emulated. A small program (``emulator.cpp``) loads a library and implements the few functions of
PyTorch's C interface that the library uses. PyTorch on this machine calls the program as an additional backend, so the
cases, gradients and bounds of ``fastprefix.parity`` apply. This checks results only, not speed.

Usage, from the root of a checkout: python -m tools.emulate [--sysroot DIR]

DIR contains the dynamic linker and the C and C++ libraries of aarch64. The default is the folder of Debian's cross
compiler. ``--native`` checks this tool itself, with the machine's own compiler and without QEMU.
"""

import argparse
import functools
import runpy
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import IO, Any, cast
from unittest import mock

import torch
from torch import Tensor

from fastprefix import reference
from fastprefix.ops.backends import BACKENDS, Backend
from fastprefix.ops.prefix_attention.registration import OPERATION as ATTENTION
from fastprefix.ops.prompt_embedding.registration import OPERATION as EMBEDDING
from fastprefix.ops.registration import NAMESPACE, Operation
from fastprefix.parity import Case, attention_cases, embedding_cases, make_attention_case, measure
from fastprefix.testing import Report, _compare, _find_leaves, _Run

BACKEND = "emulated"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PROCESSORS = {"default": "cortex-a72", "neon_bf16": "max"}
"""QEMU's processor for each instruction set. cortex-a72 has only the instructions of ARMv8.0."""

_HERE = Path(__file__).parent
_NUMBERS = {
    **{torch.uint8: 0, torch.int32: 3, torch.int64: 4, torch.float16: 5},
    **{torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15},
}
_DTYPES = {number: dtype for dtype, number in _NUMBERS.items()}


# ---- building -------------------------------------------------------------------------------------------------------


@functools.cache
def read_setup() -> dict[str, Any]:
    """Return the global variables of ``setup.py``, without building anything."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path("setup.py")


def build_emulator(compiler: str, folder: Path) -> Path:
    """Compile the emulator and return its path."""
    source = _HERE / "emulator.cpp"
    return _compile(compiler, folder / "emulator", [source], source, "-rdynamic", "-ldl")


def build_libraries(compiler: str, folder: Path, instruction_sets: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Compile the kernels for each instruction set, given as names and compiler flags, and return the libraries."""
    read = [Path("setup.py"), *Path("csrc").rglob("*.*")]
    libraries = {}
    for name, flags in instruction_sets.items():
        objects = [
            _compile(compiler, folder / name / f"{source.replace('/', '_')}.o", read, *flags, "-fPIC", "-c", source)
            for source in read_setup()["SOURCES"]
        ]
        # Bind lazily, since the emulator defines only those of PyTorch's functions that are called.
        libraries[name] = _compile(compiler, folder / f"{name}.so", read, *objects, "-shared", "-Wl,-z,lazy")
    return libraries


def _compile(compiler: str, target: Path, read: Sequence[Path], *arguments: object) -> Path:
    """Call the compiler with the flags of ``setup.py``, unless ``target`` is newer than every file in ``read``."""
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in read):
        target.parent.mkdir(parents=True, exist_ok=True)
        setup = read_setup()
        command = [compiler, *setup["FLAGS"], "-I", setup["INCLUDE"], *arguments, "-o", target]
        subprocess.run([str(word) for word in command], check=True)
    return target


# ---- the emulator as a backend --------------------------------------------------------------------------------------


class EmulationError(RuntimeError):
    """Raised if an operator fails or the emulator exits."""


class Emulator:
    """A process that runs the operators of one library at a time."""

    def __init__(self) -> None:
        """Create the emulator without starting a process."""
        self._command: Sequence[str | Path] = ()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str | Path]) -> None:
        """Run all further operators with ``command``."""
        self.close()
        self._command = command

    def call(self, name: str, schema: Any, arguments: Sequence[Any]) -> list[Tensor]:
        """Run an operator of the backend "cpu" on arguments in the order of ``schema`` and return all its tensors."""
        returned = [type(output.type) for output in schema.returns]
        request = [_encode_text(f"{name}.cpu")]
        request.append(struct.pack("<qqq", len(returned), returned == [torch.ListType], len(arguments)))
        for argument, declared in zip(arguments, schema.arguments, strict=True):
            request.append(_encode(argument, isinstance(declared.type, torch.OptionalType)))
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            stdin, stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
            stdin.write(b"".join(request))
            stdin.flush()
            failed, count = _read_numbers(stdout, 2)
            if failed:
                raise EmulationError(f"{name}: {_read(stdout, count).decode()}")
            return [_read_tensor(stdout) for _ in range(count)]
        except (BrokenPipeError, EOFError):
            code = self.close()
            raise EmulationError(f"{name}: the emulator exited with status {code}") from None

    def close(self) -> int | None:
        """End the process and return its exit status. The next call starts a new process."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        try:
            process.communicate()
        except BrokenPipeError:
            process.wait()
        return process.returncode


def _encode_text(text: str) -> bytes:
    return struct.pack("<q", len(text)) + text.encode()


def _encode(argument: Any, optional: bool) -> bytes:
    """Return an argument in the format of a request: a letter for its kind, then its contents."""
    if argument is None:
        return struct.pack("<q", ord("n"))
    wrapped = struct.pack("<q", ord("o")) if optional else b""
    if isinstance(argument, Tensor):
        header = (ord("t"), _NUMBERS[argument.dtype], argument.ndim, *argument.shape, *argument.stride())
        return wrapped + struct.pack(f"<{len(header)}q", *header) + _bytes_of(_line_up(argument.detach()))
    if isinstance(argument, list):
        return wrapped + struct.pack(f"<{2 + len(argument)}q", ord("l"), len(argument), *argument)
    kind = "d" if isinstance(argument, float) else "q"
    return wrapped + struct.pack(f"<q{kind}", ord("v"), argument)


def _line_up(x: Tensor) -> Tensor:
    """Return a flat view of the memory from the first to the last element."""
    return x.as_strided((_span(x.shape, x.stride()),), (1,))


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    return 0 if 0 in sizes else 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _bytes_of(x: Tensor) -> bytes:
    return x.view(torch.uint8).numpy().tobytes()


def _read(stream: IO[bytes], count: int) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise EOFError
    return found


def _read_numbers(stream: IO[bytes], count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}q", _read(stream, 8 * count))


def _read_tensor(stream: IO[bytes]) -> Tensor:
    number, ndim = _read_numbers(stream, 2)
    sizes, strides = _read_numbers(stream, ndim), _read_numbers(stream, ndim)
    elements = torch.empty(_span(sizes, strides), dtype=_DTYPES[number])
    data = bytearray(_read(stream, elements.nbytes))
    if data:
        elements = torch.frombuffer(data, dtype=elements.dtype)
    return elements.as_strided(sizes, strides)


def register(operation: Operation, emulator: Emulator) -> None:
    """Register the emulator as a backend of an operation."""
    operation.define(BACKEND)
    namespace = getattr(torch.ops, NAMESPACE)
    backward_name = f"{operation.name}_backward"
    schema = getattr(getattr(namespace, operation.name), BACKEND)._schema
    backward_schema = getattr(getattr(namespace, backward_name), BACKEND)._schema

    def forward(*arguments: Any) -> Any:
        outputs = emulator.call(operation.name, schema, arguments)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def backward(*arguments: Any) -> list[Tensor]:
        return emulator.call(backward_name, backward_schema, arguments)

    operation.implement(BACKEND, forward, backward)


# ---- cases ----------------------------------------------------------------------------------------------------------


def list_cases() -> list[Case]:
    """Return a few cases that cover much of the code, then the smaller cases of the grid of ``fastprefix.parity``."""
    wide = make_attention_case(Hq=4, N=33, M=45, P=11, D=64, gate="BhP", is_causal=True)
    numbers = torch.arange(33, dtype=torch.int32) // 7
    shared: list[Case] = [
        wide,
        replace(wide, D=40, Dv=72, layout="sliced", mask="padding", sinks=True),
        replace(wide, layout="strided", gate="BHNP", output_gate="BH"),
        replace(wide, N=130, M=70, P=70, Hkv=1, layout="BNHD", options={"window_size": 20, "dropout_p": 0.2}),
        replace(wide, spans="ragged", gate=None, key_bias="hT", frozen=3, bias="BHNP"),
        replace(wide, M=33, options={"segment_ids": (numbers.expand(2, -1), numbers.expand(2, -1)), "softcap": 5.0}),
    ]
    small = [case for case in attention_cases(40) if case.scores < 40_000]
    return [*shared, *small, *embedding_cases()[::6]]


def check(case: Case, dtype: torch.dtype) -> Report:
    """Measure a case as ``fastprefix parity`` does. In float64, allow 100 ulp of the largest value, or of 1."""
    if dtype is not torch.float64:
        return measure(case, dtype, BACKEND)
    inputs = case.build(dtype)
    results = []
    for function, more in ((case.operation, {"backend": BACKEND}), (getattr(reference, case.operation.__name__), {})):
        leaves = _find_leaves(inputs.tensors, True)
        run = _Run(function, inputs.tensors, True, inputs.options | more, None, leaves, False)
        results.append(run.results(seed=0))
    found, exact = results
    rows = (_compare(name, found[name], exact[name], exact[name]) for name in found)
    least = 100 * torch.finfo(dtype).eps  # a gradient of 0 can be a sum of nonzero numbers
    return Report(
        tuple(replace(row, bound=max(50 * row.bound, least), rms_bound=max(50 * row.rms_bound, least)) for row in rows)
    )


def describe(case: Case) -> str:
    """Return the name of a case: its operation and the fields that differ from their defaults."""

    def differing() -> Iterator[str]:
        for field in fields(case):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(case, field.name)
            if field.name == "options":
                yield from (f"{key}={item if isinstance(item, int | float) else '...'}" for key, item in value.items())
            elif field.repr and value != default:
                yield f"{field.name}={value}"

    return f"{case.operation.__name__}({', '.join(differing())})"


def run_cases(instruction_set: str, cases: Sequence[Case]) -> int:
    """Run the cases and return the number of cases that missed a bound or failed.

    Print one line per case, with the largest ratio of error to bound in each dtype.
    """
    missed = 0
    for case in cases:
        ratios, failures = [], []
        for dtype in DTYPES:
            name = _name(dtype)
            try:
                report = check(case, dtype)
            except EmulationError as error:
                ratios.append("failed")
                failures.append(f"{name}: {error}")
            else:
                ratios.append(f"{report.worst.ratio:.2f}")
                failures += [] if report.ok else [f"{name}:\n{report}"]
        verdict = "MISS" if failures else "ok"
        print(
            f"{instruction_set:<9} {' '.join(f'{ratio:>8}' for ratio in ratios)} {verdict:<4} {describe(case)}",
            flush=True,
        )
        print(*failures, sep="\n", end="\n" if failures else "", flush=True)
        missed += bool(failures)
    return missed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_all(commands: Mapping[str, Sequence[str | Path]], cases: Sequence[Case]) -> int:
    """Run the cases on each instruction set, with its command, and return the number of runs that missed a bound."""
    emulator = Emulator()
    for operation in (ATTENTION, EMBEDDING):
        register(operation, emulator)
    BACKENDS[BACKEND] = Backend(BACKEND, ("cpu",), lambda device: None)
    missed, started = 0, time.monotonic()
    print(f"{'':<9} {' '.join(f'{_name(dtype):>8}' for dtype in DTYPES)}  largest ratio of error to bound")
    for name, command in commands.items():
        emulator.start(command)
        missed += run_cases(name, cases)
    emulator.close()
    runs, seconds = len(cases) * len(commands), time.monotonic() - started
    print(f"{missed} of {runs} runs missed a bound, in {len(DTYPES)} dtypes each, {seconds:.0f} s")
    return missed


# ---- the command ----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.emulate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sysroot", type=Path, default=Path("/usr/aarch64-linux-gnu"), metavar="DIR")
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++", help="default: %(default)s")
    parser.add_argument("--qemu", default="qemu-aarch64", help="default: %(default)s")
    parser.add_argument("--native", action="store_true", help="use this machine's own compiler, c++, without QEMU")
    parser.add_argument("--folder", type=Path, help="folder for compiled files; default: a folder in build/")
    return parser


def explain_missing(compiler: str, qemu: str | None, sysroot: Path) -> str | None:
    """Return a message about the first missing program or folder, or None."""
    for program in filter(None, (compiler, qemu)):
        if shutil.which(program) is None:
            return f"{program} is not installed; Debian's packages are g++-aarch64-linux-gnu and qemu-user"
    if qemu is not None and not (sysroot / "lib/ld-linux-aarch64.so.1").exists():
        return f"`--sysroot` must contain lib/ld-linux-aarch64.so.1, but {sysroot} does not"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Build everything and run all cases. Return 1 if a case missed its bound or could not run."""
    options = make_parser().parse_args(arguments)
    compiler, qemu = ("c++", None) if options.native else (options.compiler, options.qemu)
    missing = explain_missing(compiler, qemu, options.sysroot)
    if missing is not None:
        print(missing, file=sys.stderr)
        return 1
    folder = options.folder or Path("build", "emulate-native" if options.native else "emulate-aarch64")
    instruction_sets = {"default": []} if options.native else read_setup()["instruction_sets"]("aarch64")
    program = build_emulator(compiler, folder)
    libraries = build_libraries(compiler, folder, instruction_sets)
    commands = {
        name: [*((qemu, "-cpu", PROCESSORS[name], "-L", options.sysroot) if qemu else ()), program, library]
        for name, library in libraries.items()
    }
    return 1 if run_all(commands, list_cases()) else 0


if __name__ == "__main__":
    sys.exit(main())
