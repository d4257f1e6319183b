"""Choose and load the library of compiled CPU kernels for this machine, or explain why none can be used."""

import ctypes
import os
import platform
from pathlib import Path

import torch

from .._once import once

_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "its C++ extension was not built (no C++ compiler when the package was installed, a compiler that failed, or "
    "FASTPREFIX_BUILD_EXT=0)"
)


_X86 = ("default", "avx2", "avx512", "avx512_bf16", "amx")
_ARM = ("default", "neon_bf16")
ARCHITECTURES = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
"""The instruction sets of each architecture, in ascending order."""
INSTRUCTION_SETS = ARCHITECTURES.get(platform.machine().lower(), ("default",))
"""The instruction sets of this machine's architecture, in ascending order."""


@once
def find_instruction_set() -> str:
    """Return the instruction set of the kernels: PyTorch's choice, or its extension if the CPU multiplies bfloat16.

    ``ATEN_CPU_CAPABILITY`` lowers PyTorch's choice, and ``FASTPREFIX_CPU`` lowers this one.
    """
    found = torch.backends.cpu.get_cpu_capability().lower()
    if found == "avx512" and torch.cpu._is_avx512_bf16_supported():
        # On Linux, a process must request permission to use the tiles.
        found = "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "avx512_bf16"
    if found not in INSTRUCTION_SETS or (found == "default" and "ATEN_CPU_CAPABILITY" not in os.environ):
        found = "neon_bf16" if _has_neon_bf16() else "default"  # PyTorch has other names for those of ARM
    most = os.environ.get("FASTPREFIX_CPU", found)
    if most not in INSTRUCTION_SETS:
        raise ValueError(f"`FASTPREFIX_CPU` must be one of {', '.join(INSTRUCTION_SETS)}, got {most}")
    return min(found, most, key=INSTRUCTION_SETS.index)


def _has_neon_bf16() -> bool:
    """Return True if Linux reports an ARM processor that multiplies bfloat16."""
    if platform.machine() != "aarch64" or platform.system() != "Linux":
        return False
    at_hwcap2, hwcap2_bf16 = 26, 1 << 14
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype = ctypes.c_ulong
    return bool(getauxval(ctypes.c_ulong(at_hwcap2)) & hwcap2_bf16)


def find_library(folder: Path = _FOLDER, torch_version: str = torch.__version__) -> Path | str:
    """Return the library in ``folder`` for this machine and a PyTorch version, or the reason why none can be used.

    The name of a library ends with the PyTorch version whose stable C++ interface it was compiled against (see
    ``setup.py``). The library runs with this version and all later ones. If a compiler was too old for the instruction
    set of this machine, the next lower one is used.
    """
    usable = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(find_instruction_set()) + 1]
    by_set = (list(folder.glob(f"{name}_abi*.so")) for name in reversed(usable))
    found = {path.stem.rpartition("_abi")[2]: path for path in next(filter(None, by_set), [])}
    if not found:
        return _NOT_BUILT
    abi, library = max(found.items(), key=lambda item: _parse_version(item[0], "_"))
    if _parse_version(torch_version, ".") < _parse_version(abi, "_"):
        return f"its C++ extension requires PyTorch {abi.replace('_', '.')} or newer, but this is {torch_version}"
    return library


def _parse_version(version: str, separator: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in version.split(separator)[:2])


def describe() -> str:
    """Return the instruction set and the PyTorch versions of the library for this machine, or "none"."""
    library = find_library()
    if isinstance(library, str):
        return "none"
    name, _, abi = library.stem.rpartition("_abi")
    return f"{name}, for PyTorch {abi.replace('_', '.')} and newer (stable ABI)"


@once
def load() -> str | None:
    """Load the library once, which registers its kernels with PyTorch. Return None, or the reason why it failed."""
    library = find_library()
    if isinstance(library, str):
        return library
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"its C++ extension {library.name} failed to load: {error}"
    return None
