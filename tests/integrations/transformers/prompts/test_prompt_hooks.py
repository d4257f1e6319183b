"""Test that prompts change the output of the embedding module in every way to call a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers.cache_utils import Cache

import fastprefix
from fastprefix.integrations.transformers.prompts.prompt import PromptHooks

from .... import models
from ....float64 import Float64

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 100,
    "initializer_range": 0.2,
}  # fmt: skip
LLAMA: dict[str, Any] = {**SIZES, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [21, 6, 17, 8, 9, 30, 4]])


def esm(kind: str) -> Any:
    return T.EsmForMaskedLM(T.EsmConfig(
        **SIZES, **QUIET, pad_token_id=0, mask_token_id=99, token_dropout=kind == "rotary",
        position_embedding_type=kind, emb_layer_norm_before=kind == "absolute",
    ))  # fmt: skip


def gemma4() -> Any:
    return T.Gemma4ForCausalLM(T.Gemma4TextConfig(
        **SIZES, vocab_size_per_layer_input=100, hidden_size_per_layer_input=8, num_key_value_heads=2, head_dim=8,
        global_head_dim=16, sliding_window=16, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaModel(T.LlamaConfig(**LLAMA)),
    "falcon": lambda: T.FalconModel(T.FalconConfig(**{**LLAMA, "alibi": True})),
    "bert": lambda: T.BertModel(T.BertConfig(**SIZES, **QUIET)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**SIZES, **QUIET)),
    "albert": lambda: T.AlbertModel(T.AlbertConfig(**SIZES, **QUIET, embedding_size=16)),
    "electra": lambda: T.ElectraModel(T.ElectraConfig(**SIZES, **QUIET, embedding_size=16)),
    "modernbert": lambda: T.ModernBertModel(T.ModernBertConfig(**SIZES, pad_token_id=0, local_attention=64)),
}


def attach(model: Any, config: Any) -> Any:
    """Attach a method to a model in float64, with parameters that have an effect."""
    fastprefix.attach(model.double().eval(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.fastprefix.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]()


def configs(**options: Any) -> list[Any]:
    return [
        fastprefix.PromptTuningConfig(3, **options),
        fastprefix.ADePTConfig(3, bottleneck_dim=4, **options),
        fastprefix.DePTConfig(3, rank=2, max_length=32, **options),
    ]


def state(output: Any) -> Tensor:
    first: Tensor = output[0]
    return first


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
def test_a_prompt_enters_where_inputs_embeds_enter(kind: str) -> None:
    """ESM's ``inputs_embeds`` skip the scale, positions and norm of its embedding block."""
    torch.manual_seed(0)
    plain = esm(kind).double().eval()
    model = attach(copy.deepcopy(plain), fastprefix.PromptTuningConfig(3))
    prompt = model.fastprefix.prompt[None].expand(2, -1, -1)
    plain.esm.embeddings.register_forward_hook(lambda module, args, output: torch.cat([prompt, output], dim=1))
    expected = plain.lm_head(plain.esm(IDS).last_hidden_state[:, 3:])
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared_prompt", [None, False])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_the_embedding_run_on_the_tokens_and_both_paths_agree(name: str, shared_prompt: bool | None) -> None:
    """The fused lookup replaces only a plain embedding. A module with a hook is called."""
    for config in configs(shared_prompt=shared_prompt):
        model = attach(build(name), config)
        with torch.no_grad():
            fused = state(model(IDS))
            shapes: list[torch.Size] = []
            handle = model.get_input_embeddings().register_forward_hook(lambda m, a, o, s=shapes: s.append(o.shape))
            called = state(model(IDS))
            handle.remove()
            torch.testing.assert_close(called, fused, rtol=1e-12, atol=1e-12)
            assert [shape[:2] for shape in shapes] == [IDS.shape]


