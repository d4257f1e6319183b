"""Kernels get what they are called with, through Triton's own launcher: proved without a device."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = (
    "prefix_attention_bwd_delta_kernel",
    "prefix_attention_bwd_dkv_kernel",
    "prefix_attention_bwd_dprefix_kernel",
    "prefix_attention_bwd_dq_kernel",
    "prefix_attention_combine_kernel",
    "prefix_attention_decode_kernel",
    "prefix_attention_fwd_kernel",
    "prefix_attention_sum_kernel",
    "prompt_embedding_bwd_hidden_kernel",
    "prompt_embedding_bwd_spans_kernel",
    "prompt_embedding_bwd_weights_kernel",
    "prompt_embedding_fwd_kernel",
    "prompt_embedding_low_rank_fwd_kernel",
)
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
    "cuTensorMapEncodeTiled",
)
"""Functions that the launcher wants to find."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ``libcuda.so.1`` that has no device."""
    import triton

    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("Triton builds its launcher against Python's headers, and they are not here")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "rest.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in ONLY_THERE))
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    sources = [Path(__file__).parent / "launching" / "driver.c", folder / "rest.c"]
    output = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1", "-o", output, *sources]
    subprocess.run(command, check=True)
    return folder


def test_kernels_get_what_they_are_called_with(driver: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "LAUNCHES": str(driver / "launches"),
        "LD_LIBRARY_PATH": f"{driver}:{environment.get('LD_LIBRARY_PATH', '')}",
        "TRITON_CACHE_DIR": str(driver / "cache"),
        "TRITON_LIBCUDA_PATH": str(driver),
    }
    command = [sys.executable, "-m", "tests.ops.launching.program", str(driver)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tuple(done.stdout.split()) == KERNELS
