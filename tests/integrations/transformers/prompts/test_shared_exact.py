"""Test that a shared prompt gives the textbook's numbers, runs in every row, or is refused, in every situation.

The textbook: the untouched model on the prompt's embeddings in front of the tokens', with a mask for both.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BioGptConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method
from fastprefix.integrations.transformers.models.hooks import find_cache, find_cache_parameter, read_parameter_names

from .... import models
from ....float64 import Float64
from .test_shared_prompt import EAGER, SMALL

LENGTH, CONTEXT, BOUND = 5, 16, 1e-10
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": models.VOCABULARY, "initializer_range": 0.2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0], "rope_theta": 100.0}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": CONTEXT, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
DEFAULT = {"rope_type": "default", "rope_theta": 100.0}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
LAYERS = {"sliding_attention": DEFAULT, "full_attention": LONG}

BY_LENGTH: dict[str, Callable[[], PretrainedConfig]] = {
    "longrope-phi3": lambda: Phi3Config(
        **GROUPED, max_position_embeddings=64, original_max_position_embeddings=CONTEXT, rope_parameters=dict(LONG)
    ),
    "longrope-llama": lambda: LlamaConfig(**GROUPED, max_position_embeddings=64, rope_parameters=dict(LONG)),
    "longrope-phimoe": lambda: PhimoeConfig(
        **GROUPED,
        num_local_experts=4,
        sliding_window=None,
        max_position_embeddings=64,
        rope_parameters={**LONG, "short_mscale": 1.1, "long_mscale": 1.3},
    ),
    "longrope-gemma3-full-layers": lambda: longrope_of_layers(),
    "dynamic-llama": lambda: LlamaConfig(**GROUPED, max_position_embeddings=CONTEXT, rope_parameters=dict(DYNAMIC)),
    "dynamic-gpt_neox": lambda: GPTNeoXConfig(
        **SMALL, max_position_embeddings=CONTEXT, rope_parameters={**DYNAMIC, "partial_rotary_factor": 1.0}
    ),
    "dynamic-gemma3-window-layers": lambda: Gemma3TextConfig(
        **GROUPED,
        **MIXED,
        sliding_window=6,
        max_position_embeddings=CONTEXT,
        rope_parameters={"sliding_attention": dict(DYNAMIC), "full_attention": dict(DEFAULT)},
    ),
}
OTHERS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral-window": lambda: MistralConfig(**GROUPED, sliding_window=6),
    "gemma2-window": lambda: Gemma2Config(**GROUPED, **MIXED, sliding_window=4, query_pre_attn_scalar=8),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "gpt2": lambda: GPT2Config(**GPT2, n_positions=40, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=40, dropout=0.0),
    "biogpt": lambda: BioGptConfig(**SMALL, max_position_embeddings=40, **NO_DROPOUT),
    "bert": lambda: BertConfig(**SMALL, **NO_DROPOUT, is_decoder=True, max_position_embeddings=40),
    "roberta": lambda: RobertaConfig(**SMALL, **NO_DROPOUT, is_decoder=True, max_position_embeddings=42),
}


def longrope_of_layers() -> Gemma3TextConfig:
    """Only the rotary frequencies of full layers change with the length."""
    models.require("transformers", 5, 23)
    layers = copy.deepcopy(LAYERS)
    return Gemma3TextConfig(**GROUPED, **MIXED, sliding_window=6, max_position_embeddings=64, rope_parameters=layers)


FAMILIES = {**BY_LENGTH, **OTHERS}
TYPED = ("gpt2", "bert")


def build(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **EAGER).double().eval()


def attached(plain: Any, config: Any = None) -> Any:
    """Return a copy of a model with a random prompt."""
    model = fastprefix.attach(copy.deepcopy(plain), config or fastprefix.PromptTuningConfig(LENGTH))
    models.randomize(model)
    return model


def batch(tokens: int, padding: str = "none") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, models.VOCABULARY, (3, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :2] = mask[2, : tokens // 2] = 0
    elif padding == "right":
        mask[1, -2:] = mask[2, -(tokens // 2) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def textbook(plain: Any, prompt: Tensor, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
    """Return the output of the plain model with the prompt in front of every row."""
    rows = plain.get_input_embeddings()(input_ids)
    embeds = torch.cat([prompt.expand(len(rows), -1, -1), rows], dim=1)
    mask = torch.nn.functional.pad(attention_mask, (len(prompt), 0), value=1)
    types = kwargs.pop("token_type_ids", None)
    if types is not None:
        kwargs["token_type_ids"] = torch.nn.functional.pad(types, (len(prompt), 0))
    return plain(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= BOUND * expected.abs().max()


def assert_same_call(model: Any, plain: Any, **inputs: Tensor) -> None:
    """Compare the values of all tokens except padding, and the prompt's gradient."""
    seen = inputs["attention_mask"].bool()
    prompt = model.fastprefix.prompt.detach().clone().requires_grad_()
    expected = textbook(plain, prompt, **inputs).logits[:, LENGTH:][seen]
    actual = model(**inputs).logits[seen]
    assert_close(actual, expected)
    weights = torch.arange(actual.numel(), dtype=actual.dtype).cos().reshape(actual.shape)
    gradients = [
        torch.autograd.grad((logits * weights).sum(), leaf)[0]
        for logits, leaf in ((actual, model.fastprefix.prompt), (expected, prompt))
    ]
    assert_close(*gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_and_long_rows(family: str) -> None:
    """Rows alternate within and beyond the original context and the windows, since models remember a long row."""
    with Float64():
        plain = build(FAMILIES[family]())
        model = attached(plain)
        fits = CONTEXT - LENGTH
        for tokens, padding in (
            (7, "none"),
            (fits, "right"),
            (fits + 1, "none"),
            (24, "left"),
            (24, "right"),
            (7, "left"),
        ):
            assert_same_call(model, plain, **batch(tokens, padding))
            assert get_method(model).prompt_path == "shared"


@pytest.mark.parametrize("family", BY_LENGTH)
def test_inference_in_turn(family: str) -> None:
    """The states that are kept of the prompt for inference are valid for rows of the same kind only."""
    with Float64(), torch.no_grad():
        plain = build(FAMILIES[family]())
        model = attached(plain)
        for tokens in (7, 24, 8, 24, 11, 7):
            inputs = batch(tokens, "left")
            seen = inputs["attention_mask"].bool()
            expected = textbook(plain, model.fastprefix.prompt, **inputs).logits[:, LENGTH:][seen]
            assert_close(model(**inputs).logits[seen], expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_continued_cache(family: str, grad: bool) -> None:
    """Cached keys keep their rotation if a later piece exceeds the original context."""
    inputs = batch(24, "left")
    seen, pieces = inputs["attention_mask"].bool(), (6, 4, 13, 1)
    with Float64(), torch.set_grad_enabled(grad):
        plain = build(FAMILIES[family]())
        model = attached(plain)
        prompt = model.fastprefix.prompt.detach().clone().requires_grad_(grad)
        actual, expected = [], []
        model_cache = plain_cache = None
        for end, ids in zip(torch.tensor(pieces).cumsum(0), inputs["input_ids"].split(pieces, 1), strict=True):
            mask = inputs["attention_mask"][:, :end]
            output = model(input_ids=ids, attention_mask=mask, past_key_values=model_cache, use_cache=True)
            model_cache = find_cache(list(output.values()))
            actual.append(output.logits)
            if plain_cache is None:
                output = textbook(plain, prompt, ids, mask, use_cache=True)
            else:
                mask = torch.nn.functional.pad(mask, (LENGTH, 0), value=1)
                output = plain(input_ids=ids, attention_mask=mask, past_key_values=plain_cache, use_cache=True)
            plain_cache = find_cache(list(output.values()))
            expected.append(output.logits[:, -ids.shape[1] :])
        assert isinstance(model_cache, DynamicCache)
        logits = [torch.cat(parts, dim=1)[seen] for parts in (actual, expected)]
        assert_close(*logits)
        if grad:
            sums = [each.square().sum() for each in logits]
            leaves = (model.fastprefix.prompt, prompt)
            assert_close(*(torch.autograd.grad(s, leaf)[0] for s, leaf in zip(sums, leaves, strict=True)))


@pytest.mark.parametrize("family", ["longrope-llama", "longrope-gemma3-full-layers", "dynamic-llama"])
def test_generation_across_the_original_context(family: str) -> None:
    """Growing, static and no caches give the results of a prompt in every row, which also keeps cached keys."""
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with Float64(), torch.no_grad():
        plain = build(FAMILIES[family]())
        model, every_row = (
            attached(plain, fastprefix.PromptTuningConfig(LENGTH, shared_prompt=s)) for s in (None, False)
        )
        for search in ({}, {"num_beams": 2}):
            expected = every_row.generate(**batch(8, "left"), **options, **search)
            assert torch.equal(model.generate(**batch(8, "left"), **options, **search), expected)
            static = {"cache_implementation": "static"}
            assert torch.equal(model.generate(**batch(8, "left"), **options, **search, **static), expected)
        options["use_cache"] = False
        expected = every_row.generate(**batch(8, "left"), **options)
        assert torch.equal(model.generate(**batch(8, "left"), **options), expected)


@pytest.mark.parametrize("tokens", [7, 24])
def test_rotary_frequencies_for_the_row_compile_without_graph_breaks(tokens: int) -> None:
    models.require("transformers", 5, 23)
    config = BY_LENGTH["longrope-llama"]()
    config.num_hidden_layers = 1
    with Float64():
        model = attached(build(config))
        ids = batch(tokens)["input_ids"]
        expected = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_two_caches_in_turn_and_a_copied_one() -> None:
    """Each cache continues with its first prompt."""
    with Float64(), torch.no_grad():
        plain = build(BY_LENGTH["longrope-phi3"]())
        model = attached(plain)
        caches, expected = [], []
        for tokens in (9, 20):
            inputs = batch(tokens)
            caches.append(find_cache(list(model(**inputs, use_cache=True).values())))
            expected.append(
                find_cache(list(textbook(plain, model.fastprefix.prompt, **inputs, use_cache=True).values()))
            )
        caches[1] = copy.deepcopy(caches[1])
        ids = torch.full((3, 1), 9)
        for cache, other in zip(caches, expected, strict=True):
            assert_close(
                model(input_ids=ids, past_key_values=cache).logits, plain(input_ids=ids, past_key_values=other).logits
            )


@pytest.mark.parametrize("family", TYPED)
def test_token_types(family: str) -> None:
    """The prompt's type is 0, which GPT-2 embeds. The states that are kept for inference depend on it."""
    inputs = batch(7, "left")
    types = torch.ones_like(inputs["input_ids"])
    with Float64():
        plain = build(OTHERS[family]())
        model = attached(plain)
        assert_same_call(model, plain, **inputs, token_type_ids=types)
        seen, prompt = inputs["attention_mask"].bool(), model.fastprefix.prompt
        with torch.no_grad():
            for given in ({}, {"token_type_ids": types}, {}):
                expected = textbook(plain, prompt, **inputs, **given).logits[:, LENGTH:]
                assert_close(model(**inputs, **given).logits[seen], expected[seen])
    assert get_method(model).prompt_path == "shared"


def test_a_merged_prompt_is_refused_where_its_rotation_is_another() -> None:
    with Float64(), torch.no_grad():
        plain = build(BY_LENGTH["longrope-phi3"]())
        model = attached(plain)
        inputs = batch(CONTEXT - LENGTH)
        expected = textbook(plain, model.fastprefix.prompt, **inputs).logits[:, LENGTH:]
        fastprefix.merge(model)
        assert_close(model(**inputs).logits, expected)
        with pytest.raises(ValueError, match="`input_ids` ends at position 17"):
            model(**batch(CONTEXT - LENGTH + 1))
        with pytest.raises(ValueError, match="rotated for rows of up to 16"):
            fastprefix.export_cache(model)


@pytest.mark.parametrize("family", BY_LENGTH)
def test_accelerated_prompts(family: str) -> None:
    peft = pytest.importorskip("peft")
    inputs = batch(24, "left")
    with Float64(), torch.no_grad():
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
        model = peft.get_peft_model(build(BY_LENGTH[family]()), config).double().eval()
        models.randomize(model)
        expected = model(**inputs).logits
        fastprefix.accelerate(model, check=False)  # a router draws noise in training
        assert model.fastprefix.prompt_path == "shared"
        seen = torch.nn.functional.pad(inputs["attention_mask"], (LENGTH, 0), value=1).bool()
        assert_close(model(**inputs).logits[seen], expected[seen])


# Positions that are no plain count: images

IMAGE, START, END, VIDEO = 90, 91, 92, 93
TEXT = {**GROUPED, "max_position_embeddings": 128}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": VIDEO}


def qwen2_vl(**text: Any) -> Any:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE, **text}, vision_config=vision, **TOKENS)
    return Qwen2VLForConditionalGeneration._from_config(config, **EAGER)


