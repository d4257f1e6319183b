"""Test that a small copy of a model keeps everything that determines how the model computes."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from fastprefix.integrations.transformers.models.discovery import (
    CONTEXT,
    WINDOW,
    CopyError,
    find_running_inputs,
    make_small_copy,
    shrink_config,
)


def config_of(family: str, **options: Any) -> Any:
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {family}")
    return AutoConfig.for_model(family, **options)


def test_longrope_keeps_its_factors() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + i / 48 for i in range(48)],
        "long_factor": [4.0 + i for i in range(48)],
    }
    config = config_of(
        "phi3", rope_parameters=rope, original_max_position_embeddings=4096, max_position_embeddings=131072
    )
    small = shrink_config(config)
    pairs = small.hidden_size // small.num_attention_heads // 2
    found = small.rope_parameters
    assert found["rope_type"] == "longrope"
    assert len(found["short_factor"]) == len(found["long_factor"]) == pairs
    assert (found["long_factor"][0], found["long_factor"][-1]) == (4.0, 51.0)
    assert small.original_max_position_embeddings == found["original_max_position_embeddings"] == CONTEXT
    assert small.max_position_embeddings == 32 * CONTEXT  # the attention is scaled by this ratio
    model: Any = make_small_copy(config)
    short, long = (model.model.rotary_emb(torch.zeros(1), torch.tensor([[1, end]]))[0] for end in (2, CONTEXT))
    assert not torch.allclose(short[0, 0], long[0, 0])


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3", "linear"])
def test_rope_types_are_kept(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = 2048
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    small = shrink_config(config_of("llama", rope_parameters=rope, max_position_embeddings=8192))
    assert small.rope_parameters["rope_type"] == kind
    assert small.rope_parameters["factor"] == 4.0
    if kind in ("yarn", "llama3"):
        assert small.rope_parameters["original_max_position_embeddings"] == CONTEXT
        assert small.max_position_embeddings == 4 * CONTEXT
    if kind == "dynamic":
        assert small.max_position_embeddings == CONTEXT
    make_small_copy(config_of("llama", rope_parameters=rope, max_position_embeddings=8192))


def test_sections_of_positions_add_up() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    small = shrink_config(config_of("qwen2_vl_text", rope_parameters=rope))
    assert small.rope_parameters["mrope_section"] == [2, 3, 3]


def test_sections_of_equal_size_stay_equal() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [22, 22, 20]}
    small = shrink_config(config_of("qwen2_vl_text", rope_parameters=rope))
    assert small.rope_parameters["mrope_section"] == [2, 2, 4]


def test_rotated_columns_are_a_part_of_a_latent_attention() -> None:
    small = shrink_config(config_of("mistral4"))
    assert small.head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim
    assert small.rope_parameters["partial_rotary_factor"] * small.head_dim == small.qk_rope_head_dim


def test_a_state_space_fits_its_width() -> None:
    small = shrink_config(config_of("falcon_h1"))
    assert small.mamba_d_ssm == small.mamba_n_heads * small.mamba_d_head == small.mamba_expand * small.hidden_size


def test_widths_that_follow_from_others() -> None:
    zamba = shrink_config(config_of("zamba2"))
    assert zamba.attention_hidden_size == 2 * zamba.hidden_size
    detr = shrink_config(config_of("rt_detr"))
    assert detr.decoder_in_channels == 3 * [detr.encoder_hidden_dim]
    assert detr.backbone_config.embedding_size == 64
    mimi = shrink_config(config_of("mimi"))
    assert mimi.upsample_groups == mimi.hidden_size
    dbrx = shrink_config(config_of("dbrx"))
    assert dbrx.ffn_config.hidden_size == dbrx.d_model
    sam = shrink_config(config_of("sam"))
    assert sam.prompt_encoder_config.image_embedding_size == sam.vision_config.image_size // 16


def test_layers_may_be_listed_without_a_count() -> None:
    small = shrink_config(config_of("nemotron_h"))
    assert len(small.layers_block_type) == len(set(small.layers_block_type))


def test_layers_that_share_weights_are_kept_twice() -> None:
    model = make_small_copy(config_of("zamba"))
    assert model.config.layers_block_type.count("hybrid") == 2


def test_a_vocabulary_keeps_words_of_every_kind() -> None:
    words = {f"IMGIMG{i}Z": i for i in range(4, 8196)} | {"<image>": 8711} | {f"w{i}": i for i in range(8712, 65536)}
    small = shrink_config(config_of("chameleon", vocabulary_map=words))
    places = small.vocabulary_map
    assert places["<image>"] == small.image_token_id
    assert len(set(places.values())) == len(places)
    assert max(places.values()) < small.vocab_size
    images = [word for word in places if word.startswith("IMG")]
    assert 0 < len(images) < len(places) / 4


def test_every_kind_of_layer_is_kept() -> None:
    gemma = shrink_config(config_of("gemma3_text"))
    assert sorted(gemma.layer_types) == ["full_attention", "sliding_attention"]
    assert gemma.num_hidden_layers == 2
    assert gemma.sliding_window == WINDOW
    smollm = shrink_config(config_of("smollm3"))
    assert sorted(smollm.no_rope_layers) == [0, 1]
    assert smollm.num_hidden_layers == len(smollm.no_rope_layers) == len(smollm.layer_types)
    llama = shrink_config(config_of("llama4_text"))
    assert set(llama.no_rope_layers) == {0, 1}
    assert set(llama.layer_types) == {"full_attention", "chunked_attention"}
    assert all(layer < llama.num_hidden_layers for layer in llama.moe_layers)
    assert llama.attention_chunk_size == WINDOW


def test_shared_keys_and_values_are_kept() -> None:
    config = config_of("gemma3n_text")
    small = shrink_config(config)
    shared = small.num_kv_shared_layers
    own, others = small.layer_types[:-shared], small.layer_types[-shared:]
    assert set(own) == set(others) == {"full_attention", "sliding_attention"}
    make_small_copy(config)


def test_dense_layers_come_first() -> None:
    small = shrink_config(config_of("deepseek_v3"))
    assert (small.first_k_dense_replace, small.num_hidden_layers) == (1, 2)


def test_grouped_heads_stay_grouped() -> None:
    heads = {"num_attention_heads": 32}
    for before, after in ((32, 4), (8, 2), (1, 1)):
        small = shrink_config(config_of("llama", num_key_value_heads=before, **heads))
        assert (small.num_attention_heads, small.num_key_value_heads) == (4, after)


def test_tokens_with_a_meaning_stay_apart() -> None:
    config = config_of("qwen2_5_vl")
    config.text_config.pad_token_id, config.text_config.bos_token_id = 151643, 151643
    config.text_config.eos_token_id = [151645, 151643]
    small = shrink_config(config)
    text = small.text_config
    assert text.pad_token_id == text.bos_token_id == text.eos_token_id[1] != text.eos_token_id[0]
    ids = {small.image_token_id, small.video_token_id, small.vision_start_token_id, text.pad_token_id}
    assert len(ids) == 4
    assert all(0 <= each < text.vocab_size for each in ids)
    assert shrink_config(config_of("roberta")).pad_token_id == 1


def test_the_configuration_is_left_alone() -> None:
    config = config_of("gemma3")
    before = config.to_dict()
    make_small_copy(config, transformers.Gemma3ForConditionalGeneration)
    assert config.to_dict() == before


def test_a_class_may_be_named() -> None:
    config = config_of("bert")
    model = make_small_copy(config, transformers.BertForSequenceClassification, torch.float64)
    assert type(model) is transformers.BertForSequenceClassification
    assert model.dtype is torch.float64
    assert model.num_parameters() < 200_000


def test_what_does_not_run_says_why() -> None:
    with pytest.raises(CopyError, match="cannot be built: ValueError: The `prediction_length`"):
        make_small_copy(config_of("informer"))


@pytest.mark.parametrize(
    "family", ["phi3", "gpt_neox", "gemma3n_text", "qwen3_vl_vision", "siglip2_vision_model", "patchtst", "whisper"]
)
def test_families_of_each_kind_are_copied(family: str) -> None:
    assert make_small_copy(config_of(family)).num_parameters() < 5_000_000


@pytest.mark.parametrize("family", ["blt", "csm", "glm46v", "janus", "kimi_linear"])
def test_what_is_beside_the_layers_is_small(family: str) -> None:
    assert make_small_copy(config_of(family)).num_parameters() < 10_000_000


REQUIRED: dict[str, set[str]] = {
    "blip_2_qformer": {"query_embeds", "encoder_hidden_states"},
    "decision_transformer": {"states", "actions", "rewards", "returns_to_go", "timesteps"},
    "fun_asr_nano_encoder": {"input_features", "input_features_mask"},
    "idefics": {"input_ids", "pixel_values", "image_attention_mask"},
    "kimi_k25_vision": {"pixel_values", "grid_thw"},
    "mimi_decoder": {"latents"},
    "minicpmv4_7_vision": {"pixel_values", "target_sizes"},
    "muse_glimmer_assistant": {"noise_embeds", "context_hidden_states"},
    "qwen3_asr_encoder": {"input_features", "input_features_mask"},
    "siglip2": {"input_ids", "pixel_values", "pixel_attention_mask", "spatial_shapes"},
    "timesfm2_5": {"past_values"},
    "udop": {"input_ids", "bbox", "decoder_input_ids", "use_cache"},
    "voxtral_realtime": {"input_ids", "input_features"},
}


@pytest.mark.parametrize("family", REQUIRED)
def test_required_inputs_are_known(family: str) -> None:
    config, names = config_of(family), transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    model = make_small_copy(config, getattr(transformers, str(names[family])))
    assert set(find_running_inputs(model)) == REQUIRED[family]


def test_kinds_of_layers_that_repeat_are_kept() -> None:
    config = config_of("recurrent_gemma")
    assert config.block_types == ["recurrent", "recurrent", "attention"]
    small = shrink_config(config)
    assert (small.num_hidden_layers, small.block_types) == (2, ["recurrent", "attention"])
