"""Run tests of the CPU kernels on the lower instruction sets of this machine, each in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprefix import _native
from fastprefix._native import INSTRUCTION_SETS, find_instruction_set
from fastprefix.ops.backends import BACKENDS

_BUILT = {path.stem.rpartition("_abi")[0] for path in Path(_native.__file__).parent.glob("*.so")}
_BELOW = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(find_instruction_set())]
LOWER = [] if "FASTPREFIX_CPU" in os.environ else [name for name in _BELOW if name in _BUILT]
"""The libraries below this machine's own instruction set. A process that runs one of them has none below it."""

EVERY = 6 if "FASTPREFIX_CPU" in os.environ else 1
"""Instruction sets share most of their code, so only every sixth case runs on the lower ones."""


_REFUSAL = BACKENDS["cpu"].refusal(torch.device("cpu"))
needs_kernels = pytest.mark.skipif(_REFUSAL is not None, reason=str(_REFUSAL))
"""A mark for tests that only pass with the C++ kernels."""


def run_tests(file: str, name: str, chosen: str) -> None:
    """Run the tests of a file that ``chosen`` selects (like ``-k``) on an instruction set."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", chosen]
    environment = {**os.environ, "FASTPREFIX_CPU": name}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
