"""Build of the package; everything static is in pyproject.toml. Here: the CPU kernels.

The same sources are compiled once for each instruction set, into libraries of which the package loads one (see
``fastprefix/_native/__init__.py``). Their names say which PyTorch they were compiled against, since they run with no
other. ``FASTPREFIX_BUILD_EXT=0``, or no C++ compiler, leaves them out.
"""

import os
import platform
import shutil
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.extension import Extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

TORCH = "_".join(torch.__version__.split(".")[:2])  # PyTorch keeps its C++ interface within a minor version
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))

# The names of ``torch.backends.cpu.get_cpu_capability()``, in small letters; never the building machine's own set.
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
_AVX512 = [
    *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
]
INSTRUCTION_SETS = {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}

FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
FLAGS += ["-Wno-psabi"]  # vectors are passed between inlined functions only


class Build(BuildExtension):  # type: ignore[misc]
    """Objects of each library in a folder of their own, for they come from the same sources."""

    def build_extension(self, extension: Extension) -> None:
        folder = self.build_temp
        self.build_temp = str(Path(folder) / extension.name)
        try:
            super().build_extension(extension)
        finally:
            self.build_temp = folder


class Wheel(bdist_wheel):
    """One wheel for every Python: the libraries are PyTorch's and no Python modules."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def extensions() -> list[Extension]:
    if os.environ.get("FASTPREFIX_BUILD_EXT", "1") == "0" or shutil.which(get_cxx_compiler()) is None:
        return []
    extra = os.environ.get("FASTPREFIX_CXXFLAGS", "").split()
    return [
        CppExtension(
            f"fastprefix._native.{name}_torch{TORCH}",
            SOURCES,
            extra_compile_args=[*FLAGS, *flags, *extra],
            extra_link_args=["-fopenmp", "-s", *extra],
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True), "bdist_wheel": Wheel},
)
