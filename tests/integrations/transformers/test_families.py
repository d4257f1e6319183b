"""Test prefix methods on encoder-decoders, images and sound against the textbook."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method

from ... import models
from ...float64 import Float64
from ...textbook import textbook

SMALL: dict[str, Any] = {"d_model": 32, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
HALVES: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "init_std": 0.2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            vocab_size=100,
            dropout_rate=0.0,
            decoder_start_token_id=1,
            pad_token_id=0,
            eos_token_id=2,
            initializer_factor=1.0,
        )
    )


def bart() -> Any:
    return BartForConditionalGeneration(BartConfig(**SMALL, **HALVES, max_position_embeddings=64))


def whisper_config() -> Any:
    return WhisperConfig(
        **SMALL, **HALVES, num_mel_bins=6, max_source_positions=5, max_target_positions=32, begin_suppress_tokens=None
    )


def wav2vec2() -> Any:
    return Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 4),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.0,
        )
    )


ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "bart": bart,
    "whisper": lambda: WhisperForConditionalGeneration(whisper_config()),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VISION)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "whisper-encoder": lambda: WhisperEncoder(whisper_config()),
    "wav2vec2": wav2vec2,
}
FAMILIES = {**ENCODER_DECODERS, **ENCODERS}
SHAPES = {"pixel_values": (3, 3, 8, 8), "input_features": (3, 6, 10), "input_values": (3, 120)}
PREFIXES: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(5),
    "apt": lambda: fastprefix.APTConfig(5),
    "residual": lambda: fastprefix.ResidualPrefixConfig(5, bottleneck_dim=8, hidden_dim=16),
}


def build(family: str) -> Any:
    """Build a tiny random model in float64."""
    torch.manual_seed(0)
    return FAMILIES[family]().double().eval()


def attached(family: str, config: Any) -> Any:
    model = fastprefix.attach(build(family), config)
    models.randomize(model)
    return model


def batch(model: Any) -> dict[str, Tensor]:
    """Return three rows. Rows of text are padded on the right."""
    inputs = models.batch("right")
    if (name := model.main_input_name) != "input_ids":
        torch.manual_seed(1)
        inputs = {name: torch.randn(SHAPES[name], dtype=torch.float64)}
    return inputs


def loss_and_gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output, and the gradients of a fixed combination of it."""
    model.zero_grad()
    with Float64():
        output = model(**inputs)[0]
        weights = torch.arange(output.numel(), dtype=output.dtype).cos().reshape(output.shape)
        (output * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}


