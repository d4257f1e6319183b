"""Test that training with DeepSpeed's ZeRO in two processes equals training in one process, in float32.

DeepSpeed builds a library for the CPU in its first run. Set ``DS_ACCELERATOR=cpu`` on a machine with a GPU.
"""

import json
from pathlib import Path

import pytest

from .test_sharding import launch


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, files and generated tokens are equal. Detaching from a partitioned model is refused."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    file = tmp_path / "results.json"
    launch("deepspeed_training", 2, str(file))
    results = json.loads(file.read_text())
    assert all("must not be partitioned by DeepSpeed" in message for message in results.pop("refused"))
    assert results.pop("changed") < 1e-5
    for case, found in results.items():
        assert found["loss"] < 1e-5, case
        assert found["saved"] < 1e-4, case
        assert found["generated"] == 0, case
