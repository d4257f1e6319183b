"""The benchmarks: their data, tokenizer, timing, reports, and the main job in the small."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    PretrainedConfig,
)

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import (
    adapterhub,
    attention,
    data,
    embedding,
    floors,
    hub,
    main_job,
    memory,
    methods,
    models,
    page,
    plots,
    report,
    results,
    shared_prompt,
    subjects,
    summaries,
    tasks,
    tokenizer,
    whole_models,
)
from benchmarks.cli import main
from benchmarks.contest import Contest, Rounds
from benchmarks.data import Corpus
from benchmarks.errors import BenchmarkError
from benchmarks.methods import FLOOR, Method, Prepared
from benchmarks.models import Size
from benchmarks.options import QUICK_NOTE
from benchmarks.timing import Clock, Samples, interleave, timed
from fastprefix.ops.backends import BACKENDS

from . import peft_support

CPU = torch.device("cpu")
TINY = Size(layers=1, width=32, heads=2, vocabulary=512, rows=2, length=16)
PNG = b"\x89PNG"
needs_kernels = pytest.mark.skipif(BACKENDS["cpu"].refusal(CPU) is not None, reason="without its C++ kernels")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is read from, or left in, the user's own caches."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(hub, "reachable", lambda: False)
    # What going offline changes is put back after the test.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return data.python_documentation(seed=0)


class TestPythonDocumentation:
    def test_every_class_has_enough_passages(self, corpus: Corpus) -> None:
        assert corpus.train_labels is not None
        counts = Counter(corpus.train_labels)
        assert len(corpus.class_names) == len(counts) == 6
        assert min(counts.values()) >= 40

    def test_nothing_is_both_trained_on_and_held_out(self, corpus: Corpus) -> None:
        paragraphs = [text.split("\n\n") for text in corpus.train]
        seen = {" ".join(paragraph.split()) for passage in paragraphs for paragraph in passage}
        held_out = {" ".join(p.split()) for text in corpus.held_out for p in text.split("\n\n")}
        assert held_out
        assert not seen & held_out

    def test_seed_decides_the_split(self, corpus: Corpus) -> None:
        assert data.python_documentation(seed=0) == corpus
        assert data.python_documentation(seed=1).held_out != corpus.held_out

    def test_labels_belong_to_their_passages(self, corpus: Corpus) -> None:
        assert corpus.train_labels is not None
        label = next(
            lb for text, lb in zip(corpus.train, corpus.train_labels, strict=True) if "str.removeprefix" in text
        )
        assert corpus.class_names[label] == "built-in types"


class TestTokenizer:
    def test_writes_any_text_back(self, corpus: Corpus) -> None:
        words = tokenizer.train_or_load(corpus, 1024)
        assert len(words) == 1024
        for text in ("def f(x):\n    return x", "naïve 日本語 \x00"):
            assert words.decode(words(text)["input_ids"]) == text

    def test_trains_once(self, corpus: Corpus, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = tokenizer.train_or_load(corpus, 512)
        assert [path.suffix for path in (caches / "fastprefix" / "tokenizers").iterdir()] == [".json"]
        monkeypatch.setattr(tokenizer, "_train", lambda *_: pytest.fail("trained a second time"))
        assert tokenizer.train_or_load(corpus, 512)("for x in y")["input_ids"] == first("for x in y")["input_ids"]


class TestFiles:
    ROWS = (('good "film"', "pos"), ("bad", "neg"), ("fine", "pos"), ("dull", "neg"))

    def test_tab_separated(self, tmp_path: Path) -> None:
        path = tmp_path / "reviews.tsv"
        path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in self.ROWS))
        self._check(data.from_file(path, seed=0))

    def test_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "reviews.jsonl"
        path.write_text("".join(json.dumps({"review": text, "stars": label}) + "\n" for text, label in self.ROWS))
        self._check(data.from_file(path, seed=0, text_column="review", label_column="stars"))

    def _check(self, corpus: Corpus) -> None:
        assert corpus.class_names == ["neg", "pos"]
        assert corpus.train_labels is not None
        assert corpus.held_out_labels is not None
        texts = corpus.train + corpus.held_out
        labels = [corpus.class_names[i] for i in corpus.train_labels + corpus.held_out_labels]
        assert sorted(zip(texts, labels, strict=True)) == sorted(self.ROWS)

    def test_without_labels(self, tmp_path: Path) -> None:
        path = tmp_path / "plain.jsonl"
        path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": " "}\n')
        corpus = data.from_file(path, seed=0)
        assert corpus.train_labels is None
        assert sorted(corpus.train + corpus.held_out) == ["one", "two"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("missing.tsv", None, "no such file"),
            ("text.docx", "x", "takes a .tsv"),
            ("odd.jsonl", '{"a": "x"}\n{"a": "y"}\n', "--text-column"),
            ("broken.jsonl", "{", "could not be read"),
            ("short.jsonl", '{"text": "one"}\n', "two passages"),
        ],
    )
    def test_errors(self, tmp_path: Path, name: str, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(BenchmarkError, match=message):
            data.from_file(tmp_path / name, seed=0)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("option", ["--dataset", "--model"])
def test_without_network_a_clear_error(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, "nobody/nothing", "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "cannot be reached" in lines[0]
    assert lines[1].startswith(f"error: {option} nobody/nothing: ")
    assert len(lines) == 2


class TestTiming:
    def test_rounds_begin_with_another_job_each(self) -> None:
        order: list[str] = []
        jobs = {name: timed(lambda name=name: order.append(name), Clock(CPU)) for name in "abc"}  # type: ignore[misc]
        samples, failures = interleave(jobs, range(3), warmup=1)
        assert "".join(order) == "abcbcacab"
        assert not failures
        assert [len(s.seconds) for s in samples.values()] == [2, 2, 2]

    def test_a_failure_loses_no_other_result(self) -> None:
        def broken(i: int) -> float:
            if i == 1:
                raise RuntimeError("out of luck\nand more")
            return 1.0

        samples, failures = interleave({"good": float, "broken": broken}, range(4), stage="training")
        assert samples["good"].seconds == [0.0, 1.0, 2.0, 3.0]
        assert list(samples) == ["good"]
        assert failures["broken"].message == "RuntimeError: out of luck"
        assert "and more" in failures["broken"].traceback

    def test_summary(self) -> None:
        summary = Samples([0.001 * i for i in range(1, 12)]).summary()
        assert summary["median_ms"] == pytest.approx(6.0)
        assert summary["p20_ms"] == pytest.approx(3.0)
        assert summary["p80_ms"] == pytest.approx(9.0)

    @pytest.mark.parametrize(("seconds", "noisy"), [([1.0] * 3 + [1.1] * 3, False), ([1.0, 1.0, 1.0, 1.3, 1.3], True)])
    def test_noise(self, seconds: list[float], noisy: bool) -> None:
        assert Samples(seconds).noisy == noisy


def test_added_peak_is_what_was_held_at_once() -> None:
    size = 64 * 2**20

    def work() -> None:
        for _ in range(3):
            torch.ones(size, dtype=torch.uint8)

    assert memory.added_peak(work, CPU) == size


def test_table_is_aligned_markdown() -> None:
    lines = report.table(
        ("name", "x", "y"), [("a", "1", "2.50"), ("long name", "10", "-"), ("c", "FAILED")]
    ).splitlines()
    assert lines == [
        "| name      |  x |    y |",
        "|-----------|---:|-----:|",
        "| a         |  1 | 2.50 |",
        "| long name | 10 |    - |",
        "| c         | FAILED ||",
    ]


def _tiny(corpus: Corpus) -> list[subjects.Subject]:
    return subjects.built(corpus, TINY, steps=4, device=CPU, seed=0)


class TestMethods:
    def test_encoder_and_decoder_share_nothing_but_frozen_weights(self, corpus: Corpus) -> None:
        encoder = _tiny(corpus)[0].model
        copy = models.with_shared_weights(encoder)
        shared = {id(p) for p in encoder.parameters()} & {id(p) for p in copy.parameters()}
        own = [p for p in encoder.parameters() if id(p) not in shared]
        assert own == models.head_parameters(encoder)

    def test_a_head_of_several_modules_is_shared_in_no_part(self) -> None:
        config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
        model = DistilBertForSequenceClassification(config)
        assert len(models.head_parameters(model)) == 4
        copy = models.with_shared_weights(model)
        assert not {id(p) for p in model.parameters()} & {id(p) for p in models.head_parameters(copy)}

    def test_floor_brings_the_gradient_down_to_the_embeddings(self, corpus: Corpus) -> None:
        subject = _tiny(corpus)[1]
        prepared = methods.all_methods()[0].prepare(subject.model, "causal_lm", TINY.length)
        embedded: list[torch.Tensor] = []
        subject.model.get_input_embeddings().register_forward_hook(lambda _, __, output: embedded.append(output))
        embedded_output = prepared.model(**subject.task.train[0])
        embedded[0].retain_grad()
        embedded_output.loss.backward()
        assert prepared.trainable() == 0
        assert embedded[0].grad is not None
        assert all(p.grad is None for p in subject.model.parameters())

    def test_batches_follow_from_the_seed(self, corpus: Corpus) -> None:
        first, second = (subject.task.train[-1]["input_ids"] for subject in (_tiny(corpus)[0], _tiny(corpus)[0]))
        assert torch.equal(first, second)

    def test_padding_is_no_text(self, corpus: Corpus) -> None:
        task = _tiny(corpus)[0].task
        masks = [batch["attention_mask"] for batch in task.train]
        assert task.tokens_per_step() == sum(int(mask.sum()) for mask in masks) / len(masks)

    @pytest.mark.peft
    def test_every_method_trains(self, corpus: Corpus) -> None:
        peft_support.require(peft_support.prefixes_of_classifiers)
        for subject in _tiny(corpus):
            contest = Contest(subject.model, subject.task, methods.all_methods(), seed=0)
            results = contest.run(Rounds(steps=4, evaluations=2, warmup=1), tick=lambda _: None)
            assert [result.failure for result in results] == [None] * len(results)
            head = sum(p.numel() for p in models.head_parameters(subject.model))
            trainable = {result.method.name: result.trainable for result in results}
            assert trainable[FLOOR] == head
            assert trainable["PT (100)"] == 100 * TINY.width + head
            assert len({tuple(result.losses or ()) for result in results}) == len(results)


def _broken(model: nn.Module, task: tasks.TaskKind, length: int) -> Prepared:
    raise RuntimeError("no such luck")


class TestMainJob:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(models.SIZES, "quick", TINY)
        monkeypatch.setitem(main_job.ROUNDS, "quick", Rounds(steps=6, evaluations=3, warmup=1))

    @pytest.mark.peft
    def test_all_of_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        peft_support.require(peft_support.prefixes_of_classifiers)
        assert main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "RANDOM weights" in printed
        assert printed.splitlines()[-1] == QUICK_NOTE
        assert QUICK_NOTE in (tmp_path / "main_job.md").read_text()
        assert (tmp_path / "main_job.md").read_text().splitlines()[2] in printed
        for name in ("main_job_loss.png", "main_job_time.png"):
            assert (tmp_path / name).read_bytes().startswith(PNG)

        record = json.loads((tmp_path / "main_job.json").read_text())
        assert {"date", "torch", "device_name", "threads"} <= set(record["environment"])
        assert [len(subject["methods"]) for subject in record["subjects"]] == [len(methods.all_methods())] * 2
        floor = record["subjects"][1]["methods"][0]
        assert floor["forward_backward_times_floor"] == 1.0
        steps, losses = zip(*floor["held_out_losses"], strict=True)
        assert steps == (0, 2, 4, 6)
        assert len(set(losses)) == 1
        assert len(floor["losses"]) == 6
        assert len(floor["forward_backward"]["raw_ms"]) == 5
        assert len(floor["forward"]["raw_ms"]) == 3 * tasks.HELD_OUT_BATCHES

    def test_noise_is_marked(self) -> None:
        steady, noisy = Samples([1.0] * 5), Samples([1.0, 1.0, 1.0, 2.0, 2.0])
        assert main_job._time(steady, noisy) == ("1,000.0", "~1.00")
        assert main_job._time(noisy, steady) == ("~1,000.0", "~1.00")
        assert main_job._time(steady, steady) == ("1,000.0", "1.00")

    def test_a_failing_method_is_reported_beside_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chosen = [methods.all_methods()[0], Method("broken", "peft", _broken)]
        monkeypatch.setattr(main_job, "all_methods", lambda: chosen)
        assert main(["main", "--quick", "--device", "cpu", "--steps", "2", "--out", str(tmp_path)]) == 1
        captured = capsys.readouterr()
        assert captured.out.count("FAILED in set-up: RuntimeError: no such luck") == 2
        assert "Traceback" in captured.err
        floor, broken = json.loads((tmp_path / "main_job.json").read_text())["subjects"][0]["methods"]
        assert floor["failure"] is None
        assert floor["tokens_per_second"] > 0
        assert broken["failure"]["stage"] == "set-up"
        assert [fault.competitor for fault in results.read(tmp_path / "main_job.json").faults] == ["broken"] * 2

    def test_local_file_and_local_model(self, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
        words = tokenizer.train_or_load(corpus, TINY.vocabulary)
        folder, text = tmp_path / "model", tmp_path / "text.jsonl"
        words.save_pretrained(folder)
        models.build_decoder(TINY, words.pad_token_id, words.eos_token_id, seed=0).save_pretrained(folder)
        text.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in corpus.train[:40]))
        monkeypatch.setattr(main_job, "all_methods", lambda: methods.all_methods()[:2])
        arguments = ["--data", str(text), "--model", str(folder), "--quick", "--device", "cpu", "--out", str(tmp_path)]
        assert main(arguments) == 0
        (subject,) = json.loads((tmp_path / "main_job.json").read_text())["subjects"]
        assert subject["weights"] == "weights of the folder"
        assert subject["methods"][1]["trainable"] == 100 * TINY.width

    @pytest.mark.parametrize(
        ("config", "with_tokenizer", "message"),
        [
            (LlamaConfig(), False, "tokenizer.save_pretrained writes one"),
            (BertConfig(), False, "tokenizer.save_pretrained writes one"),  # whose empty one is made up
            (MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=512), True, "its model cannot be used here"),
        ],
        ids=["llama", "bert", "mamba"],
    )
    def test_a_folder_that_cannot_be_used(
        self,
        config: PretrainedConfig,
        with_tokenizer: bool,
        message: str,
        corpus: Corpus,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(tmp_path)
        if with_tokenizer:
            tokenizer.train_or_load(corpus, TINY.vocabulary).save_pretrained(tmp_path)
            MambaForCausalLM(config).save_pretrained(tmp_path)
        assert main(["--quick", "--device", "cpu", "--model", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "the hub" not in error

    def test_no_such_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--model", "../models/nothing"]) == 2
        assert capsys.readouterr().err == "error: --model ../models/nothing: no such folder\n"

    def test_no_gpu_is_said(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["--device", "cuda"]) == 2
        assert "sees no GPU" in capsys.readouterr().err


FAKE_ADAPTERS = """
import torch
__version__ = "0.0"
class PrefixTuningConfig:
    def __init__(self, flat, prefix_length): self.rows = prefix_length