def assert_matches_textbook(model: Any, inputs: dict[str, Tensor]) -> None:
    fused = loss_and_gradients(model, inputs)
    assert sum("fastprefix" in name for name in fused) == len(list(get_method(model).parameters()))
    with textbook(model):
        expected = loss_and_gradients(model, inputs)
    assert fused.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(fused[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("method", PREFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_textbook(family: str, method: str) -> None:
    model = attached(family, PREFIXES[method]())
    inputs = batch(model)
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = torch.randint(3, 100, (3, 4))
        mask = torch.ones(3, 4, dtype=torch.long)
        mask[1, 3:] = mask[2, 2:] = 0
        inputs["decoder_attention_mask"] = mask
    assert_matches_textbook(model, inputs)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("attentions", [("encoder",), ("decoder",), ("cross",), ("encoder", "cross")])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_attentions_are_chosen(family: str, attentions: Any, tmp_path: Path) -> None:
    model = attached(family, fastprefix.PrefixTuningConfig(5, attentions=attentions))
    shapes = get_method(model).shapes
    assert [shape.role for shape in shapes].count(attentions[0]) == 2
    assert {shape.role for shape in shapes} == set(attentions)
    assert all(shape.causal == (shape.role == "decoder") for shape in shapes)
    inputs = {**batch(model), "decoder_input_ids": torch.randint(3, 100, (3, 4))}
    assert_matches_textbook(model, inputs)
    fastprefix.save_adapter(model, tmp_path)
    other = fastprefix.load_adapter(build(family), tmp_path)
    with Float64():
        assert torch.equal(other(**inputs)[0], model(**inputs)[0])
        assert torch.equal(fastprefix.detach(other)(**inputs)[0], build(family)(**inputs)[0])


@pytest.mark.parametrize("method", PREFIXES)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_cached_and_uncached_generation_agree(family: str, method: str) -> None:
    model = attached(family, PREFIXES[method]())
    inputs = batch(model)
    model(**inputs, decoder_input_ids=torch.ones(3, 1, dtype=torch.long))
    models.randomize(model, std=0.5)  # nothing of the former call may be left
    for beams in (1, 3):
        cached, uncached = (
            model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=beams, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached)
    with textbook(model):
        assert torch.equal(cached, model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3))


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("family", ["vit", "bart"])
def test_compiles_without_graph_breaks(family: str) -> None:
    model = attached(family, fastprefix.PrefixTuningConfig(5))
    inputs = batch(model)
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = torch.randint(3, 100, (3, 4))
    expected = model(**inputs)[0]
    torch._dynamo.reset()
    try:
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)[0]
    except torch._dynamo.exc.Unsupported:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(build(family), fullgraph=True, backend="eager")(**inputs)
        pytest.skip("with this version of transformers, the plain model has graph breaks")
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert all(parameter.grad is not None for parameter in model.fastprefix.parameters())


def test_a_reparameterised_prefix_is_merged() -> None:
    config = fastprefix.ResidualPrefixConfig(5, bottleneck_dim=8, hidden_dim=16, attentions=("cross",))
    model = attached("bart", config)
    inputs = {**batch(model), "decoder_input_ids": torch.randint(3, 100, (3, 4))}
    expected = model(**inputs).logits
    torch.testing.assert_close(fastprefix.merge(model)(**inputs).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        (
            "t5",
            fastprefix.LlamaAdapterConfig(3),
            "`model` must be a text model for LlamaAdapterConfig.*encoder-decoder T5",
        ),
        ("vit", fastprefix.PromptTuningConfig(3), "ViTForImageClassification, whose input is pixel_values"),
        ("vit", fastprefix.LlamaAdapterConfig(3), "LlamaAdapterConfig"),
        ("t5", fastprefix.PrefixTuningConfig(3, prefix_position="shift"), 'prefix_position.*"none"'),
        ("whisper-encoder", fastprefix.PrefixTuningConfig(3, prefix_position="shift"), "prefix_position"),
        ("bart", fastprefix.PrefixTuningConfig(3, init="text", init_text="a"), '`init`.*is "text"'),
        ("vit", fastprefix.PrefixTuningConfig(3, attentions=("cross", "decoder")), "`attentions`.*encoder"),
        ("bart", fastprefix.APTConfig(3, pooling="cls"), '`pooling` must not be "cls" for cross-attention'),
        ("bart", fastprefix.APTConfig(3, pooling="mean"), '`pooling` must not be "mean"'),
    ],
)
def test_refused(family: str, config: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fastprefix.attach(build(family), config)


def test_pooling_over_an_encoder_alone() -> None:
    model = attached("bart", fastprefix.APTConfig(3, pooling="mean", attentions=("encoder",)))
    assert_matches_textbook(model, {**batch(model), "decoder_input_ids": torch.randint(3, 100, (3, 4))})


@pytest.mark.parametrize("attentions", [(), "encoder", ("self",)])
def test_attentions_are_checked(attentions: Any) -> None:
    with pytest.raises(ValueError, match="attentions"):
        fastprefix.PrefixTuningConfig(3, attentions=attentions)


def test_attentions_come_back_as_a_tuple() -> None:
    options = fastprefix.PrefixTuningConfig(3, attentions=("cross",)).to_dict()
    assert type(options)(options) == options
    config: Any = fastprefix.PrefixTuningConfig.from_dict({**options, "attentions": ["cross"]})
    assert config.attentions == ("cross",)


def test_one_row_masks_of_the_caller_are_refused() -> None:
    model = attached("bart", fastprefix.PrefixTuningConfig(3))
    inputs = {**batch(model), "decoder_input_ids": torch.ones(3, 2, dtype=torch.long)}
    inputs["attention_mask"] = inputs["attention_mask"].bool()[:, None, None, :]
    with pytest.raises(ValueError, match=r"`attention_mask` must be \[B, N\]"):
        model(**inputs)


def test_checkpointing_changes_nothing() -> None:
    model = attached("bart", PREFIXES["residual"]()).train()
    inputs = {**batch(model), "decoder_input_ids": torch.randint(3, 100, (3, 4))}
    expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = loss_and_gradients(model, inputs)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)


def test_reentrant_checkpointing_is_refused() -> None:
    model = attached("bart", fastprefix.PrefixTuningConfig(3)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="`use_reentrant` must be False"):
        model(**batch(model), decoder_input_ids=torch.ones(3, 2, dtype=torch.long))