@pytest.mark.parametrize("config", configs(shared_prompt=False)[:2], ids=lambda config: config.method_name())
@pytest.mark.parametrize("name", ["roberta", "m2m_100"])
def test_left_padding_changes_nothing_where_positions_skip_it(name: str, config: Any) -> None:
    torch.manual_seed(0)
    if name == "roberta":
        model = attach(MODELS[name](), config)
        padded, pad, call = [], 1, model
    else:
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
        more = {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 100}
        model = attach(T.M2M100ForConditionalGeneration(T.M2M100Config(**sizes, **more)), config)
        padded, pad, call = [], 1, model.get_encoder()
    padded = torch.nn.functional.pad(IDS, (4, 0), value=pad)
    with torch.no_grad():
        alone = state(call(IDS, attention_mask=torch.ones_like(IDS)))[:, -7:]
        actual = state(call(padded, attention_mask=(padded != pad).long()))[:, -7:]
    torch.testing.assert_close(actual, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["prompt", "prefix", "apt"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_forward_called_directly_has_the_adapter(name: str, method: str) -> None:
    config = {"prompt": fastprefix.PromptTuningConfig(3), "prefix": fastprefix.PrefixTuningConfig(3)}.get(
        method, fastprefix.APTConfig(3)
    )
    plain = build(name).double().eval()
    model = attach(copy.deepcopy(plain), config)
    with torch.no_grad():
        expected = state(model(IDS))
        assert (expected - state(plain(IDS))).abs().max() > 1e-3
        torch.testing.assert_close(state(model.forward(IDS)), expected)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(state(other.forward(IDS)), expected)
            fastprefix.detach(other)
            torch.testing.assert_close(state(other.forward(IDS)), state(plain(IDS)))
            torch.testing.assert_close(state(model.forward(IDS)), expected)
        fastprefix.detach(model)
        torch.testing.assert_close(state(model.forward(IDS)), state(plain(IDS)))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("config", [fastprefix.PromptTuningConfig(3), fastprefix.PrefixTuningConfig(3)])
@pytest.mark.parametrize("order", ["hook first", "adapter first"])
@pytest.mark.parametrize("removed", ["hook", "adapter"])
def test_replacements_of_forward_come_and_go_in_any_order(config: Any, order: str, removed: str) -> None:
    """accelerate also replaces ``forward``."""
    plain = build("bert").double().eval()
    model = copy.deepcopy(plain)
    calls: list[int] = []

    class Counting(accelerate.hooks.ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    def hook() -> None:
        for module in (model, model.get_input_embeddings()):
            accelerate.hooks.add_hook_to_module(module, Counting())

    def unhook() -> None:
        for module in (model, model.get_input_embeddings()):
            accelerate.hooks.remove_hook_from_module(module)

    if order == "hook first":
        hook()
        attach(model, config)
    else:
        attach(model, config)
        hook()
    with torch.no_grad():
        expected, base = state(attach(copy.deepcopy(plain), config)(IDS)), state(plain(IDS))
        for call in (model, model.forward):
            calls.clear()
            torch.testing.assert_close(state(call(IDS)), expected)
            assert len(calls) == 2
        if removed == "hook":
            unhook()
            torch.testing.assert_close(state(model.forward(IDS)), expected)
            fastprefix.detach(model)
        else:
            fastprefix.detach(model)
            calls.clear()
            torch.testing.assert_close(state(model(IDS)), base)
            assert len(calls) == 2
            unhook()
        torch.testing.assert_close(state(model(IDS)), base)
        torch.testing.assert_close(state(model.forward(IDS)), base)


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.method_name())
def test_embeddings_per_layer(config: Any) -> None:
    """Gemma 4 looks up an embedding of the token's id in every layer. The prompt has that of padding."""
    torch.manual_seed(0)
    plain = gemma4().double().eval()
    results = []
    for shared_prompt in (None, False):
        model = attach(copy.deepcopy(plain), type(config)(**{**vars(config), "shared_prompt": shared_prompt}))
        with Float64():
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in model.fastprefix.parameters())))
        assert model.fastprefix.prompt_path == ("shared" if shared_prompt is None else "textbook: shared_prompt=False")
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    if isinstance(config, fastprefix.DePTConfig | fastprefix.ADePTConfig):
        return
    ids = torch.nn.functional.pad(IDS, (3, 0), value=0)
    rows = model.fastprefix.prompt[None].expand(2, -1, -1)
    embedding = plain.get_input_embeddings()
    embedding.register_forward_hook(lambda m, a, output: torch.cat([rows, output[:, 3:]], dim=1))
    with Float64():
        expected, actual = plain(ids).logits[:, 3:], model(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "falcon", "bert"])