def init(model):
    def add_adapter(name, config): model.extra = torch.nn.Parameter(torch.zeros(config.rows))
    model.add_adapter, model.train_adapter = add_adapter, lambda name: None
"""


def test_adapterhub_in_the_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is run for real, with a library of the same interface."""
    (tmp_path / "adapters.py").write_text(FAKE_ADAPTERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(adapterhub, "ready", lambda folder: Path(sys.executable))
    assert main(["adapterhub", "--quick", "--out", str(tmp_path)]) == 0
    run = results.read(tmp_path / "adapterhub.json")
    assert run.environment["adapters"] == "0.0"
    assert len(run.cells) == 2 * 2 * 2 * 2  # models, rivals, directions, seconds and bytes
    assert {cell.competitor for cell in run.cells} == {"frozen floor", "adapters prefix tuning"}
    sentence = summaries.adapterhub_sentence(results.Device(tmp_path, [run]))
    assert sentence.count("BERT-base") == sentence.count("Llama, 12 x 768") == 1


def test_whole_models_in_the_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_models, "QUICK", whole_models.QUICK[-1:])
    assert main(["models", "--quick", "--rows", "1", "--out", str(tmp_path)]) == 0
    run = results.read(tmp_path / "models.json")
    assert {cell.case["model"] for cell in run.cells} == {"Llama, 12 x 768"}
    assert {cell.case["rows"] for cell in run.cells} == {1}
    assert not run.faults
    for table in page.TABLES["models"](run):
        assert all(len(row) == len(table.header) and "-" not in row for row in table.rows)
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    assert "Llama, 12 x 768" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")


