"""Compile every Triton kernel with the tiles of the tables, without a GPU, and report the resources that it uses.

The launches come from real calls on tensors without storage, so the compiled kernels are the ones that would run.
Registers, spills and the lengths of loops come from the compiled machine code. Matrix instructions come from the PTX.

Usage, from the root of a checkout: python -m tools.aot [--quick] [--arch sm_90] ...
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.ops.prefix_attention import arguments as attention
from fastprefix.ops.prefix_attention.validation import canonical_arguments as attention_arguments
from fastprefix.ops.prompt_embedding import arguments as embedding
from fastprefix.ops.prompt_embedding.validation import canonical_arguments as embedding_arguments
from fastprefix.ops.targets import compile_options
from fastprefix.parity import make_attention_case
from tools import machine_code

SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
"""Bytes of shared memory that a block can use."""

# float16 shares the tiles of bfloat16. "tf32" is attention in float32 with TF32 products.
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
_WIDTHS = (16, 64, 80, 128, 256)
_SAMPLED = (16, 80)  # head dimensions that few rows of the tables have, compiled in bfloat16 only
_SAMPLED_FEATURES = ("full", "causal, gate of keys", "spans, gate of keys", "everything")
_QUICK_BOTTLENECKS = (19, 512)
_BOTTLENECKS = (9, *_QUICK_BOTTLENECKS, 64, 100, 200)
_COMPOSED = ("full", "gate of queries", "key bias", "spans, gate of keys")  # the composed backend has no masks
_EVERYTHING: dict[str, Any] = {
    "is_causal": True,
    "window_size": 100,
    "gate": "BHNP",
    "mask": "float BHNM",
    "bias": "BHNP",
    "segments": True,
    "softcap": 30.0,
    "sinks": True,
    "dropout_p": 0.1,
}
_FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal, gate of keys": {"is_causal": True, "gate": "BhP"},
    "window, gate of keys": {"is_causal": True, "window_size": 100, "gate": "BhP"},
    "gate of queries": {"is_causal": True, "gate": "BHNP"},
    "gate of queries, shared": {"is_causal": True, "gate": "B1NP"},
    "separate": {"output_gate": "BH", "gate": "BhP"},
    "padding": {"is_causal": True, "mask": "padding", "softcap": 30.0},
    "dropout": {"mask": "padding", "gate": "BhP", "dropout_p": 0.1},
    "separate, dropout": {"is_causal": True, "output_gate": "BH", "sinks": True, "dropout_p": 0.1},
    "key bias": {"is_causal": True, "key_bias": "BhP", "frozen": 1},
    "spans": {"is_causal": True, "spans": "own"},
    "spans, gate of keys": {"is_causal": True, "spans": "own", "gate": "BhP", "key_bias": "hT", "frozen": 1},
    "spans, gate of queries": {"is_causal": True, "spans": "own", "gate": "BHNP", "key_bias": "hT"},
    "spans, separate": {"spans": "own", "output_gate": "BH", "gate": "BhP", "key_bias": "hT"},
    "everything": _EVERYTHING,
    "everything, spans": {**_EVERYTHING, "spans": "own", "frozen": 1, "key_bias": "hT"},
}


@dataclass(frozen=True)
class Report:
    """The outcome of compiling one kernel. ``size`` is the head dimension, or the bottleneck or rank r."""

    kernel: str
    arch: str
    dtype: str
    size: str
    features: str
    tile: Any
    registers: int = 0
    spill: int = 0
    shared: int = 0
    matrix: str = "-"
    loops: tuple[int, ...] = ()
    failure: str | None = None

    @property
    def fault(self) -> str | None:
        """Return the reason why the outcome is not acceptable, or None."""
        if self.failure is not None:
            return f"does not compile: {self.failure}"
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"needs {self.shared} bytes of shared memory, but a block has {SHARED_MEMORY[self.arch]}"
        if self.spill and self.tile.spills is None:
            return f"spills {self.spill} bytes, which the tile table does not declare"
        return None

    def line(self) -> str:
        """Return one line of the table."""
        tile = f"{'x'.join(map(str, self.tile[:3]))} w{self.tile.warps} s{self.tile.stages}"
        columns = (
            f"{self.arch} {self.dtype:8} {self.size:<4} {self.kernel:24} {tile:19} {self.registers:>3} registers "
            f"{self.spill:>4} B stack {self.shared / 1024:>5.0f} KB shared  {self.matrix:10}"
        )
        loops = "/".join(map(str, self.loops))
        verdict = self.fault or (f"declared: {self.tile.spills}" if self.spill else "")
        return "  ".join(filter(None, (columns, loops and f"loops of {loops}", self.features, verdict)))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("python -m tools.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(SHARED_MEMORY), default=sorted(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="+", choices=list(_DTYPES), default=list(_DTYPES))
    parser.add_argument("--width", nargs="+", type=int, choices=_WIDTHS, default=list(_WIDTHS), help="head dimensions")
    parser.add_argument("--features", nargs="+", choices=list(_FEATURES), default=list(_FEATURES))
    parser.add_argument("--bottleneck", nargs="+", type=int, choices=_BOTTLENECKS, default=list(_BOTTLENECKS), help="r")
    parser.add_argument("--quick", action="store_true", help="compile a representative subset, for CI")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the kernels, print the reports, and return exit status 1 if an outcome is not acceptable."""
    options = build_parser().parse_args(argv)
    if options.quick:
        options.dtype, options.width, options.features = ["bfloat16"], [128], ["causal, gate of keys"]
        options.bottleneck = _QUICK_BOTTLENECKS
    faults = count = 0
    combinations = itertools.product(options.arch, options.dtype, options.width, options.features)
    of_attention = (combination for combination in combinations if _is_wanted(*combination))
    of_embedding = itertools.product(
        options.arch, [name for name in options.dtype if name != "tf32"], options.bottleneck
    )
    for report in itertools.chain(
        *(attention_reports(*choice) for choice in of_attention),
        *(embedding_reports(*choice) for choice in of_embedding),
    ):
        print(report.line(), flush=True)
        count += 1
        faults += report.fault is not None
    print(f"{count} kernels compiled, {faults} not acceptable")
    return int(faults > 0)


