"""The study on real text in the small: equal budgets, resumption, early stopping, what is read and written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import fastprefix
from benchmarks import models
from benchmarks.cli import main
from benchmarks.errors import BenchmarkError
from benchmarks.models import Size
from benchmarks.study import batches, contestants, gates, plan, texts, training
from benchmarks.study.batches import Encoded
from benchmarks.study.contestants import ENTRIES, NETWORKS, Budget, Contestant, Rates
from benchmarks.study.plan import Findings, Plan
from benchmarks.study.store import Store
from benchmarks.study.texts import Sizes, Source
from benchmarks.study.training import EarlyStopping
from benchmarks.study.trials import GateReading, Outcome, Point, Setting, Subject, Trial

CPU = torch.device("cpu")
TINY = Size(layers=2, width=32, heads=2, vocabulary=64, rows=4, length=16)
PNG = b"\x89PNG"
SETTING = Setting(
    steps=4, length_steps=3, search_steps=2, evaluate_every=2, patience=2, rows=4, max_length=16, head_rate=1e-2
)
SUBJECT = Subject("weights", "texts", {"torch": "2"})
ALL = Sizes(None, None, None)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from, or left in, the user's own caches."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Texts of several lengths that say their label."""
    path = tmp_path / "reviews.tsv"
    rows = [f"film {'so ' * (i % 5)}{('bad', 'good')[i % 2]} {i}\t{('neg', 'pos')[i % 2]}" for i in range(80)]
    path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return path


def _arguments(data: Path, out: Path, *more: str) -> list[str]:
    few = ["--methods", "head", "apt", "--length-methods", "residual+gate", "--device", "cpu"]
    return ["study", "--quick", "--data", str(data), "--out", str(out), *few, *more]


def _outcome(dev: float = 0.5, loss: float = 1.0) -> Outcome:
    return Outcome(dev, loss, 2, 4, 0.5, 10, 2, 0.1, 100, [Point(2, dev, loss)], [GateReading(2, [[0.5, 0.25]])])


def _trial(**changes: object) -> Trial:
    head = Contestant("head alone", "reference", "head", None, (Rates(1e-3),))
    return replace(Trial(head, Rates(1e-3), 0, False, SETTING, SUBJECT), **changes)  # type: ignore[arg-type]