def test_shared_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompt, "DECODED", 3)
    threads = torch.get_num_threads()
    assert main(["shared-prompt", "--quick", "--rounds", "1", "--prompt", "5", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| PT textbook")]
    assert [float(cell) > 0 for row in rows for cell in row[2:-2]] == [
        True
    ] * 4  # a token's: a difference, all noise here
    run = results.read(tmp_path / "shared_prompt.json")
    assert not run.faults
    for name in {cell.competitor for cell in run.cells}:
        directions = ["prefill", "decode"] if "merged" in name else ["step", "prefill", "decode"]
        assert [cell.direction for cell in run.select(competitor=name, S=5)] == directions
        assert [cell.direction for cell in run.select("bytes", competitor=name, S=5)] == directions[:-1]
        assert all(cell.rounds == 1 and len(cell.samples or []) == 1 for cell in run.select(competitor=name))
    shared, textbook = (run.one("bytes", competitor=f"PT {x}", direction="step", S=5) for x in ("shared", "textbook"))
    assert shared.p50 < textbook.p50


@pytest.mark.parametrize("suite", [pytest.param("attention", marks=needs_kernels), "embedding"])
def test_kernels(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it would compile for half a minute
    monkeypatch.setattr(embedding, "keep_freed_memory", lambda: False)  # it would outlast the test
    embedding.compiled.cache_clear()
    assert main([suite, "--quick", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    run = results.read(tmp_path / f"{suite}.json")
    assert not run.faults
    assert "x floor" in capsys.readouterr().out
    for cell in run.cells:
        ratio, floor = run.times_floor(cell), floors.of(run, cell)
        assert ratio is not None
        assert ratio > 0
        assert (floor is None) == (cell.quantity == "bytes")
        if floor:
            assert floor.seconds(run.settings["rates"], "float32") > 0  # type: ignore[operator]
    trained = {cell.competitor for cell in run.select(direction="forward+backward")}
    assert {"attention": {"fused", "concat"}, "embedding": {"adept", "adept_eager"}}[suite] <= trained


@needs_kernels
def test_attention_with_dropout_has_results_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["attention", "--quick", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path), "--dropout"]
    assert main([*options, "0.1"]) == 0
    run = results.read(tmp_path / "attention_dropout.json")
    assert (run.suite, run.settings["dropout"]) == ("attention-dropout", 0.1)
    assert {cell.competitor for cell in run.cells} == {"fused", "concat", "tokens"}
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "Prefix attention with dropout" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert main([*options, "1.5"]) == 2
    assert "--dropout takes a number" in capsys.readouterr().err


@needs_kernels
def test_a_failing_peer_loses_no_other_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: attention.Inputs) -> torch.Tensor:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(attention.Inputs, "concat", broken)
    assert main(["attention", "--quick", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().err
    run = results.read(tmp_path / "attention.json")
    assert {fault.competitor for fault in run.faults} == {"concat"}
    assert {cell.competitor for cell in run.cells} == {"fused", "tokens"}
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "no such luck" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_plots_take_a_panel_without_curves(tmp_path: Path) -> None:
    plots.curves([plots.Panel("nothing", {})], tmp_path / "loss.png", FLOOR, "step", "loss")
    plots.ratio_bars([plots.Panel("nothing", {})], ("forward",), tmp_path / "bars.png", "time")
    assert (tmp_path / "bars.png").read_bytes().startswith(PNG)
