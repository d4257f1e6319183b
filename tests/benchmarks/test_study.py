"""Test small studies: resumption, rates, entities, LoRA, gates, and the answers to questions."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("optuna")
pytest.importorskip("pandas")
pytest.importorskip("tabulate")
pytest.importorskip("tokenizers")

import numpy as np
import pandas as pd

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
    plan["cells"]["PT"]["lengths"] = [200]
    (folder / "plan.json").write_text(json.dumps(plan))
    arguments = ["study", "--quick", "--data", str(folder / "reviews.tsv"), "--model", str(folder / "model")]
    arguments += ["--device", "cpu", "--out", str(folder / "out"), "--plan", str(folder / "plan.json")]
    assert main([*arguments, "--cells", "head alone", "PT (200)", "DePT (12)", "APT (13)"]) == 1
    return results.read(folder / "out" / "study.json")


def test_all_of_it_and_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_study(folder)
    assert Counter(row["method"] for row in record.rows) == {"head alone": 2, "DePT (12)": 2, "APT (13)": 2}
    assert {fault["peer"] for fault in record.faults} == {"PT (200)"}
    assert all(0.0 <= row["test_score"] <= 1.0 and row["steps"] == 4 for row in record.rows)
    assert set(record.rows[-1]["rates"]) == {"main", "gate"}
    assert [len(gates) for gates in record.rows[-1]["gates"]] == [TINY.layers] * len(record.rows[-1]["gates"]) != []
    assert record.rows[0]["gates"] == []
    assert "| APT (13)" in (folder / "out" / "study.md").read_text()
    trained_again = set()
    monkeypatch.setattr(study.Study, "train", lambda _, name, *more: trained_again.add(name) or 1 / 0)
    assert run_study(folder).rows == record.rows
    assert trained_again == {"PT (200)"}


def test_processes_share_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that another process added since the start are kept."""
    arguments = ["study", "--quick", "--data", str(folder / "reviews.tsv"), "--model", str(folder / "model")]
    arguments += ["--device", "cpu", "--out", str(tmp_path), "--cells"]
    train, started = study.Study.train, []

    def train_beside(self: study.Study, *inputs: Any) -> Any:
        if not started:
            started.append(True)
            assert main([*arguments, "head alone"]) == 0
        return train(self, *inputs)

    monkeypatch.setattr(study.Study, "train", train_beside)
    assert main([*arguments, "prefix tuning (20)"]) == 0
    rows = results.read(tmp_path / "study.json").rows
    assert Counter(row["method"] for row in rows) == {"head alone": 2, "prefix tuning (20)": 2}
    before = (tmp_path / "study.json").read_bytes()
    assert main([*arguments[:-1], "--report"]) == 0
    assert (tmp_path / "study.json").read_bytes() == before


def test_entities_with_lora(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sentences = [[("so", "O"), ("good", "B-thing"), (f"film{i}", "I-thing"), ("bad", "O")][i % 2 :] for i in range(60)]
    text = "\n\n".join("\n".join("\t".join(pair) for pair in sentence) for sentence in sentences)
    (tmp_path / "words.conll").write_text(text + "\n")
    plan = Path(study.__file__).parent / "study_entities.json"
    arguments = ["study", "--quick", "--plan", str(plan), "--data", str(tmp_path / "words.conll"), "--device", "cpu"]
    cells = ["head alone", "APT (13)", "LoRA", "LoRA + prefix (20)"]
    assert main([*arguments, "--model", str(folder / "model"), "--out", str(tmp_path), "--cells", *cells]) == 0
    record = results.read(tmp_path / "study.json")
    assert Counter(row["method"] for row in record.rows) == dict.fromkeys(cells, 2)
    trained = {row["method"]: row["trainable"] for row in record.rows}
    prefix = 2 * 20 * TINY.width * TINY.layers
    assert trained["head alone"] == 0 < trained["LoRA"] == trained["LoRA + prefix (20)"] - prefix


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("O O", []),
        ("B-a I-a O B-b", [("a", 0, 2), ("b", 3, 4)]),
        ("B-a B-a I-b", [("a", 0, 1), ("a", 1, 2), ("b", 2, 3)]),
        ("I-a I-a B-a", [("a", 0, 2), ("a", 2, 3)]),
    ],
)
def test_entities_of_tags(tags: str, entities: list[Any]) -> None:
    assert study.list_entities(tags.split()) == entities


def test_score_of_entities() -> None:
    """One of two entities is found, one is invented. Tokens with the ignored label do not count."""
    names = ["O", "B-a", "I-a"]
    labels = np.array([[-100, 1, -100, 2, 0, 1], [0, 0, 0, -100, -100, -100]])
    guesses = np.array([[1, 1, 0, 2, 0, 0], [0, 1, 0, 1, 1, 1]])
    predicted = SimpleNamespace(predictions=np.eye(3)[guesses], label_ids=labels)
    assert study.measure_entities(predicted, names) == {"score": 0.5}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([1.0, 2.0, 1.5, 1.0, 3.0], "yes"), ([-1.0, -2.0, -1.5, -1.0, -3.0], "no"), ([1.0, -1.0, 1.0, -1.0, 0.5], "open")],
)
def test_answers(differences: list[float], expected: str) -> None:
    assert study.answer(pd.Series(differences))[-1] == expected
    assert study.answer(pd.Series(differences[:4]))[-1] == "open"  # too few seeds


def test_seeds_of_a_changed_cell_are_not_mixed() -> None:
    record = results.read(results.FOLDER / "study-sst2-minilm" / "study.json")
    (before,) = (row for row in study.summarize(record)[0].rows if row[0] == "PT (20)")
    last = next(row for row in reversed(record.rows) if row["method"] == "PT (20)")
    record.rows.append({**last, "seed": 1, "rates": {"prompt": 0.5}})
    (after,) = (row for row in study.summarize(record)[0].rows if row[0] == "PT (20)")
    assert (before[3], after[3]) == ("5", "1")


def test_equal_cells_are_rarely_said_to_differ() -> None:
    samples = np.random.default_rng(0).normal(size=(2_000, 5))
    wrong = sum(study.answer(pd.Series(sample))[-1] != "open" for sample in samples) / len(samples)
    assert 0.04 < wrong < 0.06


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


@pytest.mark.parametrize("name", ["head alone", "DePT (12)", "APT (20)", "residual prefix + gate (10)"])
def test_rates_of_a_cell(name: str) -> None:
    model: Any = models.build("classification", models.configure("classification", TINY), CPU)
    cell = study.expand(json.loads(study.PLAN.read_text())["cells"])[name]
    rates = dict(zip(cell["rates"], (0.25, 0.5), strict=False))
    prepared = study.prepare(cell, rates, model, 0.01)
    rate_of = {p: group["lr"] for group in prepared.groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_head = parameter_name.startswith("classifier") and name != "head alone"
            kind = next((kind for kind in ("prompt", "gate") if kind in rates and kind in parameter_name), "main")
            assert rate_of[parameter] == (0.01 if of_head else rates[kind])
