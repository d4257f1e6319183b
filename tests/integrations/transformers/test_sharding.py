"""Adapters on models that are spread over processes give what one process gives: ``sharded_cells`` says how."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CELLS = {
    2: [
        "ddp:prompt",
        *[
            f"tp:{method}"
            for method in ("cartridge", "prefix-mlp", "apt", "apt-cls", "llama-adapter", "prompt", "adept")
        ],
        *[f"fsdp2-attach-before:{method}" for method in ("prompt", "cartridge")],
        *[f"fsdp2-attach-after:{method}" for method in ("apt", "llama-adapter", "prompt", "prefix-mlp")],
        *[f"fsdp2-loaded:{method}" for method in ("prefix", "prompt")],
    ],
    4: ["tp:prefix", *[f"fsdp2-tp:{method}" for method in ("apt", "prompt", "cartridge")]],
}
"""The cells that run together, by the number of processes."""
BOUND = 1e-10


def launch(module: str, processes: int, *arguments: str) -> None:
    """Run a module of tests in so many processes."""
    options = ["--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", f"{__package__}.{module}", *arguments]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("processes", CELLS)
def test_processes_give_what_one_gives(processes: int, tmp_path: Path) -> None:
    """Losses, gradients, steps of the optimizer, files, generated tokens and their logits, in one run for all cells."""
    file = tmp_path / "results.json"
    launch("sharded_cells", processes, str(file), *CELLS[processes])
    results = json.loads(file.read_text())
    wrong = {cell: results.get(cell, "did not run") for cell in CELLS[processes]}
    wrong = {cell: error for cell, error in wrong.items() if not isinstance(error, float) or error >= BOUND}
    assert not wrong
