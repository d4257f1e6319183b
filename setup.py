"""Build of the package; everything static is in pyproject.toml. Here: the CPU kernels.

The same sources are compiled once for each instruction set, into libraries of which the package loads one (see
``fastprefix/_native/__init__.py``). They use nothing but PyTorch's stable C++ interface, as it was in version ``ABI``,
so they run with that version and every later one; their names end with it.

The environment variable ``FASTPREFIX_BUILD_EXT`` says whether they are built: ``1`` fails where that is not possible,
``0`` leaves them out. Without it they are built where that is possible; the package works without them.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.extension import Extension
from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler

ABI = (2, 11)
INCLUDE = Path(torch.__file__).parent / "include"
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))

# The names of ``fastprefix._native.instruction_set()``; never the building machine's own set.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16"]
_AMX = [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
_X86 = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _AVX512_BF16, "amx": _AMX}
_ARM = {"neon_bf16": ["-march=armv8.2-a+bf16"]}

FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
FLAGS += ["-Wno-psabi"]  # vectors are passed between inlined functions only
FLAGS += ["-Wno-maybe-uninitialized"]  # the intrinsics of GCC 12 warn of themselves
FLAGS += ["-include", str(Path("csrc/common/older_systems.h").resolve())]
# Errors name files, and the libraries are the same wherever they are built.
FLAGS += [f"-ffile-prefix-map={Path.cwd()}=fastprefix", f"-ffile-prefix-map={INCLUDE}=torch"]
FLAGS += [f"-DTORCH_TARGET_VERSION=0x{ABI[0]:02x}{ABI[1]:02x}000000000000"]


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """Return the flags of each instruction set of an architecture, the least one first."""
    of_machine = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
    return {"default": []} | of_machine.get(machine.lower(), {})


def why_not_built(system: str, wanted: str, compiler: str | None) -> str | None:
    """Return why the kernels are left out; None: they are built."""
    if wanted == "0":
        return "FASTPREFIX_BUILD_EXT is 0"
    if system != "Linux":
        return f"they are written for GCC on Linux, and this is {system}"
    return None if compiler else "there is no C++ compiler"


class Build(BuildExtension):  # type: ignore[misc]
    """Objects of each library in a folder of their own, for they come from the same sources."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FASTPREFIX_BUILD_EXT") == "1":
                raise
            print(f"fastprefix is installed without its CPU kernels: {error}", file=sys.stderr)

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
    wanted = os.environ.get("FASTPREFIX_BUILD_EXT", "")
    reason = why_not_built(platform.system(), wanted, shutil.which(get_cxx_compiler()))
    if reason is not None:
        if wanted == "1":
            raise SystemExit(f"FASTPREFIX_BUILD_EXT is 1, but the CPU kernels cannot be built: {reason}")
        print(f"fastprefix is installed without its CPU kernels: {reason}", file=sys.stderr)
        return []
    extra = os.environ.get("FASTPREFIX_CXXFLAGS", "").split()
    return [
        Extension(
            f"fastprefix._native.{name}_abi{ABI[0]}_{ABI[1]}",
            SOURCES,
            include_dirs=[str(INCLUDE)],
            library_dirs=[str(INCLUDE.parent / "lib")],
            libraries=["torch_cpu"],
            extra_compile_args=[*FLAGS, *flags, *extra],
            extra_link_args=["-s", *extra],
            language="c++",
        )
        for name, flags in instruction_sets(platform.machine()).items()
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True), "bdist_wheel": Wheel},
)
