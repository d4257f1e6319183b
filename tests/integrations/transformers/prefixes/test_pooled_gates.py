"""Test gates pooled from a sequence's tokens (APT) with windows, padding, packed rows, chunks, caches and masks."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

import fastprefix
from fastprefix.integrations.transformers.models.hooks import find_cache

from .... import models

SIZES: dict[str, Any] = {**models.SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
MIXED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
DECODERS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **MIXED)),  # one layer with a window, one without
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
IDS = torch.arange(5, 5 + 22).reshape(2, 11)


def attached(model: PreTrainedModel, config: Any) -> Any:
    """Return the model in float64, including its norms, with random parameters of the method."""
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, nn.RMSNorm(module.weight.shape[0], module.variance_epsilon))
    fastprefix.attach(model.double().eval(), config)
    models.randomize(model, 0.5)
    return model


def decoder(name: str) -> Any:
    torch.manual_seed(0)
    return attached(DECODERS[name](), fastprefix.APTConfig(3, pooling="cls"))


def modernbert(pooling: Any) -> Any:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "num_hidden_layers")}
    tokens = {"cls_token_id": 1, "sep_token_id": 2}
    config = ModernBertConfig(**{**sizes, "eos_token_id": 2}, **tokens, num_hidden_layers=3, local_attention=6)
    return attached(ModernBertModel(config), fastprefix.APTConfig(3, pooling=pooling))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_local_layers_of_an_encoder(pooling: str, side: str) -> None:
    model = modernbert(pooling)
    pads = (9, 0) if side == "left" else (0, 9)
    ids = nn.functional.pad(IDS, pads)
    positions = nn.functional.pad(torch.arange(11), pads)[None]
    with torch.no_grad():
        alone = model(IDS).last_hidden_state
        padded = model(ids, attention_mask=(ids != 0).long(), position_ids=positions).last_hidden_state
    torch.testing.assert_close(padded[ids != 0].view(2, 11, -1), alone, **EXACT)


def test_gates_of_local_layers_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    model = modernbert("mean")
    former, seen = type(model.fastprefix).prefix_gate, []

    def spy(self: Any, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gate: Tensor = former(self, layer, hidden, *args, **kwargs)
        seen.append((layer, hidden, gate))
        return gate

    monkeypatch.setattr(type(model.fastprefix), "prefix_gate", spy)
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    with torch.no_grad():
        model(IDS, attention_mask=mask)
    assert [layer for layer, _, _ in seen] == [0, 1, 2]
    for layer, hidden, gate in seen:
        mean = torch.stack([hidden[0].mean(dim=0), hidden[1, :6].mean(dim=0)])
        alpha = torch.sigmoid(mean @ model.fastprefix.gate_projections[layer])
        torch.testing.assert_close(gate[:, 0], model.fastprefix.layer_gates[layer] * alpha, **EXACT)


@pytest.mark.parametrize("name", DECODERS)
def test_a_gate_does_not_depend_on_later_tokens(name: str) -> None:
    model = decoder(name)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits[:, :5], model(IDS[:, :5]).logits, **EXACT)


@pytest.mark.parametrize("name", DECODERS)
def test_packed_rows_have_a_gate_for_each_sequence(name: str) -> None:
    model = decoder(name)
    positions = torch.cat([torch.arange(3), torch.arange(8)])[None]
    packed = model(IDS, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(IDS[:, :3]).logits, model(IDS[:, 3:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, **EXACT)
    weights = torch.randn(packed.shape, dtype=packed.dtype)
    parameters = list(model.fastprefix.parameters())
    gradients = [torch.autograd.grad((logits * weights).sum(), parameters) for logits in (packed, alone)]
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_layers_that_are_run_again_pool_as_in_their_own_call(name: str, reentrant: bool) -> None:
    """Two calls precede the backward pass, one with packed rows and one with padded rows."""
    model = decoder(name).train()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    calls = [{"position_ids": torch.cat([torch.arange(3), torch.arange(8)])[None]}, {"attention_mask": mask}]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        options = {} if checkpointed else {"use_cache": False}
        sum(model(IDS, **call, **options).logits.square().sum() for call in calls).backward()
        gradients.append([parameter.grad for parameter in model.fastprefix.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"cache_implementation": "static"}, {"num_beams": 3}])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("name", DECODERS)
def test_generation(name: str, padding: int, options: dict[str, Any]) -> None:
    """The first chunk of one row contains only padding."""
    model = decoder(name)
    mask = torch.ones_like(IDS)
    mask[0, :padding] = 0
    common = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    beams = {"num_beams": options.get("num_beams", 1)}
    plain = model.generate(IDS, attention_mask=mask, use_cache=False, **beams, **common)
    special = model.generate(IDS, attention_mask=mask, disable_compile=True, **options, **common)
    assert torch.equal(plain.sequences, special.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(special.logits), **EXACT)


@pytest.mark.parametrize("method", [fastprefix.PrefixTuningConfig(3), fastprefix.PromptTuningConfig(3)])
def test_a_static_cache_that_the_prompt_fills(method: Any) -> None:
    """The mask that ``generate`` makes for it has one row, which means "causal"."""
    model = attached(DECODERS["llama"](), method)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 1, "output_logits": True}
    options |= {"return_dict_in_generate": True, "do_sample": False}
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options).logits
    torch.testing.assert_close(static, model.generate(IDS, **options).logits, **EXACT)


def chunks(model: Any, mask: Tensor, cache: Any, *ends: int) -> Tensor:
    """Return the logits of one call for each piece of the tokens."""
    begins = (0, *ends[:-1])
    out = [
        model(
            IDS[:, b:e], attention_mask=mask[:, :e], position_ids=positions(mask)[:, b:e], past_key_values=cache
        ).logits
        for b, e in zip(begins, ends, strict=True)
    ]
    return torch.cat(out, dim=1)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_a_gate_is_held_once_its_sequence_has_begun(name: str, static: bool) -> None:
    model = decoder(name)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, position_ids=positions(mask)).logits
        pieces = chunks(model, mask, cache, 2, 4, 8, 9, 11)
    torch.testing.assert_close(pieces[mask > 0], whole[mask > 0], **EXACT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@pytest.mark.parametrize("by_name", [False, True])
def test_gates_follow_the_rows_of_a_cache(method: str, copied: Any, by_name: bool) -> None:
    model = decoder("llama")
    rows = {"reorder_cache": [1, 0], "batch_select_indices": [1], "batch_repeat_interleave": [0, 0, 1, 1]}[method]
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0  # its sequence has not begun when the rows move
    with torch.no_grad():
        whole = model(IDS[rows], attention_mask=mask[rows], position_ids=positions(mask)[rows]).logits
        given = model(IDS[:, :6], attention_mask=mask[:, :6], position_ids=positions(mask)[:, :6], use_cache=True)
        original = find_cache(given)
        cache = copied(original)
        names = {"reorder_cache": "beam_idx", "batch_select_indices": "indices", "batch_repeat_interleave": "repeats"}
        selected = 2 if method == "batch_repeat_interleave" else torch.tensor(rows)
        if by_name:
            getattr(cache, method)(**{names[method]: selected})
        else:
            getattr(cache, method)(selected)
        for moved, ids, seen in ((cache, IDS[rows], mask[rows]), (original, IDS, mask)):
            last = model(
                input_ids=ids[:, 6:],
                attention_mask=seen,
                position_ids=positions(seen)[:, 6:],
                past_key_values=moved,
            ).logits
            want = whole if moved is cache else model(IDS, attention_mask=mask, position_ids=positions(mask)).logits
            torch.testing.assert_close(last[seen[:, 6:] > 0], want[:, 6:][seen[:, 6:] > 0], **EXACT)


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_read_from_a_mask_of_four_dimensions(additive: bool) -> None:
    model = decoder("llama")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    full = torch.ones(11, 11, dtype=torch.bool).tril() & (mask[:, None, None] > 0)
    if additive:
        full = torch.zeros(full.shape, dtype=torch.float64).masked_fill(~full, torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask, position_ids=positions(mask)).logits
        actual = model(IDS, attention_mask=full, position_ids=positions(mask)).logits
    torch.testing.assert_close(actual[mask > 0], expected[mask > 0], **EXACT)


@pytest.mark.parametrize("make", [lambda: decoder("llama"), lambda: modernbert("mean")])
def test_masks_that_do_not_tell_the_padding_are_refused(make: Any) -> None:
    model = make()
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(6, 6)).bool()[None, None].expand(2, 1, -1, -1)
    with pytest.raises(ValueError, match="`attention_mask` separates several sequences"):
        model(IDS, attention_mask=blocks)
    with pytest.raises(ValueError, match="`attention_mask` hides a token from itself"):
        model(IDS, attention_mask=torch.ones(2, 1, 11, 11, dtype=torch.bool) & ~torch.eye(11, dtype=torch.bool))


@pytest.mark.parametrize("beams", [1, 3])
def test_both_halves_of_an_encoder_decoder(beams: int) -> None:
    torch.manual_seed(0)
    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.3}
    config = BartConfig(d_model=32, vocab_size=models.VOCABULARY, max_position_embeddings=64, **sizes, **heads)
    config.forced_eos_token_id = None
    pooled = fastprefix.APTConfig(3, pooling="cls", attentions=("encoder", "decoder"))
    model = attached(BartForConditionalGeneration(config), pooled)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    common = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    cached = model.generate(IDS, **common)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **common))
    assert torch.equal(cached[:1, :6], model.generate(IDS[:1, :6], **{**common, "attention_mask": mask[:1, :6]}))