def qwen2_5_vl() -> Any:
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"intermediate_size": 16, "fullatt_block_indexes": [0], "window_size": 16}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, **EAGER)


def qwen3_vl() -> Any:
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"intermediate_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**TEXT, "head_dim": 8, "rope_parameters": MROPE}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return Qwen3VLForConditionalGeneration._from_config(config, **EAGER)


def glm4v() -> Any:
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4, "image_size": 16}
    vision |= {"intermediate_size": 16}
    text = {**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
    names = {"image_start_token_id": START, "image_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO}
    config = Glm4vConfig(
        text_config=text, vision_config=vision, video_start_token_id=94, video_end_token_id=95, **names
    )
    return Glm4vForConditionalGeneration._from_config(config, **EAGER)


WITH_IMAGES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "glm4v": glm4v}


def image_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor(
        [[5, 6, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 7, 8, 9], [0, 0, 5, START, *[IMAGE] * 4, END, 9, 4]]
    )
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(32, 96, dtype=torch.float64, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def text_model_call(plain: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments that the model passes to its text model."""
    seen: dict[str, Any] = {}
    handle = plain.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    plain(**inputs, use_cache=False)
    handle.remove()
    return seen


@pytest.mark.parametrize("shared", [None, False])
@pytest.mark.parametrize("family", WITH_IMAGES)
def test_images(family: str, shared: bool | None) -> None:
    """The model computes the tokens' positions in time and space, and they move by the prompt's length."""
    torch.manual_seed(0)
    inputs = image_inputs()
    seen = inputs["attention_mask"].bool()
    with Float64():
        plain = WITH_IMAGES[family]().double().eval()
        model = attached(plain, fastprefix.PromptTuningConfig(LENGTH, shared_prompt=shared))
        prompt = model.fastprefix.prompt.detach().clone().requires_grad_()
        call = text_model_call(plain, inputs)
        rows, positions = call.pop("inputs_embeds"), call.pop("position_ids")
        assert positions.ndim == 3
        front = torch.arange(LENGTH).expand(len(positions), 2, -1)
        call.update(
            inputs_embeds=torch.cat([prompt.expand(2, -1, -1), rows], dim=1),
            position_ids=torch.cat([front, positions + LENGTH], dim=-1),
            attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (LENGTH, 0), value=1),
        )
        if (mask := call.get("visual_pos_masks")) is not None:
            call["visual_pos_masks"] = torch.nn.functional.pad(mask, (LENGTH, 0))
        hidden = plain.model.language_model(**call).last_hidden_state[:, LENGTH:]
        expected = plain.lm_head(hidden)[seen]
        for again in range(2):  # some models remember the positions of a batch
            actual = model(**inputs).logits[seen]
            assert_close(actual, expected)
            if again == 0:
                text = {"input_ids": torch.arange(3, 10)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
                model(**text)
        leaves = (model.fastprefix.prompt, prompt)
        sums = (actual.square().sum(), expected.square().sum())
        assert_close(*(torch.autograd.grad(s, leaf)[0] for s, leaf in zip(sums, leaves, strict=True)))
        if shared is None:
            assert get_method(model).prompt_path == "shared"


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_images_behind_a_prefix(family: str) -> None:
    torch.manual_seed(0)
    inputs = image_inputs()
    with Float64(), torch.no_grad():
        plain = WITH_IMAGES[family]().double().eval()
        model = attached(plain, fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift"))
        cache = DynamicCache()
        for index, (key, value) in enumerate(model.fastprefix.prefixes()):
            cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), index)
        call = text_model_call(plain, inputs)
        call["position_ids"] = call["position_ids"] + LENGTH
        call["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (LENGTH, 0), value=1)
        call[find_cache_parameter(read_parameter_names(plain.model.language_model))] = cache
        expected = plain.lm_head(plain.model.language_model(**call).last_hidden_state)
        seen = inputs["attention_mask"].bool()
        assert_close(model(**inputs).logits[seen], expected[seen])


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_generation_with_images_is_that_of_forward(family: str) -> None:
    torch.manual_seed(0)
    inputs = image_inputs()
    with Float64(), torch.no_grad():
        model = attached(WITH_IMAGES[family]().double().eval())
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        assert_close(output.logits[0], model(**inputs).logits[:, -1])
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), output.sequences)


def test_images_whose_positions_change_rotary_frequencies() -> None:
    """The last position is unknown before the model runs, so the prompt runs in every row."""
    torch.manual_seed(0)
    rope = {**MROPE, "rope_type": "dynamic", "factor": 4.0}
    inputs = image_inputs()
    model = attached(qwen2_vl(rope_parameters=rope, max_position_embeddings=10).double().eval())
    model(input_ids=torch.arange(3, 10)[None])
    assert get_method(model).prompt_path == "shared"
    hooks = model._fastprefix_attachment.hooks
    reason = hooks.find_reason_against(inputs)
    assert reason is not None
    assert "rotary frequencies" in reason


def paligemma() -> Any:
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    vision = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "hidden_size": 32}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "projection_dim": 32}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=4, projection_dim=32)
    torch.manual_seed(0)
    return PaliGemmaForConditionalGeneration._from_config(config, **EAGER).double().eval()


@pytest.mark.parametrize(
    "config",
    [fastprefix.PromptTuningConfig(LENGTH), fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift")],
    ids=["prompt", "shift"],
)
def test_positions_that_count_from_one(config: Any) -> None:
    """PaliGemma counts from 1. Without a mask, a gap in the positions would begin another sequence."""
    with Float64(), torch.no_grad():
        model = attached(paligemma(), config)
        ids = torch.randint(6, 99, (2, 7), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        options |= {"eos_token_id": None, "pad_token_id": 1}
        outputs = [model.generate(input_ids=ids, **options, use_cache=cached).logits for cached in (True, False)]
        assert_close(torch.stack(outputs[0]), torch.stack(outputs[1]))
        assert_close(outputs[0][0], model(input_ids=ids).logits[:, -1])


@pytest.mark.parametrize("shared", [None, False])
def test_given_positions_with_a_gap_behind_the_prompt(shared: bool | None) -> None:
    """Rows whose first position is not 0 are not packed sequences."""
    ids = batch(7)["input_ids"]
    positions = torch.arange(3, 10)[None].expand(3, -1)
    with Float64(), torch.no_grad():
        plain = build(OTHERS["llama"]())
        model = attached(plain, fastprefix.PromptTuningConfig(LENGTH, shared_prompt=shared))
        both = torch.cat([torch.arange(LENGTH).expand(3, -1), positions + LENGTH], dim=1)
        expected = textbook(plain, model.fastprefix.prompt, ids, torch.ones_like(ids), position_ids=both).logits
        actual = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert_close(actual, expected[:, LENGTH:])


# Tables of learned positions

ROWS = {"gpt2": 40, "opt": 40, "biogpt": 40, "bert": 40, "roberta": 40}


def methods() -> dict[str, Any]:
    return {
        "shared": fastprefix.PromptTuningConfig(LENGTH),
        "every row": fastprefix.PromptTuningConfig(LENGTH, shared_prompt=False),
        "shift": fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift"),
    }


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("family", ROWS)
def test_inputs_beyond_the_table(family: str, method: str) -> None:
    """Positions count, not rows: given positions within the table are accepted."""
    model = attached(build(OTHERS[family]()), methods()[method])
    longest = ROWS[family] - LENGTH
    ids = torch.randint(3, models.VOCABULARY, (1, longest + 1), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids[:, :longest])
    with pytest.raises(ValueError, match=r"`input_ids` must have at most 35 tokens, .* by 5 positions .* 40 positions"):
        model(input_ids=ids)
    first = 2 if family == "roberta" else 0
    positions = first + (torch.arange(longest + 1) - 1).clamp(min=0)[None]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    model(input_ids=ids, attention_mask=mask, position_ids=positions)
    with pytest.raises(ValueError, match=r"`input_ids` must have at most 35 tokens, .* by 5 positions .* 40 positions"):
        model(input_ids=ids[:, :3], position_ids=positions[:, -3:] + 1)


def test_the_table_of_an_audio_tower_limits_no_text() -> None:
    text = {**TEXT, "model_type": "llama"}
    audio = {"model_type": "voxtral_encoder", "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16}
    audio |= {"num_hidden_layers": 1, "num_mel_bins": 80, "max_source_positions": 10}
    ids = torch.arange(5, 40)[None]
    for config in methods().values():
        torch.manual_seed(0)
        model = VoxtralForConditionalGeneration(VoxtralConfig(text_config=text, audio_config=audio, audio_token_id=0))
        attached(model.double().eval(), config)(input_ids=ids)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_roberta_moves_embeddings_as_it_moves_ids(padding: str) -> None:
    torch.manual_seed(0)
    plain = (
        RobertaModel(RobertaConfig(**SMALL, **NO_DROPOUT, pad_token_id=1, max_position_embeddings=42)).double().eval()
    )
    inputs = batch(7, padding)
    rows = plain.get_input_embeddings()(inputs["input_ids"])
    model = attached(plain, fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift"))
    mask, seen = inputs["attention_mask"], inputs["attention_mask"].bool()
    actual = model(inputs_embeds=rows, attention_mask=mask).last_hidden_state
    expected = model(
        input_ids=inputs["input_ids"], attention_mask=mask, position_ids=torch.arange(2, 9)[None]
    ).last_hidden_state
    assert_close(actual[seen], expected[seen])
    assert (actual - plain(inputs_embeds=rows, attention_mask=mask).last_hidden_state).abs().max() > 1e-2


# Outputs


@pytest.mark.parametrize("shared", [None, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        lambda: MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
        lambda: OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    ],
    ids=["mixtral", "olmoe"],
)
def test_the_load_balancing_loss(config: Callable[[], Any], masked: bool, shared: bool | None) -> None:
    """The prompt's tokens are counted in every row, and padding is not counted."""
    inputs = batch(7, "right")
    if not masked:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with Float64():
        plain = build(config())
        model = attached(plain, fastprefix.PromptTuningConfig(LENGTH, shared_prompt=shared))
        prompt = model.fastprefix.prompt
        expected = textbook(plain, prompt, **inputs, output_router_logits=True)
        given = inputs if masked else {"input_ids": inputs["input_ids"]}
        actual = model(**given, output_router_logits=True)
        assert_close(actual.aux_loss, expected.aux_loss)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, 0] = -100  # the textbook's prompt predicts the first token
        loss = model(**given, labels=labels, output_router_logits=True).loss
        padded = torch.nn.functional.pad(labels, (LENGTH, 0), value=-100)
        assert_close(loss, textbook(plain, prompt, **inputs, labels=padded, output_router_logits=True).loss)
        model(**given)
        assert (get_method(model).prompt_path == "shared") is (shared is None)


def test_attention_weights_are_those_of_a_prompt_in_every_row() -> None:
    inputs = batch(7, "left")
    seen = inputs["attention_mask"].bool()
    with Float64(), torch.no_grad():
        plain = build(OTHERS["llama"]())
        model = attached(plain)
        expected = textbook(plain, model.fastprefix.prompt, **inputs, output_attentions=True).attentions
        actual = model(**inputs, output_attentions=True).attentions
        assert len(actual) == len(expected) == 2
        for weights in zip(actual, expected, strict=True):
            assert_close(*weights)
        assert "attention weights" in get_method(model).prompt_path
        with pytest.raises((IndexError, ValueError)):
            model(input_ids=torch.full((1, 3), models.VOCABULARY), output_attentions=True)
        expected = textbook(plain, model.fastprefix.prompt, **inputs).logits[:, LENGTH:]
        assert_close(model(**inputs).logits[seen], expected[seen])
        assert get_method(model).prompt_path == "shared"


def test_attention_weights_of_a_model_that_makes_none() -> None:
    model = attached(AutoModelForCausalLM.from_config(OTHERS["llama"](), attn_implementation="sdpa").eval())
    with pytest.raises(ValueError, match="`output_attentions` requires"):
        model(**batch(7), output_attentions=True)
    model(**batch(7))