def _is_wanted(arch: str, dtype_name: str, width: int, features: str) -> bool:
    """Return True if a combination of options is to be compiled."""
    if width in _SAMPLED:
        return dtype_name == "bfloat16" and features in _SAMPLED_FEATURES
    return dtype_name != "tf32" or features in _SAMPLED_FEATURES


def attention_reports(arch: str, dtype_name: str, width: int, features: str) -> Iterator[Report]:
    """Compile the kernels of a training step and of a decoding step."""
    from fastprefix.ops.prefix_attention.triton_backend import launch

    dtype = _DTYPES[dtype_name]
    compiler = _Compiler(arch, dtype_name, f"D{width}", features)
    a = _attention(dtype, width, 512, **_FEATURES[features])
    needs = [getattr(a, name) is not None and name not in attention.EAGER_ALONE for name in attention.DIFFERENTIABLE]
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if dtype_name == "tf32" else "ieee"
    try:
        output, normalizers = launch.forward(*a, target=compiler)
        launch.backward(output, output, normalizers, needs, *a, target=compiler)
        launch.forward(*_attention(dtype, width, 1, **_FEATURES[features]), target=compiler)
        if dtype_name == "bfloat16" and features in _COMPOSED:
            _compose(a, output, normalizers, needs, compiler)
    finally:
        matmul.fp32_precision = before
    yield from compiler.reports


def _compose(
    a: attention.AttentionArguments, output: Tensor, normalizers: Tensor, needs: list[bool], compiler: "_Compiler"
) -> None:
    """Compile the kernels of the composed backend."""
    from fastprefix.ops.prefix_attention.triton_backend import launch

    prefix = a._replace(key=a.key[:, :, :0], value=a.value[:, :, :0], is_causal=False)
    logsumexp = normalizers[0, 0]
    launch.extend(prefix, output, logsumexp, target=compiler)
    launch.merge(prefix, output, logsumexp, output, logsumexp, target=compiler)
    of_prefix = [
        needed and name not in ("key", "value") for name, needed in zip(attention.DIFFERENTIABLE, needs, strict=True)
    ]
    launch.backward(output, output, normalizers, of_prefix, *prefix, given=output, target=compiler)


