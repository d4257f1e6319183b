"""Test prefixes with a separate softmax: initial values, windows, and refusals."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, MistralForCausalLM

import fastprefix
from fastprefix.integrations.transformers.attachment import attach
from fastprefix.integrations.transformers.checking.conformance import check
from fastprefix.integrations.transformers.models.discovery import make_small_copy

from .... import models

OWN: dict[str, Any] = {"softmax": "own", "prefix_position": "shift"}


def attached(config: Any, model: Any = None, **options: Any) -> Any:
    model = fastprefix.attach(models.decoder() if model is None else model, config, check=False, **options)
    models.randomize(model)
    return model


@pytest.mark.parametrize("make", [models.encoder, models.decoder])
def test_training_starts_from_the_frozen_model(make: Any) -> None:
    inputs = models.batch("right")
    plain = make()
    expected = plain(**inputs).logits
    fastprefix.attach(plain, fastprefix.PrefixTuningConfig(5, softmax="own"))
    logits = plain(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    logits.square().sum().backward()
    moved = {name for name, p in plain.fastprefix.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"output_gates.0", "output_gates.1"}


@pytest.mark.parametrize(
    "config",
    [
        fastprefix.PrefixTuningConfig(5, key_bias=True, **OWN),
        fastprefix.APTConfig(5, **OWN),
        fastprefix.ResidualPrefixConfig(5, softmax="own"),
    ],
    ids=["key-bias", "apt", "residual"],
)
def test_windows_agree_with_the_textbook(config: Any) -> None:
    model = make_small_copy(AutoConfig.for_model("mistral"), MistralForCausalLM)
    unchecked = functools.partial(attach, check=False)
    report = check(model, config, unchecked, ["ids", "left padding", "long inputs"])
    assert report.agrees, str(report)
    assert {finding.verdict for finding in report.findings} == {"ok"}


def test_it_is_saved_merged_and_loaded(tmp_path: Path) -> None:
    config = fastprefix.PrefixTuningConfig(5, reparameterization="mlp", hidden_dim=8, **OWN)
    model, inputs = attached(config), models.batch("left")
    expected = model(**inputs).logits
    fastprefix.save_adapter(model, tmp_path / "whole")
    fastprefix.save_adapter(fastprefix.merge(model), tmp_path / "merged")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
    for folder in ("whole", "merged"):
        loaded = fastprefix.load_adapter(models.decoder(), tmp_path / folder)
        assert loaded.fastprefix.config.softmax == "own"
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="output_gates"):
        fastprefix.read_prefix(models.decoder(), tmp_path / "merged")


def test_what_has_no_place_for_a_second_softmax_refuses_it(tmp_path: Path) -> None:
    model = attached(fastprefix.PrefixTuningConfig(5, **OWN), name="own")
    with pytest.raises(ValueError, match='`softmax` must be "joint" for a cache'):
        fastprefix.export_cache(model)
    with pytest.raises(ValueError, match="does not support the gates"):
        fastprefix.save_adapter(model, tmp_path, format="peft")
    state = fastprefix.PrefixState(model.fastprefix.prefixes())
    with pytest.raises(ValueError, match='softmax="joint"'):
        fastprefix.swap_prefix(model, state)
    attached(fastprefix.PrefixTuningConfig(5, prefix_position="shift"), model, name="joint")
    with pytest.raises(ValueError, match=r"`names` .* 'own' does not: it has softmax="):
        fastprefix.compose(model, ["own", "joint"], name="both")
