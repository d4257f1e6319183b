"""Test the command ``fastprefix``: exit statuses and printed lines."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig, MambaConfig, MistralConfig, MixtralConfig, ViTConfig

from fastprefix import __main__ as cli
from fastprefix import parity, testing
from fastprefix.parity import AttentionCase, EmbeddingCase

SMALL = ["--shape", "1,2,1,3,5,4,8", "--dtype", "float32", "--backend", "eager", "--device", "cpu"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastprefix", *arguments])
    try:
        return int(cli.main() or 0)
    except SystemExit as error:
        return int(error.code or 0)


def test_parity_of_a_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "parity", "--quick", *SMALL) == 0
    assert "prefix_attention   eager    float32" in capsys.readouterr().out


def test_a_shape_is_run_as_asked_for() -> None:
    cases = parity.attention_cases(66, fixed={"N": 2000, "M": 3, "P": 1000})
    assert {(case.N, case.M, case.P) for case in cases} == {(2000, 3, 1000)}


def test_a_miss_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    worse = lambda measure: lambda *args, **kwargs: _spoiled(measure(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr(parity, "measure", worse(parity.measure))
    assert run(monkeypatch, "parity", "--quick", *SMALL) == 1
    assert "MISS" in capsys.readouterr().out


def _spoiled(report: testing.Report) -> testing.Report:
    row = report.rows[0]
    return testing.Report((testing.Row(row.name, 1.0, 0.0, 0.5, 1.0, 0.0, 0.5), *report.rows[1:]))


def test_a_backend_that_is_not_usable_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(parity.BACKENDS, "none", parity.BACKENDS["eager"].__class__("none", ("cuda",), lambda: None))
    monkeypatch.setattr(sys, "argv", [])
    assert run(monkeypatch, "parity", "--backend", "none", "--device", "cpu") == 1
    assert "not usable" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        "--shape 1,2",
        "--shape 1,3,2,4,4,2,8",  # heads
        "--shape 1,2,2,4,4,2,-8",
        "--shape 1,2,2,4,4,2,0",
        "--device foo",
        "--device meta",
        "--device cuda:99",
        "--backend sdpa",  # nothing to compare
    ],
)
def test_wrong_options_name_themselves(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "parity", *wrong.split()) == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_a_command_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "nothing") == 2
    assert "nothing" in capsys.readouterr().err


def test_info_in_a_process_of_its_own() -> None:
    output = subprocess.run([sys.executable, "-m", "fastprefix", "info"], capture_output=True, text=True, check=True)
    assert torch.__version__ in output.stdout
    assert "eager" in output.stdout


MODELS = {
    "llama": (
        LlamaConfig(num_hidden_layers=3, architectures=["LlamaForCausalLM"], dtype="bfloat16"),
        ["LlamaForCausalLM (llama)", "shared", "3 attention layers\n"],
    ),
    "mistral": (MistralConfig(num_hidden_layers=2), ["shared", "2 attention layers, 2 with a sliding window of 4096"]),
    "mixtral": (MixtralConfig(num_hidden_layers=2), ["shared", "2 attention layers\n"]),
    "bert": (BertConfig(architectures=["BertForSequenceClassification"]), ["textbook: ", "not causal", "12 attention"]),
    "vit": (
        ViTConfig(num_hidden_layers=3, architectures=["ViTForImageClassification"]),
        ["3 attention layers", "visual        3 layers; deep prompts run once for the whole batch"],
    ),
    "mamba": (MambaConfig(num_hidden_layers=2), ["textbook: ", "none: "]),
}


@pytest.mark.parametrize("family", MODELS)
def test_info_on_a_model(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The configuration describes a model that is too large to build here."""
    config, says = MODELS[family]
    config.save_pretrained(tmp_path)
    assert run(monkeypatch, "info", "--model", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert all(words in output for words in says), output


def test_info_on_no_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(monkeypatch, "info", "--model", str(tmp_path)) == 1
    assert "--model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert run(monkeypatch, "info", "--model", str(tmp_path)) == 1
    assert "--model" in capsys.readouterr().err
    assert run(monkeypatch, "info", "--model", "../w/nope") == 1
    assert capsys.readouterr().err == "--model ../w/nope: no such folder\n"


@pytest.mark.parametrize("draws", [1, 5])
def test_every_variant_is_measured(draws: int) -> None:
    """A result that is a single number is one sample per variant."""
    case = AttentionCase(gate="", P=2)
    inputs = case.build(torch.float32)
    calls = []

    def counted(**tensors: torch.Tensor) -> torch.Tensor:
        calls.append(tensors["query"].clone())
        return case.operation(**tensors)

    from fastprefix.reference import prefix_attention

    testing.measure_parity(counted, inputs.tensors, reference=prefix_attention, draws=draws)
    assert len(calls) in (draws, 11 * draws)  # where rounding exceeds the bound, ten times as many decide
    calls = calls[:draws]
    assert len({float(q.detach().sum()) for q in calls}) == draws
    assert all((q / calls[0] - 1).abs().max() < 1.1e-3 for q in calls)


EMBEDDINGS = [EmbeddingCase(offset=offset) for offset in (None, "ffn", "low_rank", "position_offset")]
EMBEDDINGS += [replace(case, spans=[(0, 3), (1, 1)]) for case in EMBEDDINGS[:1]]
EMBEDDINGS += [replace(case, spans=[(0, 3), (1, 1)], K=3, index=[1, -1]) for case in EMBEDDINGS[1:4]]


@pytest.mark.parametrize("case", EMBEDDINGS, ids=str)
def test_prompt_embedding_without_gradients(case: EmbeddingCase, backend: str) -> None:
    inputs = case.build(torch.float32)
    run = lambda: EmbeddingCase.operation(**inputs.tensors, backend=backend)  # noqa: E731
    expected = run()
    with torch.no_grad():
        assert torch.equal(run(), expected)
    with torch.inference_mode():
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("case", EMBEDDINGS, ids=str)
def test_prompt_embedding_opcheck(case: EmbeddingCase, backend: str) -> None:
    from fastprefix.ops.prompt_embedding.registration import OPERATION
    from fastprefix.ops.prompt_embedding.validation import canonical_arguments

    tensors = case.build(torch.float32).tensors
    options = {"prompt": None, "ffn": None, "low_rank": None, "offset_scale": 1.0, "dropout_p": 0.0}
    arguments = canonical_arguments(**{**options, **tensors})
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(OPERATION.operator(backend), tuple(leaves))
