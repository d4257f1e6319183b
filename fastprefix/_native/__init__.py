"""The compiled CPU kernels: which of the libraries this machine runs, and, where none can be, why."""

from pathlib import Path

import torch

from .._once import once

_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "its C++ extension was not built (no C++ compiler when the package was installed, or FASTPREFIX_BUILD_EXT=0)"
)


def instruction_set() -> str:
    """The library's name: PyTorch's own choice (``ATEN_CPU_CAPABILITY`` lowers it), plus bfloat16 products."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return capability if capability in ("avx2", "avx512") else "default"


@once
def load() -> str | None:
    """Load the library, once, which registers its kernels with PyTorch; why not, if it cannot be."""
    library = _FOLDER / f"{instruction_set()}.so"
    if not library.exists():
        return _NOT_BUILT
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"its C++ extension {library.name} failed to load: {error}"
    return None