def embedding_reports(arch: str, dtype_name: str, r: int) -> Iterator[Report]:
    """Compile the kernels of a training step of each method, with a bottleneck or rank of r."""
    from fastprefix.ops.prompt_embedding.triton_backend import launch

    for method, a in embedding_calls(_DTYPES[dtype_name], r).items():
        compiler = _Compiler(arch, dtype_name, f"r{r}", method)
        needs = [getattr(a, name) is not None for name in embedding.DIFFERENTIABLE]
        launch.backward(launch.forward(*a, target=compiler), needs, *a, target=compiler)
        yield from compiler.reports


def embedding_calls(
    dtype: torch.dtype, r: int, B: int = 4, N: int = 512, S: int = 60, d: int = 1024
) -> dict[str, embedding.EmbeddingArguments]:
    """Return arguments without storage that use every variant of each kernel of the embedding, by method."""

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def bank(*shape: int) -> Tensor:
        return tensor(3, *shape)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    T = 512
    rows = {"prompt_spans": integers(B, 2), "prompt_length": S, "index": integers(B)}
    offsets: dict[str, dict[str, Any]] = {
        "ADePT": {"ffn": (tensor(d, r), tensor(r), tensor(r, d), tensor(d)), "dropout_p": 0.1},
        "DePT": {"low_rank": (tensor(T, r), tensor(r, d))},
        "ACCEPT": {"position_offset": tensor(T, d)},
        "ADePT, bank": {"ffn": (bank(d, r), bank(r), bank(r, d), bank(d)), "dropout_p": 0.1, **rows},
        "DePT, bank": {"low_rank": (bank(T, r), bank(r, d)), **rows},
        "ACCEPT, bank": {"position_offset": bank(T, d), **rows},
    }
    return {
        method: embedding_arguments(integers(B, N), tensor(1000, d), tensor(S, d), **offset, offset_scale=2.0)
        for method, offset in offsets.items()
    }


def _attention(dtype: torch.dtype, D: int, N: int, **features: Any) -> attention.AttentionArguments:
    """Return the arguments of a call, without storage."""
    case = make_attention_case(B=2, Hq=8, Hkv=4, N=N, M=512, P=128, D=D, **features)
    inputs = case.build(dtype, "meta")
    return attention_arguments(**inputs.tensors, **inputs.options)


class _Compiler:
    """A launch target that compiles each kernel once instead of launching it."""

    processors = 132
    split_from = 256

    def __init__(self, arch: str, dtype: str, size: str, features: str) -> None:
        self.architecture = arch
        self.reports: list[Report] = []
        self._dtype, self._size, self._features = dtype, size, features
        self._seen: set[tuple[Any, ...]] = set()
        pretend_device(int(arch.removeprefix("sm_")))

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
    ) -> None:
        name = kernel.__name__
        identity = (name, *_list_presence(arguments))
        if identity in self._seen:
            return
        self._seen.add(identity)
        short = name.removeprefix("prefix_attention_").removeprefix("prompt_").removesuffix("_kernel")
        known = (short, self.architecture, self._dtype, self._size, self._features, tile)
        try:
            compiled = compile_kernel(kernel, grid, arguments, constants, tile)
        except Exception as failure:  # any error of the compiler becomes a line of the report
            self.reports.append(Report(*known, failure=f"{type(failure).__name__}: {_innermost(failure)}"))
            return
        registers, spill = machine_code.read_resources(compiled.asm["cubin"])
        matrix = machine_code.count_matrix_instructions(compiled.asm["ptx"])
        loops = machine_code.find_loops(compiled.asm["cubin"])
        self.reports.append(Report(*known, registers, spill, compiled.metadata.shared, matrix, loops))

    def launch_again(self, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        raise AssertionError("`launch_again` must not be called, because this target launches nothing")


def compile_kernel(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], tile: Any
) -> Any:
    """Compile a kernel as a launch would, and return it."""
    return kernel.warmup(*arguments, grid=grid, **constants, **compile_options(tile))


def _list_presence(arguments: Any) -> list[bool]:
    """Return which arguments are present, since a kernel can be launched again without some of its results."""
    if isinstance(arguments, list | tuple):
        return [there for argument in arguments for there in _list_presence(argument)]
    return [arguments is not None]


def _innermost(failure: BaseException) -> str:
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return str(failure).strip().splitlines()[-1] if str(failure).strip() else ""


def pretend_device(capability: int) -> None:
    """Make Triton compile for a device that this machine does not have."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self) -> int:
            return capability

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

    triton.runtime.driver.set_active(Driver())


if __name__ == "__main__":
    sys.exit(main())
