"""Test the benchmarks: measuring, records, the report, and a small run of every suite."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, DistilBertConfig, DistilBertForSequenceClassification, LlamaConfig

pytest.importorskip("cogapp")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("tabulate")
pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")

from benchmarks import (
    attention,
    data,
    embedding,
    main_job,
    measure,
    models,
    peers,
    report,
    results,
    shared_prompt,
    suite,
    visual_prompts,
    whole_models,
)
from benchmarks.__main__ import main
from benchmarks.measure import BenchmarkError, figure_row
from benchmarks.models import Size
from benchmarks.results import Record

from .. import peft_support
from ..instruction_sets import needs_kernels

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Size(layers=1, width=32, heads=2, vocabulary=512, rows=2, length=16)
PATHS = {path.stem: path for path, _ in results.read_all(results.FOLDER)}
COMMITTED = {name: results.read(path) for name, path in PATHS.items()}
COMPARABLE = [name for name, of in COMMITTED.items() if of.suite not in ("cartridge", "gpu", "gpu-tiles", "host-times")]
"""Results that have a floor and no failure."""
CASE = {"N": 4, "causal": True}


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small models, and neither read from nor write to the caches of the user."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setitem(models.SIZES, "quick", TINY)
    monkeypatch.setitem(main_job.STEPS, "quick", 10)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it would compile for half a minute
    monkeypatch.setattr(suite, "keep_freed_memory", lambda: False)  # it would outlast the test


def make_record(ours: float, floor: float = 1.0, spread: float = 0.01, theirs: float = 2.0, **facts: object) -> Record:
    """Return three peers in one case."""
    environment = {"date": "2026-01-01", "device_name": "x", "cpu_capability": "y", "threads": 1, **facts}
    rows = [
        figure_row(CASE, name, role, "forward", "seconds", p50, p20=p50 - spread, p80=p50 + spread)
        for name, role, p50 in (("floor", "floor", floor), ("mine", "ours", ours), ("other", "theirs", theirs))
    ]
    return Record("attention", environment, {"quick": False}, rows)


class TestMeasure:
    def test_rounds_begin_with_another_peer_each(self) -> None:
        order: list[str] = []
        works = {name: measure.Work("ours", {"a": lambda name=name: float(order.append(name) or 1)}) for name in "abc"}
        rows, faults = measure.measure(CASE, works, CPU, lambda: range(3))
        assert "".join(order) == "abcbcacab" + "abc"  # the last ones for memory
        assert not faults
        assert [row["rounds"] for row in rows if row["quantity"] == "seconds"] == [2, 2, 2]

    def test_a_failure_loses_no_other_result(self) -> None:
        works = {"good": measure.Work("ours", {"a": lambda: 2.0, "b": lambda: 3.0})}
        works["bad"] = measure.Work("theirs", {"a": lambda: 1 / 0, "b": lambda: 4.0})
        rows, faults = measure.measure(CASE, works, CPU, lambda: range(3))
        assert [row["samples"] for row in rows if row["quantity"] == "seconds"] == [[2.0, 2.0], [3.0, 3.0]]
        assert [(fault["peer"], fault["stage"]) for fault in faults] == [("bad", "a")]

    def test_added_peak_is_what_was_held_at_once(self) -> None:
        size = 64 * 2**20
        work = lambda: [None for _ in range(3) if torch.ones(size, dtype=torch.uint8) is None]  # noqa: E731
        assert measure.added_peak(work, CPU) == size


class TestRecords:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        record = make_record(1.0)
        record.faults.append(measure.fault(CASE, "broken", "forward", RuntimeError("no")))
        assert results.read(record.write(tmp_path)) == record

    @pytest.mark.parametrize("content", ["{", "{}", "[]"])
    def test_other_files_are_refused(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(BenchmarkError, match=r"other\.json"):
            results.read(tmp_path / "other.json")

    def test_committed_results_have_roles_and_floors(self) -> None:
        for record in COMMITTED.values():
            if record.suite == "host-times":  # the time of a call on the host is compared with a target
                continue
            frame = report.load_frame(record)
            assert {"floor", "theirs" if record.environment.get("adapters") else "ours"} <= set(frame.role)
            # the copy of a swap adds no memory, and a cartridge's bytes are those of its cache
            quantities = ["seconds"] if record.suite in ("many-adapters", "cartridge") else ["seconds", "bytes"]
            assert frame[frame.quantity.isin(quantities)]["x floor"].notna().all()


class TestReport:
    @pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/study.md"])
    def test_tables_are_up_to_date(self, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        command = "python -m benchmarks report --update README.md docs/benchmarks.md docs/study.md"
        assert report.update(Path(page), check=True) == 0, f"run `{command}`"

    def test_the_plot_is_up_to_date(self) -> None:
        from PIL import Image

        with Image.open(results.FOLDER / "intel-xeon-emerald-rapids-2cores" / "headline.png") as image:
            times = report.select_times(COMMITTED["main_job"])
            assert image.info["Description"] == times.to_json(double_precision=6)

    def test_every_row_and_plot(self, tmp_path: Path) -> None:
        COMMITTED["main_job"].write(tmp_path / "device")
        assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
        lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
        assert len(lines) == 1 + len(COMMITTED["main_job"].rows)
        assert "PEFT PT, accelerated" in (tmp_path / "out" / "report.md").read_text()
        assert (tmp_path / "out" / "headline.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("name", list(COMMITTED))
    def test_every_committed_result_has_tables(self, name: str) -> None:
        assert report.describe_record(name, COMMITTED[name]).count("|\n|") >= 2

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"dirty": True}, "differed"),
            ({"dirty": None}, "git did not know"),
            ({"load_average": 1.5, "cpu_count": 2}, "busy"),
            ({"quick": True}, "quick"),
        ],
    )
    def test_some_runs_are_not_published(self, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
        main_record = COMMITTED["main_job"]
        settings = main_record.settings | {"quick": changes.pop("quick", False)}
        replace(main_record, environment=main_record.environment | changes, settings=settings).write(tmp_path / "here")
        with pytest.raises(BenchmarkError, match=reason):
            report.publish("here", report.tabulate_methods, "main_job", "decoder", folder=tmp_path)

    def test_noise_is_marked(self) -> None:
        rows = [{**row, "p80": 2 * row["p50"]} if "p80" in row else row for row in COMMITTED["main_job"].rows]
        table = report.tabulate_methods(replace(COMMITTED["main_job"], rows=rows), "decoder", report.FULL)
        assert all(row[i].startswith("~") for row in table.rows for i in (2, 4))


class TestCompare:
    def run(self, tmp_path: Path, old: Record, new: Record) -> int:
        old.write(tmp_path / "old")
        return main(["compare", str(new.write(tmp_path / "new")), "--against", str(tmp_path / "old")])

    @pytest.mark.parametrize(
        ("new", "status", "printed"),
        [
            (make_record(1.0), 0, "0 moved"),
            (make_record(2.0, floor=2.0, theirs=4.0), 0, "0 moved"),  # everything is slower: the machine
            (make_record(1.3), 1, "1.30"),
            (make_record(0.7), 0, "0.70"),
            (make_record(1.3, spread=0.3), 0, "0 moved"),  # within the noise
            (make_record(1.03, spread=0.0), 0, "0 moved"),  # within the tolerance
            (make_record(1.0, theirs=3.0), 0, "theirs"),
            (make_record(1.0, load_average=1.5, cpu_count=2), 0, "busy"),
        ],
    )
    def test_ratios(
        self, new: Record, status: int, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tmp_path, make_record(1.0), new) == status
        assert printed in capsys.readouterr().out

    @pytest.mark.parametrize(("peer", "status"), [("mine", 1), ("other", 0)])
    def test_failures(self, peer: str, status: int, tmp_path: Path) -> None:
        new = make_record(1.0)
        new.faults = [measure.fault(CASE, peer, "forward", RuntimeError("no"))]
        assert self.run(tmp_path, make_record(1.0), new) == status

    def test_no_comparison(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, make_record(1.0), make_record(1.0, threads=3)) == 2
        other = replace(make_record(1.0), rows=[{**row, "N": 5} for row in make_record(1.0).rows])
        assert self.run(tmp_path, make_record(1.0), other) == 2
        assert self.run(tmp_path, make_record(1.0, kernels="amx"), make_record(1.0, kernels="avx2")) == 2
        quick = replace(make_record(1.0), settings={"quick": True})
        assert self.run(tmp_path, make_record(1.0), quick) == 2

    def test_ratios_that_are_gone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        old = make_record(1.0)
        more = [{**row, "N": 5} for row in old.rows]
        assert self.run(tmp_path, replace(old, rows=[*old.rows, *more]), old) == 0
        assert "not measured now: 1 ratios of mine" in capsys.readouterr().out

    def test_other_files_are_no_results(self, tmp_path: Path) -> None:
        (tmp_path / "trainer_state.json").write_text('{"epoch": 1}')
        with pytest.raises(BenchmarkError, match="no JSON files of results"):
            results.read_all(tmp_path)
        path = make_record(1.0).write(tmp_path)
        assert [found for found, _ in results.read_all(tmp_path)] == [path.resolve()]

    @pytest.mark.parametrize("name", COMPARABLE)
    def test_committed_results_against_themselves(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        path = PATHS[name]
        assert main(["compare", str(path), "--against", str(path.parent)]) == 0
        assert "; 0 moved" in capsys.readouterr().out


class TestData:
    ROWS = (('good "film"', "pos"), ("bad", "neg"), ("fine", "pos"), ("dull", "neg"))

    OPTIONS = argparse.Namespace(text_column=None, label_column=None)

    def test_rows_that_are_sorted_by_label(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "MOST_ROWS", 40)
        rows = Dataset.from_dict({"text": ["a"] * 100, "label": ["0"] * 50 + ["1"] * 50})
        assert data.list_classes(data.split_rows("sorted", rows, seed=0)) == ["0", "1"]
        with pytest.raises(BenchmarkError, match="same value in every row"):
            data.split_rows("sorted", rows.select(range(50)), seed=0)

    def test_python_documentation(self) -> None:
        corpus = data.split_rows("docs", data.read_python_documentation(), seed=0)
        counts = [list(corpus["train"]["label"]).count(c) for c in range(6)]
        assert len(data.list_classes(corpus)) == 6
        assert min(counts) >= 40
        seen = {" ".join(part.split()) for text in corpus["train"]["text"] for part in text.split("\n\n")}
        assert not any(" ".join(part.split()) in seen for text in corpus["test"]["text"] for part in text.split("\n\n"))

    @pytest.mark.parametrize("name", ["reviews.tsv", "reviews.jsonl"])
    def test_files(self, name: str, tmp_path: Path) -> None:
        lines = ["sentence\tlabel", *("\t".join(row) for row in self.ROWS)]
        if name.endswith("jsonl"):
            lines = [json.dumps({"sentence": text, "label": label}) for text, label in self.ROWS]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        corpus = data.split_rows(name, data.read_rows("--data", tmp_path / name, self.OPTIONS), seed=0)
        classes = data.list_classes(corpus)
        rows = [(row["text"], classes[row["label"]]) for part in corpus.values() for row in part]
        assert sorted(rows) == sorted(self.ROWS)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("missing.tsv", None, "missing.tsv"),
            ("text.docx", "x", r"\.tsv"),
            ("odd.jsonl", '{"a": "x"}\n{"a": "y"}\n', "--text-column"),
            ("broken.jsonl", "{", "broken.jsonl"),
            ("short.jsonl", '{"text": "one"}\n', "two passages"),
        ],
    )
    def test_errors(self, tmp_path: Path, name: str, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(BenchmarkError, match=message):
            data.split_rows(name, data.read_rows("--data", tmp_path / name, self.OPTIONS), seed=0)


class TestMainJob:
    @pytest.mark.peft
    def test_all_of_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        peft_support.require(peft_support.prefixes_of_classifiers)
        assert main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "RANDOM weights" in printed
        assert suite.QUICK_NOTE in printed
        assert (tmp_path / "main_job.png").read_bytes().startswith(b"\x89PNG")
        record = results.read(tmp_path / "main_job.json")
        assert not record.faults
        assert record.settings["quick"]
        of = {(row["model"], row["peer"], row["direction"], row["quantity"]): row for row in record.rows}
        title = "decoder, Llama shape"
        losses = of[title, peers.FLOOR, "held out", "loss"]
        assert losses["steps"] == [0, 10]
        assert len(set(losses["samples"])) == 1
        assert of[title, "PT", "training", "parameters"]["p50"] == 100 * TINY.width
        assert {of[title, "PT", direction, "seconds"]["rounds"] for direction in ("forward", "forward+backward")} == {9}

    def test_a_failing_peer_loses_no_other_result(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(model: object) -> peers.Prepared:
            raise RuntimeError("no such luck")

        chosen = [peers.ModelPeer(peers.FLOOR, "floor", peers.freeze), peers.ModelPeer("broken", "ours", fail)]
        monkeypatch.setattr(main_job, "list_peers", lambda *_: chosen)
        assert main(["main", "--quick", "--device", "cpu", "--steps", "2", "--out", str(tmp_path)]) == 1
        record = results.read(tmp_path / "main_job.json")
        assert [(fault["peer"], fault["stage"]) for fault in record.faults] == [("broken", "set-up")] * 2
        assert {row["peer"] for row in record.rows} == {peers.FLOOR}
        assert "FAILED" in capsys.readouterr().out

    def test_local_file_and_model(self, tmp_path: Path) -> None:
        words = data.train_tokenizer(["for x in y"] * 9, TINY.vocabulary)
        words.save_pretrained(tmp_path / "model")
        config = models.configure("causal_lm", TINY, words.pad_token_id, words.eos_token_id)
        models.build("causal_lm", config, CPU).save_pretrained(tmp_path / "model")
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": f"for x in range({i}): print(x)"}) + "\n" for i in range(60)))
        sizes = ["--steps", "2", "--length", "16", "--rows", "3", "--tokens", "6"]
        arguments = ["--data", str(text), "--model", str(tmp_path / "model"), *sizes]
        assert main([*arguments, "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
        record = results.read(tmp_path / "main_job.json")
        (subject,) = record.settings["models"].values()
        assert "pretrained weights; 3 x 16 tokens, 0% of them padding, 2 steps" in subject["description"]
        trained = {row["peer"]: row["p50"] for row in record.rows if row["quantity"] == "parameters"}
        assert trained["PT"] == 6 * TINY.width

    @pytest.mark.parametrize("config", [LlamaConfig(), BertConfig()], ids=["llama", "bert"])
    def test_a_folder_without_tokenizer(self, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path)
        assert main(["--quick", "--device", "cpu", "--model", str(tmp_path)]) == 2
        assert "tokenizer" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--dataset", "nobody/nothing"],
            pytest.param(["--model", "nobody/nothing"], marks=pytest.mark.slow),
            ["--model", "../models/nothing"],
        ],
    )
    def test_without_network(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import datasets
        import huggingface_hub

        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        # The test restores what going offline changes.
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        assert main(arguments) == 2
        assert f"error: {' '.join(arguments)}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["model"], "unknown suite 'model'. Did you mean models?"),
            (["--quick", "models", "--rows", "2"], "python -m benchmarks models --quick --rows 2"),
        ],
    )
    def test_suites_that_are_mistyped_or_come_late(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err

    def test_the_first_token_has_no_label(self) -> None:
        words = data.train_tokenizer(["for x in y"] * 9, TINY.vocabulary)
        blocks = data.cut_blocks(Dataset.from_list([{"text": "for x in y"}] * 20), words, 8)
        assert (blocks["labels"][:, 0] == -100).all()
        assert torch.equal(blocks["labels"][:, 1:], blocks["input_ids"][:, 1:])

    def test_without_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["--device", "cuda"]) == 2


def test_the_head_is_not_shared() -> None:
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    model = DistilBertForSequenceClassification(config)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in peers.share_weights(model).parameters()}
    assert {id(p) for p in model.parameters()} - shared == {id(p) for p in peers.head_parameters(model)}


def test_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_models, "KINDS", {"Llama, 12 x 768": "causal_lm"})
    monkeypatch.setattr(whole_models, "QUICK_PLACES", whole_models.QUICK_PLACES[:1])
    arguments = ["models", "--quick", "--device", "cpu", "--rows", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record = results.read(tmp_path / "models.json")
    assert not record.faults
    table = report.tabulate_model(record, "Llama, 12 x 768")
    assert {"PT", "ADePT, eager", "PEFT prefix tuning"} < {row[0] for row in table.rows}
    assert all("-" not in row[1:] for row in table.rows)


def test_shared_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompt, "DECODED", 3)
    arguments = ["shared-prompt", "--quick", "--rounds", "1", "--prompt", "5", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    record = results.read(tmp_path / "shared_prompt.json")
    assert not record.faults
    at = {(row["direction"], row["quantity"], row["peer"]): row["p50"] for row in record.rows}
    assert at["step", "bytes", "PT"] < at["step", "bytes", "PT textbook"]
    assert ("step", "bytes", "PT merged") not in at
    assert ("decode", "seconds", "PT merged") in at


def test_visual_prompts(tmp_path: Path) -> None:
    arguments = ["visual-prompts", "--quick", "--rounds", "1", "--prompt", "5", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    record = results.read(tmp_path / "visual_prompts.json")
    assert not record.faults
    table = report.tabulate_visual_prompts(record, 5)
    assert {"VPT deep", "VPT deep, in every image", "SHIP", "SHIP, in every image"} < {row[0] for row in table.rows}
    assert all("-" not in row[1:] for row in table.rows)


@pytest.mark.parametrize("name", ["VPT shallow", "VPT deep", "SHIP"])
def test_rows_in_every_image_give_the_same(name: str) -> None:
    size = visual_prompts.QUICK
    base = visual_prompts.build(size, torch.device("cpu"))
    batch = visual_prompts.draw_batch(size, base.device, base.dtype)
    ours, theirs = (
        peer.copy_and_prepare(base)
        for peer in visual_prompts.list_image_peers(5, size.layers)
        if peer.name in (name, f"{name}, in every image")
    )
    theirs.method.load_state_dict(ours.fastprefix.state_dict())
    found = [model(**batch) for model in (ours, theirs)]
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-4, atol=1e-5)
    for output in found:
        output.loss.backward()
    expected = dict(theirs.method.named_parameters())
    for parameter_name, parameter in ours.fastprefix.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[parameter_name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("attention", marks=needs_kernels), "embedding"])
def test_kernels(name: str, tmp_path: Path) -> None:
    embedding.compile_once.cache_clear()
    assert main([name, "--quick", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    record = results.read(tmp_path / f"{name}.json")
    assert not record.faults
    trained = {row["peer"] for row in record.rows if row["direction"] == "forward+backward"}
    assert {"attention": {"fused", "concat"}, "embedding": {"adept", "adept_eager"}}[name] <= trained


@needs_kernels
def test_attention_with_dropout_has_a_separate_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "list_problems", lambda options, device: [])
    arguments = ["attention", "--quick", "--device", "cpu", "--out", str(tmp_path), "--dropout"]
    assert main([*arguments, "0.1"]) == 0
    assert results.read(tmp_path / "attention_dropout.json").settings["dropout"] == 0.1
    assert main([*arguments, "1.5"]) == 2


@torch.no_grad()
@pytest.mark.parametrize("gate", ["none", "row"])
def test_attention_peers_agree(gate: str) -> None:
    inputs = attention.Inputs(attention.Shape(2, 4, 2, 5, 7, 16, 3), torch.float32, True, CPU, gate=gate)
    expected = inputs.run_concat()
    torch.testing.assert_close(inputs.compile_flex()(), expected)
    inputs.repeats_heads = True
    torch.testing.assert_close(inputs.run_concat(), expected)