def test_everything_that_is_returned_is_about_the_tokens(name: str) -> None:
    model = attach(build(name), fastprefix.PromptTuningConfig(3, shared_prompt=False))
    with torch.no_grad():
        whole = model(IDS, output_hidden_states=True, use_cache=False)
        states = whole.hidden_states
        assert {tuple(each.shape[:2]) for each in states} == {(2, 7)}
        as_tuple = model(IDS, output_hidden_states=True, return_dict=False, use_cache=False)
        assert isinstance(as_tuple, tuple)
        hidden = next(each for each in as_tuple if isinstance(each, tuple))
        for actual, expected in zip(hidden, states, strict=True):
            torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(as_tuple[0], whole.last_hidden_state)


def test_selected_hidden_states() -> None:
    """Newer versions of transformers return None for states that were not requested."""
    models.require("transformers", 5, 23)
    plain = build("llama").double().eval()
    with torch.no_grad():
        try:
            selection = plain(IDS, output_hidden_states=[0, -1]).hidden_states
        except (TypeError, ValueError):
            pytest.skip("this transformers does not select hidden states")
        model = attach(plain, fastprefix.PromptTuningConfig(3, shared_prompt=False))
        chosen = model(IDS, output_hidden_states=[0, -1]).hidden_states
        whole = model(IDS, output_hidden_states=True).hidden_states
    assert [each is None for each in chosen] == [each is None for each in selection]
    torch.testing.assert_close([each for each in chosen if each is not None], [whole[0], whole[-1]])


