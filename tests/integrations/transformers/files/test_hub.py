"""Test publishing adapters with a model card on a hub, and loading them, with a hub that runs in the tests."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import Trainer

import fastprefix
from fastprefix.integrations.transformers.sharding import tensor_parallel

from .... import models
from ..test_attach import METHODS, attached
from ..test_training import trainer
from .fake_hub import Hub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve(monkeypatch, tmp_path) as served:
        yield served


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**models.batch("right")).logits
    return output


@pytest.mark.parametrize("method", ["prefix", "apt", "adept"])
def test_published_and_read_back(method: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("decoder", method)
    address = fastprefix.push_to_hub(model, "org/adapter", commit_message="First")
    assert "/org/adapter/commit/" in address
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(hub.find("org/adapter", "main")[1]) == files  # type: ignore[index]
    other = fastprefix.load_adapter(models.decoder(), "org/adapter")
    assert torch.equal(logits(other), logits(model))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # now from the cache
    again = fastprefix.load_adapter(models.decoder(), "org/adapter")
    assert torch.equal(logits(again), logits(model))


def test_the_card_says_what_it_is_and_how_to_load_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("decoder", "adept")
    model.name_or_path = model.config.name_or_path = "org/base"
    fastprefix.push_to_hub(model, "org/adapter")
    card = ModelCard(hub.read("org/adapter", "README.md"))
    assert card.data.library_name == "fastprefix"
    assert card.data.base_model == "org/base"
    assert card.data.tags == ["fastprefix", "adept"]
    parameters = sum(p.numel() for p in model.fastprefix.parameters())
    assert card.text.startswith("\n# ADePT for org/base\n") or card.text.startswith("# ADePT for org/base\n")
    for line in (
        "| base model | org/base, `LlamaForCausalLM` |",
        f"| parameters | {parameters:,} of {model.num_parameters():,} ({parameters / model.num_parameters():.4%}) |",
        "| `bottleneck_dim` | 3 |",
    ):
        assert line in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", lambda name: models.decoder())
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert torch.equal(logits(scope["model"]), logits(model))


def test_the_card_has_no_private_text(hub: Hub) -> None:
    text = "5 6 7 8 9"
    config = fastprefix.CartridgeConfig(4, init_text=text)
    model = fastprefix.attach(models.decoder(), config, tokenizer=lambda *_, **__: {"input_ids": [5, 6, 7, 8]})
    fastprefix.push_to_hub(model, "org/adapter")
    card = hub.read("org/adapter", "README.md")
    assert "| `num_virtual_tokens` | 4 |" in card
    assert text not in card
    assert text not in f"{model}"


def test_the_card_has_no_local_path(hub: Hub, tmp_path: Path) -> None:
    model = attached("encoder", "prefix")
    model.name_or_path = model.config.name_or_path = str(tmp_path)
    fastprefix.push_to_hub(model, "adapter")
    card = hub.read("me/adapter", "README.md")
    assert str(tmp_path) not in card
    assert "# PrefixTuning for BertForSequenceClassification" in card


def test_a_card_that_is_there_stays(hub: Hub) -> None:
    hub.create("org/adapter")
    hub.commit("org/adapter", "main", {"README.md": b"mine"})
    fastprefix.push_to_hub(attached("decoder", "prefix"), "org/adapter")
    assert hub.read("org/adapter", "README.md") == "mine"


def test_revisions(hub: Hub) -> None:
    first, second = attached("decoder", "prefix"), attached("decoder", "adept")
    fastprefix.push_to_hub(first, "org/adapter")
    address = fastprefix.push_to_hub(second, "org/adapter", revision="new")
    for revision, expected in ((None, first), ("main", first), ("new", second), (address.rpartition("/")[2], second)):
        model = fastprefix.load_adapter(models.decoder(), "org/adapter", revision=revision)
        assert torch.equal(logits(model), logits(expected))
    state = fastprefix.read_prefix(models.decoder(), "org/adapter", revision="main")
    assert torch.equal(state.pairs[0][0], first.fastprefix.prefix.keys[0])


def test_one_of_several_is_published_by_name(hub: Hub) -> None:
    model = attached("decoder", "prefix")
    fastprefix.attach(model, METHODS["apt"](), name="b")
    fastprefix.push_to_hub(model, "org/adapter", name="default")
    assert json.loads(hub.read("org/adapter", "adapter_config.json"))["method"] == "prefix_tuning"
    assert "# PrefixTuning" in hub.read("org/adapter", "README.md")


def test_pefts_format(hub: Hub) -> None:
    model = attached("decoder", "prefix-shift")
    fastprefix.push_to_hub(model, "org/adapter", format="peft")
    card = ModelCard(hub.read("org/adapter", "README.md"))
    assert card.data.library_name == "peft"
    assert 'PeftModel.from_pretrained(base, "org/adapter")' in card.text
    torch.testing.assert_close(logits(fastprefix.load_adapter(models.decoder(), "org/adapter")), logits(model))


def test_what_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'org/nothing' does not exist locally and cannot be read from the Hub"):
        fastprefix.load_adapter(models.decoder(), "org/nothing")
    hub.create("org/empty")
    with pytest.raises(FileNotFoundError, match="'org/empty' on the Hub must contain an adapter"):
        fastprefix.load_adapter(models.decoder(), "org/empty")
    fastprefix.push_to_hub(attached("decoder", "prefix"), "org/adapter")
    with pytest.raises(FileNotFoundError, match="cannot be read from the Hub"):
        fastprefix.load_adapter(models.decoder(), "org/adapter", revision="nowhere")
    monkeypatch.chdir(tmp_path)
    fastprefix.save_adapter(attached("decoder", "prefix"), "org/adapter")
    asked = len(hub.requests)
    fastprefix.load_adapter(models.decoder(), "org/adapter")  # a directory comes first
    assert len(hub.requests) == asked
    with pytest.raises(ValueError, match="`revision` must be None for a local path"):
        fastprefix.load_adapter(models.decoder(), "org/adapter", revision="main")


def test_what_cannot_be_saved_is_not_published(hub: Hub) -> None:
    model = fastprefix.merge(attached("decoder", "adept"))
    with pytest.raises(ValueError, match="The merged adapter of `model` cannot be saved"):
        fastprefix.push_to_hub(model, "org/adapter")
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, r"an adapter of PEFT \(LORA\), which would be overwritten"),
        ("config.json", {"model_type": "llama"}, "a whole model, which from_pretrained could then not load"),
    ],
)
def test_a_repository_with_something_else_is_refused(name: str, content: Any, what: str, hub: Hub) -> None:
    hub.create("org/adapter")
    before = hub.commit("org/adapter", "main", {name: json.dumps(content).encode()})
    with pytest.raises(ValueError, match=f"`repo_id` must be a separate repository, but 'org/adapter' contains {what}"):
        fastprefix.push_to_hub(attached("decoder", "prefix"), "org/adapter")
    assert hub.branches["org/adapter"]["main"] == before


def test_a_sharded_model_does_not_publish(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rank has the files."""
    model = attached("decoder", "adept")
    monkeypatch.setattr(tensor_parallel, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"must not be sharded .* publish an adapter\. Call save_adapter"):
        fastprefix.push_to_hub(model, "o/r")


def test_trainer_publishes_what_load_adapter_reads(hub: Hub, tmp_path: Path) -> None:
    """Trainer publishes a checkpoint of the whole model, and ``load_adapter`` reads only the adapter."""
    model = fastprefix.attach(models.encoder().float(), METHODS["prefix"]())
    of = trainer(model, "encoder", tmp_path / "out", max_steps=1, save_strategy="no", hub_model_id="org/whole")
    of.train()
    of.push_to_hub()
    other = fastprefix.load_adapter(models.encoder().float(), "org/whole")
    assert torch.equal(logits(other.eval()), logits(of.model.eval()))


def test_trainer_goes_back_to_the_best(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    of: Trainer = trainer(
        fastprefix.attach(models.decoder().float(), METHODS["apt"]()),
        "decoder",
        tmp_path,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which is not the last
        **options,
    )
    of.train()
    best = Path(str(of.state.best_model_checkpoint))
    assert best.name != "checkpoint-6"
    expected = fastprefix.load_adapter(models.decoder().float(), best).eval()
    assert torch.equal(logits(of.model.eval()), logits(expected))
