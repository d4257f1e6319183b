"""Test caches of accelerated PEFT models (copied, cropped, reordered, reset) against PEFT's caches in float64."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration
from transformers.cache_utils import Cache

import fastprefix
from fastprefix.integrations.transformers.models.hooks import find_cache, find_cache_parameter, read_parameter_names

from ... import models
from .test_accelerate import LENGTH, family, tuned

pytestmark = pytest.mark.peft

KINDS = ["prefix", "cartridge", "prompt"]


def filled(model: Any) -> Cache:
    """Return the cache after a call with seven tokens."""
    with torch.no_grad():
        cache = find_cache(list(model(**models.batch(), use_cache=True).values()))
    assert cache is not None
    return cache


def continued(model: Any, cache: Cache, rows: int = 3) -> Tensor:
    """Return the logits of two more tokens."""
    base = model.get_base_model()
    name = find_cache_parameter(read_parameter_names(base))
    ids = torch.tensor([[7, 8]]).expand(rows, -1)
    with torch.no_grad():
        logits: Tensor = base(input_ids=ids, **{str(name): cache}).logits
    return logits


def cropped(count: int) -> Callable[[Cache], Cache]:
    """Return a function that removes the last tokens from a cache."""

    def crop(cache: Cache) -> Cache:
        cache.crop(-count)
        return cache

    return crop


def changed(method: str, *args: Any) -> Callable[[Cache], Cache]:
    """Return a function that calls a method of a cache."""

    def change(cache: Cache) -> Cache:
        getattr(cache, method)(*args)
        return cache

    return change


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "deepcopy": (copy.deepcopy, 3),
    "pickle": (lambda cache: pickle.loads(pickle.dumps(cache)), 3),
    "no crop": (cropped(0), 3),
    "crop tokens": (cropped(2), 3),
    "crop all tokens": (cropped(7), 3),
    "crop into the prefix": (cropped(9), 3),
    "reorder": (changed("reorder_cache", torch.tensor([2, 0, 0])), 3),
    "repeat": (changed("batch_repeat_interleave", 2), 6),
    "select": (changed("batch_select_indices", torch.tensor([2, 1])), 2),
    "reset": (changed("reset"), 3),
    "crop a copy": (lambda cache: cropped(8)(copy.deepcopy(cache)), 3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_cache_goes_on_as_pefts_own(kind: str, change: str) -> None:
    if change == "reset":  # which left the length of a cache as it was
        models.require("transformers", 5, 23)
    model, (run, rows) = family("decoder", kind), CHANGES[change]
    cache = run(filled(model))
    length, expected = cache.get_seq_length(), continued(model, cache, rows)
    fastprefix.accelerate(model)
    cache = run(filled(model))
    assert cache.get_seq_length() == length
    torch.testing.assert_close(continued(model, cache, rows), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_cache_fits_a_copied_model(kind: str, change: Callable[[Any], Any]) -> None:
    model = fastprefix.accelerate(family("decoder", kind))
    expected, cache = continued(model, filled(model)), change(filled(model))
    torch.testing.assert_close(continued(copy.deepcopy(model), cache), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_accelerated_refuses_the_cache(kind: str) -> None:
    """It would not attend to the prefix."""
    model = fastprefix.accelerate(family("decoder", kind))
    cache = filled(model)
    fastprefix.decelerate(model)
    with pytest.raises(RuntimeError, match="accelerated"):
        continued(model, cache)


def bart(**sizes: int) -> Any:
    """Return a small encoder-decoder with a prefix."""
    config = BartConfig(
        **{"encoder_layers": 2, "decoder_layers": 2, **sizes},
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=models.VOCABULARY,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    return tuned(BartForConditionalGeneration(config), "prefix", "SEQ_2_SEQ_LM")


OPTIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "groups": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layers", [{}, {"encoder_layers": 4}, {"encoder_layers": 3}], ids=str)
def test_generation_of_encoder_decoders(layers: dict[str, int], name: str) -> None:
    model = bart(**layers)
    rows = slice(0, 1) if name == "lookup" else slice(None)
    inputs = {key: value[rows] for key, value in models.batch().items()}

    def generate() -> Tensor:
        torch.manual_seed(3)
        options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False, **OPTIONS[name]}
        tokens: Tensor = model.generate(**inputs, **options)
        return tokens

    expected = generate()
    fastprefix.accelerate(model)
    assert torch.equal(generate(), expected)


@pytest.mark.parametrize(("kind", "assistant"), [("prefix", False), ("cartridge", False), ("prompt", True)])
def test_assisted_generation(kind: str, assistant: bool) -> None:
    """Many tokens are removed again. PEFT fails with an assistant for prefixes, and with a lookup for prompts."""
    inputs = {key: value[:1] for key, value in models.batch().items()}
    model = family("decoder", kind)
    options = {"assistant_model": models.decoder()} if assistant else {"prompt_lookup_num_tokens": 2}

    def generate() -> Tensor:
        tokens: Tensor = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
        return tokens

    expected = generate()
    fastprefix.accelerate(model)
    assert torch.equal(generate(), expected)


def test_a_cache_says_what_is_in_it() -> None:
    cache = filled(fastprefix.accelerate(family("decoder", "prefix")))
    assert cache.get_seq_length() == LENGTH + 7
    cache.crop(-9)
    assert cache.get_seq_length() == LENGTH - 2
    cache.reset()
    assert cache.get_seq_length() == 0
