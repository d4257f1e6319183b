"""The study in the small: equal budgets, resumption, early stopping, and the committed tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("tabulate")
pytest.importorskip("tokenizers")

from benchmarks import data, models, results, study
from benchmarks.__main__ import main
from benchmarks.models import Size

TINY = Size(layers=2, width=32, heads=2, vocabulary=300, rows=4, length=16)
CPU = torch.device("cpu")


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return texts that state their label."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    path = tmp_path / "reviews.tsv"
    rows = [f"film {'so ' * (i % 5)}{('bad', 'good')[i % 2]} {i}\t{('neg', 'pos')[i % 2]}" for i in range(80)]
    path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def arguments(reviews: Path, tmp_path: Path) -> list[str]:
    """Return a command with a small local encoder."""
    words = data.train_tokenizer(["film so good, so bad"] * 9, TINY.vocabulary)
    words.save_pretrained(tmp_path / "model")
    models.build("classification", models.configure("classification", TINY), CPU).save_pretrained(tmp_path / "model")
    few = ["--methods", "head", "apt", "--length-methods", "residual+gate", "--device", "cpu"]
    model = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    return ["study", "--quick", "--data", str(reviews), *model, *few]


def test_all_of_it_and_again(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(arguments) == 0
    document = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [row["method"] for row in document["table"]] == ["head alone", "APT"]
    for row in document["table"]:
        assert len(row["search"]) == 3
        assert list(row["runs"]) == ["0", "1"]
        assert all(0.0 <= run["test_accuracy"] <= 1.0 and run["peak_bytes"] > 0 for run in row["runs"].values())
    assert list(document["lengths"]["residual prefix + gate"]) == ["2", "4"]
    assert "APT (" in (tmp_path / "out" / "study.md").read_text()
    monkeypatch.setattr(study.Study, "run", lambda *_: pytest.fail("trained a second time"))
    assert main(arguments) == 0
    again = json.loads((tmp_path / "out" / "study.json").read_text())
    assert (again["table"], again["lengths"]) == (document["table"], document["lengths"])


def test_a_failing_method_loses_no_other_result(arguments: list[str], tmp_path: Path) -> None:
    # The prompt is longer than the positions of the model.
    assert main([*arguments, "--methods", "head", "pt", "--prompt-tokens", "200", "--lengths", "--seeds", "1"]) == 1
    head, prompt = json.loads((tmp_path / "out" / "study.json").read_text())["table"]
    assert head["runs"]
    assert not prompt["runs"]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (None, [], "texts.tsv"),
        ("sentence\nx\ny\n", [], "--label-column"),
        ("sentence\tlabel\nx\t1\ny\t1\n", ["--dev", "DATA", "--test", "DATA"], "two or more classes"),
        ("sentence\tlabel\nx\t1\ny\t0\n", [], "--dev"),
    ],
)
def test_errors(
    rows: str | None, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.tsv"
    if rows is not None:
        path.write_text(rows)
    more = [str(path) if option == "DATA" else option for option in more]
    assert main(["study", "--quick", "--model", "x", "--data", str(path), "--out", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("key", [key for key in study.PEERS if key not in ("full", "head")])
def test_every_method_fills_its_budget(key: str) -> None:
    model: Any = models.build("classification", models.configure("classification", TINY), CPU)
    options: Any = type("Options", (), {"prompt_tokens": 40, "prefix_tokens": 40, "max_length": TINY.length})
    config = study.fit_config(key, model, options)
    assert config is not None
    count = study.count_parameters(model, config)
    budget = 40 * TINY.width * (1 if study.PEERS[key][1] == "prompt" else 2 * TINY.layers)
    assert 0.9 * budget < count <= budget
    prepared = study.prepare(key, config, study.set_rates(0.25, 0.5, 0.125), model, head_rate=0.01)
    rate_of = {p: group["lr"] for group in prepared.groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds = {"classifier": 0.01, "fastprefix.prompt": 0.5}
            gate = 0.125 if "gate" in name else 0.25
            assert rate_of[parameter] == next((kinds[k] for k in kinds if name.startswith(k)), gate)


def test_early_stopping_keeps_the_best_weights() -> None:
    model: Any = models.build("classification", models.configure("classification", TINY), CPU)
    watcher = study.Watcher(model, patience=2)
    stopped = []
    for step, score in enumerate((0.5, 0.6, 0.6, 0.5)):
        torch.nn.init.constant_(model.classifier.bias, float(step))
        control = type("Control", (), {"should_training_stop": False})()
        state = type("State", (), {"global_step": step})()
        watcher.on_evaluate(None, state, control, metrics={"eval_accuracy": score, "eval_loss": 1.0})
        stopped.append(control.should_training_stop)
    watcher.restore()
    assert stopped == [False, False, False, True]
    assert model.classifier.bias.tolist() == [1.0, 1.0]


def test_the_committed_tables_follow_from_the_committed_results() -> None:
    folder = results.FOLDER / "study-sst2-minilm"
    document, text = json.loads((folder / "study.json").read_text()), (folder / "study.md").read_text()
    committed = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    for table in study.summarize(document):
        assert all(["", *row, ""] in committed for row in [list(table.header), *table.rows])
