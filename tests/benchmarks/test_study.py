"""The study in the small: equal budgets, resumption, early stopping, and the committed tables."""

from collections import Counter
from collections.abc import Iterator
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
from benchmarks.results import Record

TINY = Size(layers=1, width=32, heads=2, vocabulary=300, rows=4, length=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a small encoder and texts that state their label. Caches of data sets are there, too."""
    import datasets

    folder = tmp_path_factory.mktemp("study")
    rows = [f"film {'so ' * (i % 5)}{('bad', 'good')[i % 2]} {i}\t{('neg', 'pos')[i % 2]}" for i in range(80)]
    (folder / "reviews.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    data.train_tokenizer(["film so good, so bad"] * 9, TINY.vocabulary).save_pretrained(folder / "model")
    models.build("classification", models.configure("classification", TINY), CPU).save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


def run_study(folder: Path) -> Record:
    """Run a small study, in which prompt tuning fails."""
    arguments = ["study", "--quick", "--data", str(folder / "reviews.tsv"), "--model", str(folder / "model")]
    arguments += ["--device", "cpu", "--out", str(folder / "out"), "--seeds", "1", "--lengths", "2"]
    arguments += ["--methods", "head", "pt", "apt", "--length-methods", "residual+gate"]
    # The prompt is longer than the positions of the model.
    assert main([*arguments, "--prompt-tokens", "200"]) == 1
    return results.read(folder / "out" / "study.json")


def test_all_of_it_and_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_study(folder)
    counts = Counter((row["kind"], row["method"]) for row in record.rows)
    gate = "residual prefix + gate"
    assert counts == {
        **{("search, table", method): 3 for method in ("head alone", "APT")},
        **{("table", method): 1 for method in ("head alone", "APT")},
        ("search, lengths", gate): 3,
        ("lengths", gate): 1,
    }
    assert {fault["peer"] for fault in record.faults} == {"PT"}
    assert all(0.0 <= row["test_accuracy"] <= 1.0 and row["peak_bytes"] > 0 for row in record.rows)
    assert "APT (" in (folder / "out" / "study.md").read_text()
    # Trainings of another command stay in the file and out of the tables.
    record.rows.append({**record.rows[-1], "most_steps": 9})
    record.write(folder / "out")
    trained_again = set()
    monkeypatch.setattr(study.Study, "run", lambda _, key, *more: trained_again.add(key) or 1 / 0)
    assert run_study(folder).rows == [*record.rows[:-1], {**record.rows[-1], "in_tables": False}]
    assert trained_again == {"pt"}


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


@pytest.mark.parametrize("key", ["pt", "dept", "adept", "apt-gates", "residual+gate"])
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
    text = (folder / "study.md").read_text()
    committed = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    for table in study.summarize(results.read(folder / "study.json")):
        assert all(["", *row, ""] in committed for row in [list(table.header), *table.rows])
