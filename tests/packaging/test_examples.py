"""The examples run as they are, and leave an adapter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TABLE = "sentence\tlabel\n" + "".join(f'a "{word}" film\t{label}\n' for word, label in (("fine", 1), ("poor", 0)) * 6)


def run(example: str, folder: Path, *options: str) -> str:
    """What an example prints; its adapter goes to the folder."""
    command = [sys.executable, str(ROOT / "examples" / example), "--out", str(folder / "adapter"), *options]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    return done.stdout


@pytest.mark.parametrize("table", [False, True])
def test_finetune_classifier(table: bool, tmp_path: Path) -> None:
    (tmp_path / "data.tsv").write_text(TABLE, encoding="utf-8")
    printed = run("finetune_classifier.py", tmp_path, *(["--data", "data.tsv", "--epochs", "1"] if table else []))
    assert "parameters are trained" in printed
    accuracy = float(re.findall(r"accuracy on held-out rows: (\S+)", printed)[0])
    assert table or accuracy > 0.9


def test_adept_decoder(tmp_path: Path) -> None:
    printed = run("adept_decoder.py", tmp_path)
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("epoch")]
    assert losses[-1] < 0.7 * losses[0]
    assert "\nthe film " in printed