class TestSuite:
    def test_all_of_it_and_again(
        self, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        assert main(_arguments(reviews, out)) == 0
        printed = capsys.readouterr().out
        table = (out / "study.md").read_text().split("\n\n")[1]
        assert "APT (" in table
        assert table in printed
        record = json.loads((out / "study.json").read_text())
        assert [row["method"] for row in record["table"]] == ["head alone", "APT"]
        for row in record["table"]:
            assert len(row["search"]) == 3
            best = max(found["dev_accuracy"] for found in row["search"])
            assert best in [f["dev_accuracy"] for f in row["search"] if f["rates"] == row["rates"]]
            assert list(row["runs"]) == ["0", "1"]
            assert all(0.0 <= run["test_accuracy"] <= 1.0 and run["peak_bytes"] > 0 for run in row["runs"].values())
        assert list(record["lengths"]["residual prefix + gate"]) == ["2", "4"]
        layers = record["table"][1]["runs"]["0"]["gates"][-1]["values"]
        assert len(layers) == models.SIZES["quick"].layers
        for name in ("study_accuracy.png", "study_gates.png", "study_lengths.png"):
            assert (out / name).read_bytes().startswith(PNG)

        monkeypatch.setattr(training, "run", lambda *_: pytest.fail("trained a second time"))
        assert main(_arguments(reviews, out)) == 0
        again = json.loads((out / "study.json").read_text())
        assert (again["table"], again["lengths"]) == (record["table"], record["lengths"])

    def test_goes_on_after_an_interruption(
        self, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, train, trained = tmp_path / "out", training.run, []

        def interrupted(trial: Trial, *rest: object) -> Outcome:
            if len(trained) == 4:
                raise KeyboardInterrupt
            trained.append(trial.key())
            return train(trial, *rest)  # type: ignore[arg-type]

        arguments = _arguments(reviews, out, "--lengths", "--methods", "head", "full")
        assert main([*_arguments(reviews, out), "--report"]) == 0  # nothing yet
        monkeypatch.setattr(training, "run", interrupted)
        assert main(arguments) == 1
        assert "goes on from here" in capsys.readouterr().err
        assert main([*arguments, "--report"]) == 0
        assert len(trained) == 4

        def counted(trial: Trial, *rest: object) -> Outcome:
            trained.append(trial.key())
            return train(trial, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(training, "run", counted)
        assert main(arguments) == 0
        assert len(trained) == len(set(trained)) == 2 * 3 + 2 * 2
        # A search does not depend on how long the runs after it are; the runs do.
        assert main([*arguments, "--steps", "3"]) == 0
        assert len(trained) == len(set(trained)) == 2 * 3 + 2 * 2 * 2

    def test_a_failing_method_is_reported_beside_the_others(
        self, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # A prompt beyond the positions of the model.
        small = ["--methods", "head", "pt", "--prompt-tokens", "200", "--lengths", "--seeds", "1"]
        assert main(_arguments(reviews, tmp_path / "out", *small)) == 1
        captured = capsys.readouterr()
        assert "| head alone" in captured.out
        assert "PT, seed 0, failed" in captured.err
        assert "positions" in captured.err

    def test_local_model(self, reviews: Path, tmp_path: Path) -> None:
        out, few = tmp_path / "out", ("--methods", "head", "--seeds", "1", "--lengths")
        assert main(_arguments(reviews, out, *few)) == 0
        (folder,) = out.glob("encoder-*")
        assert main(_arguments(reviews, tmp_path / "other", *few, "--model", str(folder))) == 0
        runs = [json.loads((f / "study.json").read_text())["table"][0]["runs"]["0"] for f in (out, tmp_path / "other")]
        assert runs[0]["curve"] == runs[1]["curve"]

    @pytest.mark.parametrize(
        ("rows", "more", "message"),
        [
            (None, [], "no such file"),
            ("sentence\nx\ny\n", [], "--label-column"),
            ("sentence\tlabel\nx\t1\ny\t1\n", ["--dev", "DATA", "--test", "DATA"], "two or more classes"),
            ("sentence\tlabel\nx\t1\ny\t0\n", [], "--dev"),
            ("sentence\tlabel\nx\t1\ny\t0\n", ["--dev", "DATA", "--test", "missing.jsonl"], "--test missing.jsonl: no"),
            (
                "sentence\tlabel\nx\t1\ny\t0\n",
                ["--dev", "DATA", "--test", "DATA", "--methods", "residual", "--prefix-tokens", "1"],
                "--prefix-tokens",
            ),
        ],
    )
    def test_errors(
        self, rows: str | None, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "texts.tsv"
        if rows is not None:
            path.write_text(rows)
        more = [str(path) if option == "DATA" else option for option in more]
        assert main(["study", "--quick", "--data", str(path), "--out", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err


class TestBudget:
    BUDGET = Budget(prompt=40 * 32, prefix=40 * 2 * 2 * 32)

    @pytest.mark.parametrize("key", [key for key, entry in ENTRIES.items() if entry.make is not None])
    def test_every_method_fills_its_own_and_no_more(self, key: str) -> None:
        model = models.build_encoder(TINY, 2, 0, seed=0)
        (contestant,) = contestants.at_budget([key], model, self.BUDGET, TINY.length)
        assert contestant.config is not None
        fastprefix.attach(model, contestant.config)
        count = fastprefix.count_parameters(model).groups["fastprefix"]
        budget = self.BUDGET.prompt if contestant.group == "prompt" else self.BUDGET.prefix
        assert 0.9 * budget < count <= budget

    def test_of_a_length_only_the_length_counts(self) -> None:
        for key in NETWORKS:
            config = contestants.of_length(key, 7).config
            assert isinstance(config, fastprefix.ResidualPrefixConfig)
            assert (config.num_virtual_tokens, config.hidden_dim) == (7, 512)
            assert (config.residual, config.gate) == NETWORKS[key]

    def test_nothing_fits(self) -> None:
        model = models.build_encoder(TINY, 2, 0, seed=0)
        with pytest.raises(BenchmarkError, match="--prompt-tokens"):
            contestants.at_budget(["adept"], model, Budget(32, 32), TINY.length)


class TestTexts:
    def test_splits_are_the_same_every_time_and_share_nothing(self, reviews: Path) -> None:
        source = Source(reviews, None, None, None, None)
        given = texts.load(source, ALL)
        assert given == texts.load(source, ALL)
        parts = [set(part.texts) for part in (given.train, given.dev, given.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 80
        assert [given.class_names[c] for c in given.train.labels] == [
            "pos" if "good" in text else "neg" for text in given.train.texts
        ]

    def test_draws_as_many_as_asked(self, reviews: Path) -> None:
        given = texts.load(Source(reviews, reviews, reviews, None, None), Sizes(10, 5, 1000))
        assert [len(part.texts) for part in (given.train, given.dev, given.test)] == [10, 5, 80]

    def test_unknown_labels(self, reviews: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.tsv"
        other.write_text("sentence\tlabel\nfine\tneutral\n")
        with pytest.raises(BenchmarkError, match="neutral"):
            texts.load(Source(reviews, other, reviews, None, None), ALL)


class TestBatches:
    PART = Encoded([[1] * (1 + i % 9) for i in range(50)], list(range(50)))

    def test_training_sees_every_row_once_an_epoch(self) -> None:
        stream = list(batches.for_training(self.PART, 0, 5, 20, seed=3, device=CPU))
        for epoch in (stream[:10], stream[10:]):
            assert sorted(label for batch in epoch for label in batch["labels"].tolist()) == self.PART.labels
        again = batches.for_training(self.PART, 0, 5, 20, seed=3, device=CPU)
        assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(stream, again, strict=True))

    def test_evaluation_sees_every_row_and_pads_little(self) -> None:
        parts = list(batches.for_evaluation(self.PART, 0, 8, CPU))
        assert sorted(label for batch in parts for label in batch["labels"].tolist()) == self.PART.labels
        assert all(int((batch["attention_mask"] == 0).sum()) <= 2 * 8 for batch in parts)

    def test_padding_is_masked(self) -> None:
        batch = batches.collate(self.PART, [0, 3], pad=7, device=CPU)
        assert batch["input_ids"].tolist() == [[1, 7, 7, 7], [1, 1, 1, 1]]
        assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


class TestEarlyStopping:
    def test_waits_for_as_many_as_patience_says(self) -> None:
        stopping = EarlyStopping(patience=2)
        seen = [(stopping.better((score, 0.0)), stopping.stop) for score in (0.5, 0.4, 0.6, 0.6, 0.5)]
        assert seen == [(True, False), (False, False), (True, False), (False, False), (False, True)]

    def test_the_loss_decides_between_equals(self) -> None:
        stopping = EarlyStopping(patience=1)
        assert stopping.better((0.5, -1.0))
        assert stopping.better((0.5, -0.9))
        assert not stopping.better((0.5, float("nan")))

    def test_ends_a_training_and_tests_the_best_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = models.build_encoder(TINY, 2, 0, seed=0)
        scores = iter([(0.6, 1.0), (0.5, 1.0), (0.4, 1.0)])
        weights: list[torch.Tensor] = []

        def score(model: object, part: Encoded, bench: object) -> tuple[float, float]:
            weights.append(models.head_parameters(model)[0].detach().clone())  # type: ignore[arg-type]
            return (0.9, 0.1) if part is data.test else next(scores)

        part = Encoded([[2, 3, 4]] * 8, [0, 1] * 4)
        data = batches.EncodedTexts(part, part, replace(part), 0)
        monkeypatch.setattr(training, "score", score)
        trial = _trial(setting=replace(SETTING, steps=10))
        outcome = training.run(trial, training.Bench(lambda _: model, data, CPU), tick=lambda: None)
        assert (outcome.steps, outcome.best_step, outcome.dev_accuracy, outcome.test_accuracy) == (6, 2, 0.6, 0.9)
        assert not torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[-1])


@pytest.mark.parametrize("key", list(ENTRIES))
def test_every_kind_of_parameter_has_its_own_rate(key: str) -> None:
    model = models.build_encoder(TINY, 2, 0, seed=0)
    (contestant,) = contestants.at_budget([key], model, TestBudget.BUDGET, TINY.length)
    rates = Rates(0.25, 0.5, 0.125)
    prepared = training.prepare(_trial(contestant=contestant, rates=rates), model)
    rate_of = {p: group["lr"] for group in prepared.groups for p in group["params"]}
    expected = {name: 0.25 for name, p in model.named_parameters() if p.requires_grad}
    expected |= {name: 0.5 for name in expected if name == "fastprefix.prompt"}
    expected |= {name: 0.125 for name in expected if "gate" in name}
    if key != "head":
        expected |= {name: SETTING.head_rate for name in expected if name.startswith("classifier")}
    assert {name: rate_of[p] for name, p in model.named_parameters() if p in rate_of} == expected


class TestStore:
    def test_gives_back_what_was_kept(self, tmp_path: Path) -> None:
        store, trial = Store(tmp_path), _trial()
        assert store.get(trial) is None
        store.put(trial, _outcome())
        assert store.get(trial) == _outcome()
        assert [path.suffix for path in tmp_path.iterdir()] == [".json"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"seed": 1},
            {"search": True},
            {"rates": Rates(2e-3)},
            {"subject": replace(SUBJECT, model="others")},
            {"subject": replace(SUBJECT, texts="others")},
            {"setting": replace(SETTING, patience=3)},
            {"setting": replace(SETTING, steps=5)},
            {"contestant": Contestant("P", "prefix", "method", fastprefix.PrefixTuningConfig(3), ())},
        ],
    )
    def test_another_trial_is_another(self, tmp_path: Path, changes: dict[str, object]) -> None:
        store = Store(tmp_path)
        store.put(_trial(), _outcome())
        assert store.get(_trial(**changes)) is None

    def test_what_is_no_run_is_an_error(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        store.put(_trial(), _outcome())
        (path,) = tmp_path.iterdir()
        path.write_text("{")
        with pytest.raises(BenchmarkError, match="delete it"):
            store.get(_trial())


class TestPlan:
    def test_the_best_rate_on_dev_is_chosen(self) -> None:
        by_rate = {1e-3: 0.5, 1e-2: 0.7, 3e-2: 0.6}
        (head,) = contestants.at_budget(["head"], models.build_encoder(TINY, 2, 0, 0), Budget(1, 1), TINY.length)
        study = Plan([head], {}, range(3), range(0), SETTING, SUBJECT)
        findings, done = Findings(), []

        def run(trial: Trial) -> Outcome:
            done.append(trial)
            assert trial.rates.main is not None
            return _outcome(by_rate[trial.rates.main])

        plan.carry_out(study, run, findings)
        assert [(trial.search, trial.seed) for trial in done] == [(True, 0)] * 3 + [(False, s) for s in range(3)]
        assert {trial.rates.main for trial in done if not trial.search} == {1e-2}
        assert list(findings.table[0].runs) == [0, 1, 2]
        assert study.steps() == sum(trial.steps for trial in done)

    def test_lengths_share_the_rates_of_the_middle_one(self) -> None:
        lengths = plan.over_lengths(["prefix"], [200, 10, 50, 100])
        findings, done = Findings(), []
        study = Plan([], lengths, range(2), range(1), SETTING, SUBJECT)

        def run(trial: Trial) -> Outcome:
            done.append(trial)
            return _outcome()

        plan.carry_out(study, run, findings)
        assert {trial.steps for trial in done if not trial.search} == {SETTING.length_steps}
        searched = {trial.contestant.config.num_virtual_tokens for trial in done if trial.search}  # type: ignore[union-attr]
        assert searched == {50}
        assert {length: list(row.runs) for length, row in findings.lengths["prefix tuning"].items()} == {
            200: [0], 10: [0], 50: [0], 100: [0]
        }  # fmt: skip
        assert study.steps() == sum(trial.steps for trial in done)


class TestGates:
    BATCH: ClassVar = {
        "input_ids": torch.tensor([[2, 3, 4], [5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }

    @pytest.mark.parametrize("pooling", ["cls", "mean", "query"])
    def test_those_that_the_model_uses(self, pooling: str) -> None:
        model = models.build_encoder(TINY, 2, 0, seed=0).eval()
        fastprefix.attach(model, fastprefix.APTConfig(3, pooling=pooling))  # type: ignore[arg-type]
        method, used = model.fastprefix, []
        for projection in method.gate_projections:
            torch.nn.init.normal_(projection)
        gate = method.prefix_gate
        method.prefix_gate = lambda *args: used.append(gate(*args)) or used[-1]
        model(**self.BATCH)
        del method.prefix_gate
        attended = self.BATCH["attention_mask"].bool()
        flat = [g[:, 0][attended] if g.ndim == 4 else g[:, 0] for g in used]
        expected = [values.mean(dim=0).tolist() for values in flat]
        read = gates.read(model, self.BATCH)
        assert read is not None
        torch.testing.assert_close(torch.tensor(read), torch.tensor(expected))

    def test_constant_ones_and_none(self) -> None:
        model = models.build_encoder(TINY, 2, 0, seed=0)
        assert gates.read(model, self.BATCH) is None
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(3))
        assert gates.read(model, self.BATCH) is None
        fastprefix.detach(model)
        fastprefix.attach(model, fastprefix.ResidualPrefixConfig(3))
        assert gates.read(model, self.BATCH) == [[0.5] * 3] * TINY.layers
