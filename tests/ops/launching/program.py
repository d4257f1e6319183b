"""Launch every kernel with Triton's own launcher on a driver without a device, and compare the arguments it receives.

Run by ``tests/ops/test_launching.py`` in a separate process: ``python -m tests.ops.launching.program FOLDER [all]``.
FOLDER has the driver. Without "all", the cases are a few that launch every kernel. The tensors are the CPU's, and
nothing is computed.
"""

import ctypes
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from fastprefix.ops import backends, prefix_attention, prompt_embedding, targets
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import AttentionCase, Case, EmbeddingCase

BYTES = {"u64": 8, "b64": 8, "f64": 8, "u32": 4, "b32": 4, "f32": 4, "u16": 2, "b16": 2, "u8": 1, "b8": 1}
CASES: tuple[Case, ...] = (
    AttentionCase(N=70, M=75, P=20, D=16, gate="P", layout="BNHD", options={"is_causal": True}),
    AttentionCase(Hq=4, N=70, M=70, P=20, D=16, gate="BHNP", output_gate="BH", mask="float", bias="HNP", segments=True,
                  sinks=True, options={"softcap": 30.0, "window_size": 50, "scale": -0.3}),
    AttentionCase(N=70, M=300, P=300, D=24, mask="padding", options={"dropout_p": 0.1}),
    AttentionCase(N=1, M=300, P=300, D=16, prefix_a_row=True),
    AttentionCase(B=3, N=70, M=75, P=20, D=16, spans="ragged", frozen=1, gate="BhP", key_bias="hT"),
    AttentionCase(B=3, N=1, M=300, P=300, D=16, spans="equal", key_bias="hT"),
    AttentionCase(N=70, M=75, P=20, D=16, key_bias="B1P", frozen=7),
    AttentionCase(Hq=4, N=70, M=75, P=20, D=16, gate="B1NP", mask="bool"),
    AttentionCase(N=70, M=75, P=None, D=16),
    EmbeddingCase(N=40, d=64, r=9, offset="ffn", options={"dropout_p": 0.1}),
    EmbeddingCase(N=40, d=64, r=9, offset="low_rank"),
    EmbeddingCase(N=40, d=64, r=9, offset="ffn", spans=[(0, 3), (1, 1)], K=2, index=[1, -1]),
    EmbeddingCase(N=40, d=64, r=9, offset="low_rank", spans=[(0, 3), (1, 1)], K=2, index=[1, -1]),
    EmbeddingCase(N=40, d=64, offset="position_offset", spans=[(0, 3), (1, 1)], K=2, index=[1, -1]),
)  # fmt: skip
FEW: tuple[Case, ...] = (CASES[3], CASES[4], CASES[7], CASES[9], CASES[11], CASES[12])


class H100(targets.Device):
    """The properties of an H100 that matter for launches."""

    architecture, processors, split_from = "sm_90", 132, 256

    def __init__(self) -> None:
        self._device = torch.device("cpu")


class Target(H100):
    """A device that compares the arguments at the driver with those of the launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: set[str] = set()
        self.again: set[str] = set()
        self._launches = Path(os.environ["LAUNCHES"])

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: Any, constants: Any, tile: Any) -> Any:
        compiled = kernel.warmup(*arguments, grid=grid, **constants, **targets.compile_options(tile))
        self._expect(compiled)
        again = super().launch(kernel, grid, arguments, constants, tile)
        assert again is compiled
        self.launched.add(self._compare(kernel, grid, arguments, tile.warps))
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

        def run_and_compare(*given: Any) -> None:
            self._expect(compiled)
            run(*given)
            self.again.add(self._compare(kernel, given[:3], given[9:], tile.warps))

        return SimpleNamespace(run=run_and_compare, function=function, packed_metadata=metadata)

    def _expect(self, compiled: Any) -> None:
        os.environ["PARAMETERS"] = " ".join(map(str, parameter_sizes(compiled.asm["ptx"])))
        self._launches.write_text("")

    def _compare(self, kernel: Any, grid: tuple[int, ...], arguments: Any, warps: int) -> str:
        name, *numbers = self._launches.read_text().split()
        blocks, scratches = (*grid, 1, 1)[:3], (0, 0)
        expected = [*blocks, 32 * warps, *parameters(kernel, arguments), *scratches]
        assert name == kernel.__name__, f"{name} was launched, not {kernel.__name__}"
        assert list(map(int, numbers)) == expected, f"{name} got\n{numbers}, not\n{expected}"
        return name


def parameter_sizes(ptx: str) -> list[int]:
    """Return the bytes of each parameter of the kernel."""
    head = ptx[ptx.index(".entry") :]
    return [BYTES[kind] for kind in re.findall(r"\.param \.(\w+)", head[: head.index("{")])]


def parameters(kernel: Any, arguments: Any) -> Iterator[int]:
    """Return the bits that a kernel must receive. None and compiled-in ones are not passed."""
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        if parameter.is_constexpr:
            continue
        for value in leaves(argument):
            if isinstance(value, Tensor):
                yield value.data_ptr()
            elif isinstance(value, float):
                yield struct.unpack("I", struct.pack("f", value))[0]
            elif value is not None and (value != 1 or parameter.do_not_specialize):
                yield value % 2 ** (64 if abs(value) >= 2**31 else 32)


def leaves(argument: Any) -> Iterator[Any]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from leaves(part)
    else:
        yield argument


def pretend(folder: str) -> None:
    """Pretend that Triton has a CUDA device, and that the Triton backend supports CPU tensors."""
    ctypes.CDLL(f"{folder}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    from triton.backends.nvidia.driver import CudaDriver

    triton.runtime.driver.set_active(CudaDriver())
    backends.BACKENDS["triton"] = backends.Backend("triton", None, lambda device: None)


def run_forward_and_backward(case: Case) -> None:
    """Run a case on the Triton backend, with the gradients of all its tensors."""
    inputs = case.build(torch.bfloat16)
    tensors = [tensor for tensor in leaves(tuple(inputs.tensors.values())) if tensor.is_floating_point()]
    for tensor in tensors:
        tensor.requires_grad_()
    output = case.operation(**inputs.tensors, **inputs.options, backend="triton")
    torch.autograd.grad(output, tensors, torch.ones_like(output), allow_unused=True)


def run_parts_of_composition(target: Target) -> None:
    """Run the kernels that only the composed backend launches."""
    tensors = AttentionCase(N=70, M=0, P=20, D=16).build(torch.bfloat16).tensors
    a = canonical_arguments(**tensors)
    output, logsumexp = torch.empty_like(a.query), torch.empty(a.query.shape[:3])
    launch = prefix_attention.triton_backend.launch
    launch.extend(a, output, logsumexp, target=target)
    launch.merge(a, output, logsumexp, output, logsumexp, target=target)


def main(folder: str, cases: str = "few") -> None:
    pretend(folder)
    target = Target()
    for operation in (prefix_attention, prompt_embedding):
        operation.triton_backend.launch.find_target = lambda device: target
    for case in {"all": CASES, "few": FEW}[cases]:
        for _ in range(3):  # as usual, recorded, repeated
            run_forward_and_backward(case)
    for _ in range(3):
        run_parts_of_composition(target)
    print(*sorted(target.launched), sep="\n")
    print(*sorted(target.again), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
