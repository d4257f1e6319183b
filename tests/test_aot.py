"""Every kernel compiles ahead of time, without a GPU, within the chip's registers and shared memory."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def aot(*options: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process: whether Triton interprets or compiles is settled when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastprefix", "aot", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("arch", "instruction"), [("sm_80", " mma "), ("sm_90", " wgmma ")])
def test_compiles_without_spills(arch: str, instruction: str) -> None:
    done = aot("--quick", "--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith(" 0 not acceptable")
    assert {line.split()[3] for line in lines[:-1]} >= {"embedding_fwd", "embedding_bwd_hidden", "decode", "combine"}
    for kernel in ("fwd", "bwd_dq", "bwd_dkv", "bwd_dprefix"):
        assert instruction in next(line for line in lines if f" {kernel} " in line)


def test_a_spill_is_not_acceptable() -> None:
    from fastprefix.aot import Report
    from fastprefix.ops.prefix_attention.triton.tiles import Tile

    tile = Tile(64, 64, 64, 4, 2)
    known = ("fwd", "sm_90", "bfloat16", "D64", "full")
    assert Report(*known, tile, 255, spill=8).fault is not None
    assert Report(*known, tile._replace(spills="measured faster"), 255, spill=8).fault is None
    assert Report(*known, tile, 100, shared=228 * 1024).fault is not None
    assert Report(*known, tile, failure="error").fault is not None
