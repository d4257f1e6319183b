"""Test checkpoints of whole models with a method, and refusals for merged models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, Trainer, TrainingArguments
from transformers.core_model_loading import PrefixChange

import fastprefix

from .... import models
from ..test_attach import FAMILIES, METHODS, attached
from ..test_state import composite


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("shards", ["5GB", "10KB"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_read_out_of_one(family: str, method: str, shards: str, tmp_path: Path) -> None:
    model, inputs = attached(family, method), models.batch("right")
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").is_file() == (shards == "5GB")
    other = fastprefix.load_adapter(FAMILIES[family](), tmp_path)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert "fastprefix_adapter" not in fastprefix.detach(other).config.to_dict()


RENAMED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "tied head": (lambda: models.decoder(tie_word_embeddings=True), ["lm_head"]),
    "tied table": (lambda: models.decoder(tie_word_embeddings=True), ["model.embed_tokens"]),
    "both": (lambda: models.decoder(tie_word_embeddings=True), ["lm_head", "model.embed_tokens"]),
    "renamed": (composite, ["model.multi_modal_projector", "lm_head"]),
    "prefixed": (lambda: prefixed(models.decoder()), ["model.norm"]),
}


def prefixed(model: Any) -> Any:
    """Return a model like one that was loaded from a checkpoint whose names all begin alike."""
    model._weight_conversions = [PrefixChange(prefix_to_remove="thinker")]
    return model


@pytest.mark.parametrize("case", RENAMED)
def test_trained_modules_have_other_names_in_it(case: str, tmp_path: Path) -> None:
    """It has one name of each tied tensor, and the names that the family's published checkpoints have."""
    make, names = RENAMED[case]
    config = fastprefix.PrefixTuningConfig(2, modules_to_save=names)
    model, inputs = fastprefix.attach(make(), config, check=False), models.batch()
    models.randomize(model)
    model.save_pretrained(tmp_path)
    other = fastprefix.load_adapter(make(), tmp_path)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_parameters_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    model = models.encoder()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), check=False).save_pretrained(tmp_path)
    other: Any = models.encoder()
    other.classifier = torch.nn.Linear(models.WIDTH, 2, bias=False).double()
    with pytest.raises(ValueError, match=r"only the adapter has modules_to_save\.classifier\.bias"):
        fastprefix.load_adapter(other, tmp_path)


def test_trainer_writes_one(tmp_path: Path) -> None:
    model, inputs = attached("encoder", "apt"), models.batch()
    rows = [{**{name: rows[i] for name, rows in inputs.items()}, "labels": i % 2} for i in range(3)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    other = fastprefix.load_adapter(models.encoder(), tmp_path / "checkpoint-1")
    assert torch.equal(other.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    models.decoder().save_pretrained(tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match=r"plain. does not contain adapter_model\.safetensors"):
        fastprefix.load_adapter(models.decoder(), tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fastprefix.load_adapter(models.decoder(), tmp_path / "nowhere")
    attached("decoder", "prefix").save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="belongs to a llama model, but `model` is a bert model"):
        fastprefix.load_adapter(models.encoder(), tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    description = json.loads(path.read_text())
    description["fastprefix_adapter"]["num_virtual_tokens"] += 1
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="does not fit this model"):
        fastprefix.load_adapter(models.decoder(), tmp_path / "whole")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"The JSON file .*config.json cannot be read"):
        fastprefix.load_adapter(models.decoder(), tmp_path / "whole")


def test_a_merged_model_is_neither_saved_nor_trained(tmp_path: Path) -> None:
    model = fastprefix.merge(attached("decoder", "adept"))
    with pytest.raises(ValueError, match="`save_pretrained` cannot save a model with a merged adapter"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert fastprefix.count_parameters(model).trainable == 0
    with pytest.raises(ValueError, match="has a merged adapter, which cannot be trained"):
        fastprefix.parameter_groups(model, lr=1.0)
    fastprefix.attach(model, METHODS["prefix"](), name="b")
    model.save_pretrained(tmp_path / "b")
    fastprefix.set_adapter(model, "default")
    with pytest.raises(ValueError, match="`save_pretrained` cannot"):
        model.save_pretrained(tmp_path / "a")
    fastprefix.detach(model)
    model.save_pretrained(tmp_path / "base")


def test_a_checkpoint_that_was_saved_again_without_the_parameters(tmp_path: Path) -> None:
    """``from_pretrained`` keeps the options in the configuration but drops the parameters."""
    attached("encoder", "prefix").save_pretrained(tmp_path / "first")
    BertForSequenceClassification.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    with pytest.raises(
        ValueError, match=r"again has the options of an adapter in config\.json, but not its parameters"
    ):
        fastprefix.load_adapter(models.encoder(), tmp_path / "again")
    fastprefix.load_adapter(models.encoder(), tmp_path / "first")
