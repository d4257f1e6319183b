"""Test that adapters on models that are spread over processes give the results of one process (``sharded_cells``)."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

CELLS = {
    2: [
        "ddp:prompt",
        *[f"tp:{name}" for name in ("cartridge", "prompt", "start", "merge", "mixed_training", "accelerate")],
        "fsdp2-attach-before:prompt",
        *[f"fsdp2-attach-after:{name}" for name in ("prompt", "cache", "mixed", "checkpoint")],
    ],
    4: ["tp:prefix", *[f"fsdp2-tp:{name}" for name in ("apt", "prompt", "start")]],
}
"""The cells that run together, by the number of processes."""
MORE = [
    *[f"tp:{name}" for name in ("prefix-mlp", "switch", "compose", "checkpoint", "whole", "one_key_head")],
    "fsdp2-attach-before:compose_attached",
    *[f"fsdp2-attach-after:{name}" for name in ("llama-adapter", "merge", "compose")],
    "fsdp2-loaded:prompt",
]
"""More cells for two processes, which run every night."""
BOUND = 1e-10


def launch(module: str, processes: int, *arguments: str) -> None:
    """Run a test module in this number of processes."""
    options = ["--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", f"{__package__}.{module}", *arguments]
    run = subprocess.run(command, cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize(
    ("processes", "cells"),
    [
        pytest.param(2, CELLS[2], id="2"),
        pytest.param(2, MORE, id="2-more", marks=pytest.mark.slow),
        pytest.param(4, CELLS[4], id="4", marks=pytest.mark.slow),
    ],
)
def test_processes_give_what_one_gives(processes: int, cells: list[str], tmp_path: Path) -> None:
    """Losses, gradients, optimizer steps, files, generated tokens and their logits, in one run for all cells."""
    file = tmp_path / "results.json"
    launch("sharded_cells", processes, str(file), *cells)
    results = json.loads(file.read_text())
    wrong = {cell: results.get(cell, "did not run") for cell in cells}
    wrong = {cell: error for cell, error in wrong.items() if not (isinstance(error, float) and error < BOUND)}
    assert not wrong


def test_the_committed_table_has_no_failures() -> None:
    """Cells of DeepSpeed are in float32."""
    with (Path(__file__).parents[4] / "docs" / "devices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    wrong = [row for row in rows if not float(row["largest error"]) < (1e-4 if row["layout"] == "zero" else BOUND)]
    assert not wrong


def test_failures_are_errors_on_all_ranks(tmp_path: Path) -> None:
    """If a rank differs, fails or is missing, all ranks raise an error in time, and files do not change."""
    launch("sharded_failures", 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"errors-{rank}.json").read_text()) for rank in (0, 1))
    said = {
        "attach_different_lengths": ("ValueError: to attach an adapter, all ranks must use the same",) * 2,
        "attach_different_texts": ("ValueError: to attach an adapter, all ranks must use the same",) * 2,
        "attach_on_one_rank": ("RuntimeError: rank 1 of the model did not respond within", "nothing"),
        "attach_what_one_rank_cannot": (
            "RuntimeError: rank 1 failed to attach an adapter",
            "ValueError: `modules_to_s",
        ),
        "load_from_different_folders": ("ValueError: to load an adapter, all ranks must use the same",) * 2,
        "load_what_one_rank_has_not": ("RuntimeError: rank 1 failed to read an adapter", "FileNotFoundError"),
        "save_on_one_rank": ("nothing", "RuntimeError: rank 0 of the model did not respond within"),
        "save_where_nothing_can_be_written": ("FileExistsError", "RuntimeError: rank 0 failed to save an adapter"),
        "save_while_the_first_rank_dies": (
            "KeyboardInterrupt",
            "RuntimeError: rank 0 of the model did not respond within",
        ),
    }
    assert first.keys() == said.keys()
    for name, (of_first, of_second) in said.items():
        assert first[name].startswith(of_first)
        assert second[name].startswith(of_second)
        assert " and changed the files" not in first[name] + second[name]
        assert " seconds" not in first[name].rpartition(" after ")[2]
