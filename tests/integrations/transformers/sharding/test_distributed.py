"""Test that training in two processes, with DDP and with FSDP2, equals training in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distributed_training import CASES, WRAPPERS


@pytest.mark.slow  # test_sharding and test_launching train in two processes on every change
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Losses, parameters and saved adapters are equal. Language models compute their loss in float32."""
    file = tmp_path / "results.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "tests.integrations.transformers.sharding.distributed_training", str(file)]
    run = subprocess.run(command, cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    results, alone = torch.load(file)
    assert list(results) == list(WRAPPERS)
    for mode, of_cases in results.items():
        assert list(of_cases) == CASES
        for case, actual in of_cases.items():
            tolerance, expected = 1e-10 if case[0] == "encoder" else 1e-5, alone[case]
            assert actual.keys() == expected.keys()
            for name in expected:
                where = (mode, *case, name)
                torch.testing.assert_close(
                    actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=where: f"{n}: {m}"
                )
