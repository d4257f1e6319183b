"""Test the emulation of other processors: its program runs a library like PyTorch does, and reports faults."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprefix import _native

ROOT = Path(__file__).parents[2]
LIBRARY = next(Path(_native.__file__).parent.glob("default_abi*.so"), None)


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a separate process, because the emulation becomes a backend there."""
    command = [sys.executable, "-c", f"import sys\nfrom tools.emulate.__main__ import *\n{program}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(LIBRARY is None, reason="the C++ extension was not built")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_cases_pass(tmp_path: Path) -> None:
    """The library calls PyTorch's functions, and the emulator provides them."""
    libraries = f"LD_LIBRARY_PATH={Path(torch.__file__).parent / 'lib'}"
    done = run(
        f"""
emulator = build_emulator("c++", Path({str(tmp_path)!r}))
cases = [*list_cases()[:6], *list_cases()[-8::3]]
sys.exit(run_all({{"default": ["env", {libraries!r}, emulator, {str(LIBRARY)!r}]}}, cases))
"""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("0 of 9 runs missed a bound")
    assert all(" ok " in line for line in lines[1:-1])
    assert any("offset=ffn" in line for line in lines)


def test_an_emulator_that_ends_is_a_miss() -> None:
    done = run("sys.exit(run_all({'default': ['false']}, list_cases()[:1]))")
    assert done.returncode == 1, done.stderr
    assert "MISS" in done.stdout
    assert "prefix_attention: the emulator exited with status 1" in done.stdout


def test_what_a_machine_lacks_is_said(tmp_path: Path) -> None:
    done = run("sys.exit(main(['--compiler', 'no-such-compiler']))")
    assert done.returncode == 1
    assert done.stderr.startswith("no-such-compiler is not installed")
    done = run(f"sys.exit(main(['--compiler', 'sh', '--qemu', 'sh', '--sysroot', {str(tmp_path)!r}]))")
    assert done.returncode == 1
    assert done.stderr.startswith("`--sysroot` must contain lib/ld-linux-aarch64.so.1")
