"""Test that a call of a model leaves no state behind, also if it fails."""

from typing import Any

import pytest
import torch

import fastprefix

from .... import models
from ..test_families import t5
from ..test_state import composite

IDS = models.batch()["input_ids"]


@torch.no_grad()
def test_an_encoder_has_the_current_prefix_after_a_call_that_failed() -> None:
    """The mask of one row is refused after the prefixes have been computed."""
    model = t5().eval()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(3, reparameterization="mlp", hidden_dim=8), check=False)
    models.randomize(model)
    encoder = model.get_encoder()
    former = encoder(IDS).last_hidden_state
    with pytest.raises(ValueError, match="`attention_mask` must be"):
        model(input_ids=IDS, attention_mask=torch.ones(3, 1, 1, 7, dtype=torch.bool), decoder_input_ids=IDS[:, :2])
    for parameter in model.fastprefix.parameters():
        parameter.mul_(2.0)
    states = encoder(IDS).last_hidden_state
    assert not torch.allclose(states, former)
    model(input_ids=IDS, decoder_input_ids=IDS[:, :2])
    assert torch.equal(encoder(IDS).last_hidden_state, states)


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_positions_are_shifted_in_a_call_only(fails: bool) -> None:
    """The text model inside the backbone is called by itself, with and without the adapter's call before."""
    model = composite()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(3, prefix_position="shift"), check=False)
    models.randomize(model)
    inner, embeds = model.model.language_model, torch.randn(1, 5, models.WIDTH, dtype=torch.float64)
    expected = inner(inputs_embeds=embeds).last_hidden_state
    handle: Any = model.model.language_model.norm.register_forward_hook(lambda *_: 1 / 0) if fails else None
    if handle is None:
        model(IDS)
    else:
        with pytest.raises(ZeroDivisionError):
            model(IDS)
        handle.remove()
    assert torch.equal(inner(inputs_embeds=embeds).last_hidden_state, expected)


def test_embeddings_are_tied_to_a_prefix_in_a_call_only() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(3), check=False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(IDS, attention_mask=torch.ones(3, 9))
    assert not model.get_input_embeddings()(IDS).requires_grad