@pytest.mark.parametrize("name", ["albert", "bert", "roberta", "electra"])
def test_what_is_pooled_is_the_first_token(name: str) -> None:
    model = attach(build(name), fastprefix.PromptTuningConfig(3))
    with torch.no_grad():
        output = model(IDS)
        if (pooled := getattr(output, "pooler_output", None)) is None:
            pytest.skip("no pooler")
        state = output.last_hidden_state
        pooler = model.pooler
        expected = model.pooler_activation(pooler(state[:, 0])) if name == "albert" else pooler(state)
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("config", [*configs(), *configs(shared_prompt=False)])
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_generation_goes_on_from_a_kept_cache(family: str, config: Any) -> None:
    torch.manual_seed(0)
    make = {"llama": T.LlamaForCausalLM, "falcon": T.FalconForCausalLM}[family]
    settings = {"llama": T.LlamaConfig, "falcon": T.FalconConfig}[family](**{**LLAMA, "alibi": True})
    model = attach(make(settings), config)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with Float64():
        begun = model.generate(IDS[:1], max_new_tokens=3, **options)
        kept = next(value for value in begun.values() if isinstance(value, Cache))
        copied = copy.deepcopy(kept)
        turn = torch.cat([begun.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        anew = model.generate(turn, max_new_tokens=4, **options)
        for cache in (kept, copied):
            again = model.generate(turn, past_key_values=cache, max_new_tokens=4, **options)
            assert torch.equal(again.sequences, anew.sequences)
            torch.testing.assert_close(again.logits, anew.logits, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_failed_call_leaves_the_length_of_a_cache() -> None:
    config = fastprefix.PromptTuningConfig(3, shared_prompt=False)
    model, cache = attach(models.decoder(), config), T.DynamicCache()
    expected = model(torch.cat([IDS, IDS[:, :2]], dim=1)).logits[:, -2:]
    model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(IDS[:, :2], past_key_values=cache, attention_mask=torch.ones(2, 20))
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(model(IDS[:, :2], past_key_values=cache).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cropping_a_cache_keeps_the_prompt() -> None:
    """Assisted generation also crops by no token, if all candidates are accepted."""
    config = fastprefix.PromptTuningConfig(3, shared_prompt=False)
    model, cache = attach(models.decoder(), config), T.DynamicCache()
    model(IDS, past_key_values=cache)
    for removed, left in ((0, 7), (-2, 5), (-9, 0)):
        cache.crop(removed)
        assert cache.get_seq_length() == left
    logits = model(IDS, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    text = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(text, **options)
    assert torch.equal(model.generate(text, prompt_lookup_num_tokens=3, **options), expected)


@pytest.mark.parametrize("shared_prompt", [None, False])
def test_a_mask_that_counts_the_prompt_is_refused(shared_prompt: bool | None) -> None:
    model = attach(build("llama"), fastprefix.PromptTuningConfig(3, shared_prompt=shared_prompt))
    with pytest.raises(ValueError, match=r"`attention_mask` must be \[B, 7\]"):
        model(IDS, attention_mask=torch.ones(2, 10))


@pytest.mark.parametrize("position", ["none", "shift"])
def test_a_mask_that_counts_the_prefix_is_refused(position: Any) -> None:
    model = attach(build("llama"), fastprefix.PrefixTuningConfig(3, prefix_position=position))
    with pytest.raises(ValueError, match=r"`attention_mask` must be \[B, 7\]"):
        model(IDS, attention_mask=torch.ones(2, 10))


@pytest.mark.parametrize("shared_prompt", [None, False])
def test_several_choices_a_row(shared_prompt: bool | None) -> None:
    torch.manual_seed(0)
    config = T.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = attach(T.GPT2DoubleHeadsModel(config), fastprefix.PromptTuningConfig(3, shared_prompt=shared_prompt))
    choices = torch.stack([IDS, IDS.flip(1)], dim=1)
    with torch.no_grad():
        together = model(choices, mc_token_ids=torch.full((2, 2), 6))
        apart = [model(choices[:, i], mc_token_ids=torch.full((2,), 6)).logits for i in range(2)]
    torch.testing.assert_close(together.logits, torch.stack(apart, dim=1), rtol=1e-10, atol=1e-10)


def test_another_embedding_is_followed() -> None:
    model = attach(T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)), fastprefix.ADePTConfig(3, shared_prompt=False))
    expected = model(IDS).logits
    other = nn.Embedding(100, 32, _weight=model.get_input_embeddings().weight.detach().clone())
    former = model.get_input_embeddings()
    model.set_input_embeddings(other)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert isinstance(model._fastprefix_attachment.hooks, PromptHooks)
    assert "forward" not in vars(former)
    assert "forward" in vars(other)


class Embedder(T.LlamaForCausalLM):
    """A model that embeds its ids itself, and looks at the embedding of another token before."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        self.get_input_embeddings()(torch.tensor(3))
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("shared_prompt", [None, False])
def test_a_model_that_embeds_the_ids_itself(shared_prompt: bool | None) -> None:
    """Every call adds the offset once, whatever has been embedded before."""
    config = fastprefix.ADePTConfig(3, bottleneck_dim=4, shared_prompt=shared_prompt)
    torch.manual_seed(0)
    weights, made = T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)).double().state_dict(), []
    for kind in (T.LlamaForCausalLM, Embedder):
        model = kind(T.LlamaConfig(**LLAMA)).double().eval()
        model.load_state_dict(weights)
        fastprefix.attach(model, config, check=False)
        models.randomize(model)
        made.append(model)
    plain, model = made
    table = plain.get_input_embeddings()
    rows = table(IDS).clone()
    with Float64():
        expected = plain(IDS).logits
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected)
            assert torch.equal(model.get_input_embeddings()(IDS), rows)
            torch.testing.assert_close(model(inputs_embeds=rows).logits, expected)
            torch.testing.assert_close(model.model(inputs_embeds=rows)[0], plain.model(IDS)[0])
            with pytest.raises(ValueError, match="`attention_mask`"):
                model(input_ids=IDS, attention_mask=torch.ones(2, 3))
            torch.testing.assert_close(model(inputs_embeds=rows).logits, expected)


def test_attaching_runs_a_model_up_to_its_embedding_once() -> None:
    model, embedded, layers = models.decoder(), [], []
    model.get_input_embeddings().register_forward_pre_hook(lambda *args: embedded.append(1))
    model.model.layers[0].register_forward_pre_hook(lambda *args: layers.append(1))
    fastprefix.attach(model, fastprefix.PromptTuningConfig(3, shared_prompt=False), check=False)
    assert (len(embedded), len(layers)) == (1, 0)
