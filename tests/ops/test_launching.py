"""Test, without a device, that Triton's own launcher passes the right arguments to the kernels."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.ops.launching.driver import build_driver, describe_environment

pytest.importorskip("triton")

KERNELS = (
    "prefix_attention_bwd_delta_kernel",
    "prefix_attention_bwd_dgate_kernel",
    "prefix_attention_bwd_dkv_kernel",
    "prefix_attention_bwd_dprefix_kernel",
    "prefix_attention_bwd_dq_kernel",
    "prefix_attention_combine_kernel",
    "prefix_attention_decode_kernel",
    "prefix_attention_extend_kernel",
    "prefix_attention_fwd_kernel",
    "prefix_attention_merge_kernel",
    "prefix_attention_sum_kernel",
    "prompt_embedding_bwd_hidden_kernel",
    "prompt_embedding_bwd_spans_kernel",
    "prompt_embedding_bwd_sum_kernel",
    "prompt_embedding_bwd_weights_kernel",
    "prompt_embedding_fwd_kernel",
    "prompt_embedding_low_rank_fwd_kernel",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a ``libcuda.so.1`` without a device."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("Triton builds its launcher against Python's headers, and they are not here")
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("cases", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_get_what_they_are_called_with(driver: Path, cases: str) -> None:
    environment = describe_environment(driver) | {"LAUNCHES": str(driver / "launches")}
    command = [sys.executable, "-m", "tests.ops.launching.program", str(driver), cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tuple(done.stdout.split()) == (*KERNELS, *KERNELS)  # prepared by the call, and repeated from a recording
