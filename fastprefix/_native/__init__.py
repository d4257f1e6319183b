"""The compiled CPU kernels: which of the libraries this machine runs, and, where none can be, why."""

from pathlib import Path

import torch

from .._once import once

_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "its C++ extension was not built (no C++ compiler when the package was installed, or FASTPREFIX_BUILD_EXT=0)"
)


def instruction_set() -> str:
    """PyTorch's own choice (``ATEN_CPU_CAPABILITY`` lowers it), plus bfloat16 products."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return capability if capability in ("avx2", "avx512") else "default"


def find_library(folder: Path, torch_version: str) -> Path | str:
    """Return the library in ``folder`` for this machine and a PyTorch version, or the reason why there is none.

    The name of a library ends with the PyTorch version that it was compiled against (``setup.py``). With another one it
    might load and then crash, since PyTorch's C++ interface changes from one minor version to the next.
    """
    suffix = "_torch"
    wanted = "_".join(torch_version.split(".")[:2])
    library = folder / f"{instruction_set()}{suffix}{wanted}.so"
    if library.exists():
        return library
    others = sorted({path.stem.rpartition(suffix)[2] for path in folder.glob(f"*{suffix}*.so")} - {wanted})
    if not others:
        return _NOT_BUILT
    built = " and ".join(version.replace("_", ".") for version in others)
    return (
        f"its C++ extension was built for PyTorch {built}, and this is {torch_version}: "
        "install fastprefix again, with --no-build-isolation"
    )


@once
def load() -> str | None:
    """Load the library, once, which registers its kernels with PyTorch; why not, if it cannot be."""
    library = find_library(_FOLDER, torch.__version__)
    if isinstance(library, str):
        return library
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"its C++ extension {library.name} failed to load: {error}"
    return None
