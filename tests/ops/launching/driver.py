"""Build the driver without a device, ``driver.c``, and make Triton find it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ONLY_THERE = (
    "cuCtxGetDevice",
    "cuCtxGetLimit",
    "cuCtxSetCurrent",
    "cuCtxSetLimit",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuFuncSetAttribute",
    "cuFuncSetCacheConfig",
    "cuLaunchKernel",
    "cuModuleUnload",
    "cuOccupancyMaxActiveClusters",
    "cuStreamIsCapturing",
    "cuTensorMapEncodeTiled",
)
"""Functions that the launcher wants to find."""


def build_driver(folder: Path) -> Path:
    """Build ``libcuda.so.1`` in a folder, and return the folder."""
    import triton

    (folder / "rest.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in ONLY_THERE))
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    sources = [Path(__file__).parent / "driver.c", folder / "rest.c"]
    output = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1", "-o", output, *sources]
    subprocess.run(command, check=True)
    return folder


def describe_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that finds the driver in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {
        "LD_LIBRARY_PATH": f"{folder}:{environment.get('LD_LIBRARY_PATH', '')}",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_LIBCUDA_PATH": str(folder),
    }


def run_with_driver(module: str, arguments: Sequence[str], **variables: str) -> int:
    """Run a module in a process that finds the driver, whose folder is its option ``--driver``. Return the exit status.

    ``variables`` are added to the environment. Launches are not written down.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = describe_environment(build_driver(Path(folder)))
        environment |= variables
        command = [sys.executable, "-m", module, *arguments, "--driver", folder]
        return subprocess.run(command, env=environment).returncode
