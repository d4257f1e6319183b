"""Build the CPU kernels. All static settings of the package are in pyproject.toml.

The same sources are compiled once for each instruction set. The package loads one of the resulting libraries (see
``fastprefix/_native/__init__.py``). They only use PyTorch's stable C++ interface of version ``ABI``, so they run with
that version and all later ones. Their names end with the version.

The environment variable ``FASTPREFIX_BUILD_EXT`` controls the build. ``1`` raises an error if the kernels cannot be
built, and ``0`` skips them. By default, they are built if possible. The package works without them.
"""

import os
import platform
import shlex
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

# The names are those of ``fastprefix._native.find_instruction_set()``. Flags never depend on the building machine.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16"]
_AMX = [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
_X86 = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _AVX512_BF16, "amx": _AMX}
_ARM = {"neon_bf16": ["-march=armv8.2-a+bf16"]}

FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
FLAGS += ["-Wno-psabi"]  # vectors are passed between inlined functions only
FLAGS += ["-Wno-maybe-uninitialized"]  # the headers of GCC 12's intrinsics cause this warning
FLAGS += ["-include", str(Path("csrc/common/older_systems.h").resolve())]
# Error messages contain file names. Without their prefixes, the libraries do not depend on the folder of the build.
FLAGS += [f"-ffile-prefix-map={Path.cwd()}=fastprefix", f"-ffile-prefix-map={INCLUDE}=torch"]
FLAGS += [f"-DTORCH_TARGET_VERSION=0x{ABI[0]:02x}{ABI[1]:02x}000000000000"]


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """Return the compiler flags of each instruction set of an architecture, in ascending order."""
    of_machine = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
    return {"default": []} | of_machine.get(machine.lower(), {})


def why_not_built(system: str, wanted: str, compiler: str | None) -> str | None:
    """Return the reason why the kernels are not built, or None if they are built."""
    if wanted == "0":
        return "FASTPREFIX_BUILD_EXT is 0"
    if system != "Linux":
        return f"they require GCC on Linux, but this is {system}"
    return None if compiler else "no C++ compiler was found"


class Build(BuildExtension):  # type: ignore[misc]
    """A build command that compiles each library in a separate folder, because all have the same sources."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FASTPREFIX_BUILD_EXT") == "1":
                raise
            print(f"fastprefix is installed without its CPU kernels: {error}", file=sys.stderr)

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = None  # libraries are built one at a time, since they share the attribute ``build_temp``

    def build_extension(self, extension: Extension) -> None:
        folder = self.build_temp
        self.build_temp = str(Path(folder) / extension.name)
        try:
            super().build_extension(extension)
        finally:
            self.build_temp = folder


class Wheel(bdist_wheel):
    """A wheel for every Python version. The libraries are loaded by PyTorch and are not Python modules."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def extensions() -> list[Extension]:
    wanted = os.environ.get("FASTPREFIX_BUILD_EXT", "")
    program = next(iter(shlex.split(get_cxx_compiler())), "")  # CXX may have arguments, such as "ccache g++"
    reason = why_not_built(platform.system(), wanted, shutil.which(program))
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
