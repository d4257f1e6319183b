"""Test that the examples run unchanged and save an adapter."""

import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLE = "sentence\tlabel\n" + "".join(f'a "{word}" film\t{label}\n' for word, label in (("fine", 1), ("poor", 0)) * 6)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder. Examples can import files beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the output of an example, which saves its adapter."""
    monkeypatch.setattr(sys, "argv", [example, "--out", "adapter", *options])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    assert Path("adapter", "adapter_model.safetensors").is_file()
    return capsys.readouterr().out


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_what_an_example_imports_from_another_exists(example: Path) -> None:
    """Nothing else would notice if the libraries of an example are not installed."""
    for node in ast.walk(ast.parse(example.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (source := EXAMPLES / f"{node.module}.py").exists():
            defined = runpy.run_path(str(source))
            assert {name.name for name in node.names} <= defined.keys()


@pytest.mark.parametrize("table", [False, True])
def test_finetune_classifier(table: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.tsv").write_text(TABLE, encoding="utf-8")
    options = ["--data", "data.tsv", "--epochs", "1"] if table else []
    printed = run("finetune_classifier.py", monkeypatch, capsys, *options)
    assert "parameters are trained" in printed
    accuracy = float(re.findall(r"accuracy on held-out rows: (\S+)", printed)[0])
    assert table or accuracy > 0.9


def test_adept_decoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("adept_decoder.py", monkeypatch, capsys)
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("epoch")]
    assert losses[-1] < 0.7 * losses[0]
    assert "\nthe film " in printed


def test_lora_prefix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("lora_prefix.py", monkeypatch, capsys)
    assert re.search(r"are trained .*: fastprefix 2,048, peft 4,096\n", printed)
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("epoch")]
    assert losses[-1] < 0.5 * losses[0]
    assert Path("adapter", "lora", "adapter_model.safetensors").is_file()
    assert "\nthe film " in printed


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_trl_adapter(
    trainer: str, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer", trainer, "--method", method, "--cpu", "--steps", "8", "--lr", "0.3"]
    printed = run("trl_adapter.py", monkeypatch, capsys, *options)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([-\d.e]+)", printed)]
    assert len(losses) == 8
    if trainer != "grpo":  # whose loss is around 0
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("own_text", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cartridge(own_text: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("the film was dull and the cast was awful " * 5, encoding="utf-8")
    options = ["--text", "text.txt", "--questions", "3"] if own_text else []
    printed = run("cartridge.py", monkeypatch, capsys, *options)
    divergences = [float(value) for value in re.findall(r"KL to the document in context \D*([\d.]+)", printed)]
    frozen, untrained, *_, trained = divergences
    assert trained < 0.5 * untrained
    assert trained < frozen


def test_serve_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_many.py", "--requests", "10", "--tokens", "3"])
    runpy.run_path(str(EXAMPLES / "serve_many.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("tokens per second") == 2
    assert "user0: " in printed
    assert "AdapterStore(4 adapters, 68 tokens" in printed
