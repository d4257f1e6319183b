"""Training in two processes, with DDP and with FSDP2, comes to what one process comes to."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distributed_training import CASES


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(mode: str, tmp_path: Path) -> None:
    """Losses, parameters, and the adapter that is saved. Language models compute their loss in float32."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *launch,
        "-m",
        "tests.integrations.transformers.distributed_training",
        mode,
        str(tmp_path / "results.pt"),
    ]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    results, messages = torch.load(tmp_path / "results.pt")
    assert list(results) == CASES
    for case, (actual, expected) in results.items():
        tolerance = 1e-10 if case[0] == "encoder" else 1e-5
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=(*case, name): f"{n}: {m}"
            )
    assert len(messages) == 3
    assert all("`model` must not be sharded" in message for message in messages)
