"""The study in the small: equal budgets, resumption, early stopping, and the committed tables."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("optuna")
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
    """Run a small study, in which prompt tuning fails, for its prompt is longer than the positions of the model."""
    plan = json.loads(study.PLAN.read_text())
    plan["cells"]["PT"]["config"]["num_virtual_tokens"] = 200
    (folder / "plan.json").write_text(json.dumps(plan))
    arguments = ["study", "--quick", "--data", str(folder / "reviews.tsv"), "--model", str(folder / "model")]
    arguments += ["--device", "cpu", "--out", str(folder / "out"), "--plan", str(folder / "plan.json")]
    assert main([*arguments, "--cells", "head alone", "PT", "DePT", "APT, slow gates"]) == 1
    return results.read(folder / "out" / "study.json")


def test_all_of_it_and_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_study(folder)
    assert Counter(row["method"] for row in record.rows) == {"head alone": 2, "DePT": 2, "APT, slow gates": 2}
    assert {fault["peer"] for fault in record.faults} == {"PT"}
    assert all(0.0 <= row["test_accuracy"] <= 1.0 and row["peak_bytes"] > 0 for row in record.rows)
    assert set(record.rows[-1]["rates"]) == {"main", "gate"}
    assert "APT, slow gates (" in (folder / "out" / "study.md").read_text()
    trained_again = set()
    monkeypatch.setattr(study.Study, "train", lambda _, name, *more: trained_again.add(name) or 1 / 0)
    assert run_study(folder).rows == record.rows
    assert trained_again == {"PT"}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (None, [], "texts.tsv"),
        ("sentence\nx\ny\n", [], "--label-column"),
        ("sentence\tlabel\nx\t1\ny\t1\n", [], "two or more classes"),
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


@pytest.mark.parametrize("name", ["head alone", "DePT", "APT, slow gates", "residual prefix + gate"])
def test_rates_of_a_cell(name: str) -> None:
    model: Any = models.build("classification", models.configure("classification", TINY), CPU)
    cell = json.loads(study.PLAN.read_text())["cells"][name]
    rates = dict(zip(cell["rates"], (0.25, 0.5), strict=False))
    prepared = study.prepare(cell, rates, model, 0.01)
    rate_of = {p: group["lr"] for group in prepared.groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_head = parameter_name.startswith("classifier") and name != "head alone"
            kind = next((kind for kind in ("prompt", "gate") if kind in rates and kind in parameter_name), "main")
            assert rate_of[parameter] == (0.01 if of_head else rates[kind])


def test_the_committed_tables_follow_from_the_committed_results() -> None:
    folder = results.FOLDER / "study-sst2-minilm"
    text = (folder / "study.md").read_text()
    committed = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    compared = json.loads(study.PLAN.read_text())["compared"]
    for table in study.summarize(results.read(folder / "study.json"), compared):
        assert all(["", *row, ""] in committed for row in [list(table.header), *table.rows])
