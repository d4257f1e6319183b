"""Test one prompt for the whole batch: when it is shared, that it is exact, and what invalidates kept states."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    Cache,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RobertaConfig,
)

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method
from fastprefix.integrations.transformers.prompts import shared_prompt as sharing

from .... import models, peft_support
from ....float64 import Float64
from ..test_attach import PROMPTS, assert_same, loss_and_gradients

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": models.VOCABULARY,
    "initializer_range": 0.2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SHARING: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gemma": lambda: GemmaConfig(**GROUPED, pad_token_id=0),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "roberta": lambda: RobertaConfig(**SMALL, is_decoder=True, hidden_dropout_prob=0.0, max_position_embeddings=40),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, initializer_range=0.2, **NO_DROPOUT),
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""Others round experts to float32, and older ones leave Gemma 2's soft caps out."""
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWED: dict[str, Callable[[], PretrainedConfig]] = {
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=4),  # shorter than the prompt
    "mistral-wide": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**GROUPED, sliding_window=6, use_sliding_window=True, **MIXED),
    "gemma2": lambda: Gemma2Config(**GROUPED, sliding_window=6, pad_token_id=0, query_pre_attn_scalar=8, **MIXED),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, sliding_window=6, pad_token_id=0, **MIXED),
    "gpt_oss": lambda: GptOssConfig(**GROUPED, num_local_experts=4, sliding_window=6, **MIXED),
}


def on_path(config: PretrainedConfig, shared_prompt: bool | None, **options: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **{**EAGER, **options}).double().eval()
    fastprefix.attach(model, fastprefix.ADePTConfig(5, bottleneck_dim=3, shared_prompt=shared_prompt))
    models.randomize(model)
    return model


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    "make", [*SHARING.values(), *WINDOWED.values()], ids=[*SHARING, *(f"window-{n}" for n in WINDOWED)]
)
def test_sharing_is_the_default_and_changes_nothing(make: Callable[[], PretrainedConfig], padding: str) -> None:
    """Values and gradients equal those of the textbook path."""
    inputs = models.batch(padding)
    rows = inputs["attention_mask"].bool()
    with Float64():
        shared, textbook = on_path(make(), None), on_path(make(), False)
        assert get_method(shared).prompt_path == "shared"
        assert get_method(textbook).prompt_path == "textbook: shared_prompt=False"
        assert_same(*(loss_and_gradients(model, inputs, rows) for model in (shared, textbook)))
        if padding != "right":
            options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            assert torch.equal(shared.generate(**inputs, **options), textbook.generate(**inputs, **options))


LLAMA4 = {
    **{**GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4},
    "layer_types": ["chunked_attention", "full_attention"],
}


def opt() -> Any:
    config = OPTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, vocab_size=100, word_embed_proj_dim=32
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (models.encoder, "not causal"),
        (lambda: AutoModelForCausalLM.from_config(Llama4TextConfig(**LLAMA4)).eval(), "chunked_attention"),
    ],
)
def test_the_textbooks_path_where_sharing_is_not_exact(make: Callable[[], Any], says: str) -> None:
    model = fastprefix.attach(make(), fastprefix.PromptTuningConfig(5))
    assert get_method(model).prompt_path.startswith("textbook: ")
    assert says in get_method(model).prompt_path
    model(**models.batch())
    with pytest.raises(ValueError, match="shared_prompt"):
        fastprefix.attach(make(), fastprefix.PromptTuningConfig(5, shared_prompt=True))


def test_opt_moves_its_positions_or_does_not_share() -> None:
    """A model that computes positions from the mask is exact or uses the textbook path."""
    torch.manual_seed(0)
    plain = opt().double().eval()
    inputs = models.batch("left")
    rows = inputs["attention_mask"].bool()
    results = [plain(**inputs).logits[rows]]
    for shared_prompt in (None, False):
        fastprefix.attach(plain, fastprefix.PromptTuningConfig(5, shared_prompt=shared_prompt))
        models.randomize(plain)
        results.append(plain(**inputs).logits[rows])
        fastprefix.detach(plain)
    torch.testing.assert_close(*results[1:], rtol=1e-8, atol=1e-8)
    assert (results[0] - results[1]).abs().max() > 1e-2  # its head does not call the base model


def test_dropout_in_training_takes_the_textbooks_path() -> None:
    model = fastprefix.attach(models.decoder(attention_dropout=0.5), fastprefix.PromptTuningConfig(5))
    model.train()(**models.batch())
    assert model.fastprefix.prompt_path.startswith("textbook")
    model.eval()(**models.batch())
    assert model.fastprefix.prompt_path == "shared"
    required = fastprefix.attach(
        models.decoder(attention_dropout=0.5), fastprefix.PromptTuningConfig(5, shared_prompt=True)
    )
    with pytest.raises(ValueError, match="dropout"):
        required.train()(**models.batch())


def test_a_prompt_runs_in_every_row_where_sharing_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def saves_time(backbone: Any, layers: int, tokens: int) -> bool:
        asked.append((layers, tokens))
        return False

    shared, plain = (
        fastprefix.attach(models.decoder().double(), fastprefix.PromptTuningConfig(5, shared_prompt=path), check=False)
        for path in (None, False)
    )
    get_method(shared).load_state_dict(get_method(plain).state_dict())
    monkeypatch.setattr(sharing, "saves_time", saves_time)
    inputs, rows = models.batch(), models.batch()["attention_mask"].bool()
    assert_same(*(loss_and_gradients(model, inputs, rows) for model in (shared, plain)))
    assert asked == [(shared.config.num_hidden_layers, 5 * (len(rows) - 1))]
    assert "on a GPU" in get_method(shared).prompt_path
    with torch.no_grad():
        shared(**models.batch())
    assert get_method(shared).prompt_path == "shared"
    assert len(asked) == 1


def test_when_sharing_saves_time() -> None:
    assert sharing.saves_time(nn.Linear(1, 1), 24, 0)  # on a CPU
    with FakeTensorMode():
        layer = nn.ParameterList([torch.empty(10**5, 10**4, device="cuda")])  # 10^9 parameters
        ask = partial(sharing.saves_time, layer, 10)
        assert [ask(tokens) for tokens in (-5, 0, 1999, 2000)] == [False, False, False, True]
        with sharing.share_always():
            assert ask(0)


def prompt_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the runs of the prompt."""
    hooks, runs = model._fastprefix_attachment.hooks, []
    run = type(hooks).run_prompt
    monkeypatch.setattr(type(hooks), "run_prompt", lambda self, *call: (runs.append(1), run(self, *call))[1])
    return runs


def test_the_prompt_is_kept_for_inference_until_a_parameter_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = on_path(SHARING["qwen2"](), None), models.batch()
    runs = prompt_runs(model, monkeypatch)
    changes: list[Callable[[], Any]] = [
        lambda: get_method(model).prompt.mul_(2.0),
        lambda: model.model.layers[0].self_attn.k_proj.weight.mul_(1.1),
        lambda: model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()}),
        lambda: model.float(),
    ]
    with torch.no_grad():
        model(**inputs)
        model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert len(runs) == 1
        for count, change in enumerate(changes, start=2):
            change()
            fresh = fastprefix_textbook(model, inputs)
            torch.testing.assert_close(model(**inputs).logits, fresh, rtol=1e-4, atol=1e-4)
            assert len(runs) == count
    model(**inputs).logits.sum().backward()
    assert len(runs) == len(changes) + 2  # with gradients it is run every time


def fastprefix_textbook(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of the same model and method on the textbook path."""
    hooks = model._fastprefix_attachment.hooks
    hooks.find_reason_against = lambda arguments: "for comparison"
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        del hooks.find_reason_against
    return logits


@pytest.mark.parametrize("method", PROMPTS)
def test_in_inference_mode(method: str) -> None:
    model, inputs = fastprefix.attach(models.decoder(), PROMPTS[method]()), models.batch()
    expected = model(**inputs).logits
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)


def test_low_precision_is_as_good_as_the_textbooks() -> None:
    """In bfloat16, the error against float64 is at most twice that of the textbook."""
    inputs = models.batch("left")
    rows = inputs["attention_mask"].bool()
    exact = on_path(SHARING["qwen2"](), False)(**inputs).logits[rows]
    errors = [
        (on_path(SHARING["qwen2"](), shared).bfloat16()(**inputs).logits[rows] - exact).abs().max()
        for shared in (None, False)
    ]
    assert errors[0] <= 2 * errors[1]


def without_cache(model: Any, **inputs: Tensor) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


@pytest.mark.parametrize("method", ["prompt_tuning", "adept"])
def test_every_packed_sequence_sees_the_prompt(method: str) -> None:
    """Every sequence gives the same values as in a separate row."""
    model, ids = fastprefix.attach(models.decoder(), PROMPTS[method]()), models.batch()["input_ids"][:1]
    models.randomize(model)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    packed = without_cache(model, input_ids=ids, position_ids=positions)
    parts = [without_cache(model, input_ids=part) for part in ids.split([3, 4], dim=1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=1e-10, atol=1e-10)
    fastprefix.merge(model)
    merged = without_cache(model, input_ids=ids, position_ids=positions)
    torch.testing.assert_close(merged, packed, rtol=1e-10, atol=1e-10)


PACKING_REFUSED: dict[str, tuple[Callable[[], Any], Any]] = {
    "textbook": (models.decoder, fastprefix.PromptTuningConfig(5, shared_prompt=False)),
    "window": (
        lambda: AutoModelForCausalLM.from_config(WINDOWED["mistral"]()).double().eval(),
        fastprefix.PromptTuningConfig(5),
    ),
    "dept": (models.decoder, fastprefix.DePTConfig(5, rank=3, max_length=32)),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", PACKING_REFUSED)
def test_packed_sequences_are_refused_where_they_would_go_wrong(case: str, merged: bool) -> None:
    make, config = PACKING_REFUSED[case]
    model = fastprefix.attach(make(), config)
    if merged and case != "textbook":
        fastprefix.merge(model)
    inputs = {"input_ids": models.batch()["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    with pytest.raises(ValueError, match="packed"):
        without_cache(model, **inputs)
    without_cache(model, **inputs, attention_mask=torch.ones(3, 7))  # a mask says that each row is one sequence


def block_diagonal(dtype: torch.dtype) -> Tensor:
    """Return a caller's mask for two sequences in each row."""
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).tril().bool().expand(3, 1, 7, 7)
    if dtype is torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("family", ["qwen2", "window-mistral"])
def test_masks_for_each_query(family: str, dtype: torch.dtype, cached: bool) -> None:
    """All tokens see the prompt, and the mask applies to the tokens, on both paths, also with an empty cache."""
    make = {**SHARING, **{f"window-{name}": make for name, make in WINDOWED.items()}}[family]
    inputs = {"input_ids": models.batch()["input_ids"], "attention_mask": block_diagonal(dtype)}
    rows = torch.ones(3, 7, dtype=torch.bool)
    with Float64():
        # The library's eager attention takes no bool masks.
        shared, textbook = (on_path(make(), path, attn_implementation="sdpa") for path in (None, False))
        results = []
        for model in (shared, textbook):
            cache: Any = {"past_key_values": DynamicCache()} if cached else {}
            results.append(loss_and_gradients(model, {**inputs, **cache}, rows))
        assert_same(*results)
    assert shared.fastprefix.prompt_path.startswith("textbook") == ("window" in family)


@pytest.mark.parametrize("shared_prompt", [None, False])
@pytest.mark.parametrize("shape", [(3, 1, 1, 7), (3, 1, 7, 7), (3, 7, 7)])
def test_masks_that_leave_open_what_the_prompt_sees_are_refused(shape: tuple[int, ...], shared_prompt: Any) -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PromptTuningConfig(5, shared_prompt=shared_prompt))
    if shared_prompt is None and shape == (3, 1, 7, 7):
        return  # where the prompt runs by itself, it sees no tokens
    mask = torch.ones(shape, dtype=torch.bool)
    for cache in (None, DynamicCache()):
        with pytest.raises(ValueError, match="`attention_mask`"):
            model(input_ids=models.batch()["input_ids"], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_a_mask_of_one_row_for_one_token_is_complete() -> None:
    ids, cache = models.batch()["input_ids"], DynamicCache()
    mask = models.batch("left")["attention_mask"].bool()
    model = fastprefix.attach(models.decoder(), fastprefix.PromptTuningConfig(5), check=False)
    expected = model(ids, attention_mask=mask).logits[:, -1:]
    model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    positions = torch.full((3, 1), 6)
    logits = model(
        ids[:, -1:], attention_mask=mask[:, None, None], position_ids=positions, past_key_values=cache
    ).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def generated(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    defaults = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens: Tensor = model.generate(**models.batch("left"), **{**defaults, **options})
    return tokens


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma", "window-mistral", "window-gemma3", "window-gpt_oss"])
def test_generation_is_the_textbooks(family: str, merged: bool) -> None:
    """Greedy, sampled and beam search, with growing, static and no caches, and padding on the left."""
    make = {**SHARING, **{f"window-{name}": make for name, make in WINDOWED.items()}}[family]
    with Float64(), torch.no_grad():
        shared, textbook = on_path(make(), None), on_path(make(), False)
        if merged:
            fastprefix.merge(shared)
        for search in ({}, {"do_sample": True}, {"num_beams": 3}):
            expected = generated(textbook, **search)
            for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
                assert torch.equal(generated(shared, **search, **cache), expected), (search, cache)


def test_a_static_cache_on_the_textbooks_path_is_refused() -> None:
    """It has no room for the prompt."""
    with pytest.raises(ValueError, match="cache"):
        generated(on_path(SHARING["qwen2"](), False), cache_implementation="static")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("make", [SHARING["qwen2"], *WINDOWED.values()], ids=["qwen2", *WINDOWED])
def test_an_input_in_parts(make: Callable[[], PretrainedConfig], merged: bool) -> None:
    """A cache continues in the next call, for parts of any length."""
    with Float64(), torch.no_grad():
        model, ids = on_path(make(), None), models.batch()["input_ids"]
        expected = on_path(make(), False)(input_ids=ids, use_cache=False).logits
        if merged:
            fastprefix.merge(model)
        cache, parts = None, []
        for part in ids.split([3, 1, 3], dim=1):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-10, atol=1e-10)


def test_sliding_windows_compile_without_graph_breaks() -> None:
    model, inputs = on_path(WINDOWED["gemma3"](), None), models.batch("left")
    rows = inputs["attention_mask"].bool()
    expected = loss_and_gradients(model, inputs, rows)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert_same(loss_and_gradients(model, inputs, rows), expected)


REASONS: dict[str, tuple[PretrainedConfig, str]] = {
    "bart": (BartConfig(d_model=32, decoder_layers=1, decoder_attention_heads=4, vocab_size=100), "cannot be set"),
    "bloom": (BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100), "cannot be set"),
    "recurrent": (
        Qwen3NextConfig(
            **GROUPED, layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2
        ),
        "linear_attention",
    ),
}


@pytest.mark.parametrize("family", REASONS)
def test_reasons(family: str) -> None:
    """Differences between families are tried, and the path is explained."""
    config, says = REASONS[family]
    model = fastprefix.attach(AutoModelForCausalLM.from_config(config).eval(), fastprefix.PromptTuningConfig(5))
    assert get_method(model).prompt_path.startswith("textbook: ")
    assert says in get_method(model).prompt_path
    fastprefix.detach(model)
    with pytest.raises(ValueError, match=f"shared_prompt=True.*{says}"):
        fastprefix.attach(model, fastprefix.PromptTuningConfig(5, shared_prompt=True))


@torch.no_grad()
def test_what_is_kept_for_inference_follows_every_change() -> None:
    """Optimizers that write through ``.data``, autocast, another embedding."""
    inputs, model = models.batch(), fastprefix.attach(models.decoder(), fastprefix.PromptTuningConfig(5))

    def assert_fresh() -> None:
        actual = model(**inputs).logits
        with torch.enable_grad():  # nothing is kept
            torch.testing.assert_close(actual, model(**inputs).logits, rtol=1e-10, atol=1e-10)

    assert_fresh()
    model.fastprefix.prompt.data.mul_(5)
    assert_fresh()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    kept = model(**inputs).logits
    with torch.enable_grad():
        torch.testing.assert_close(kept, model(**inputs).logits)
    model.double().set_input_embeddings(torch.nn.Embedding(models.VOCABULARY, models.WIDTH).double())
    assert_fresh()
    model.get_input_embeddings().weight.mul_(2)
    assert_fresh()


def test_the_path_is_that_of_the_last_call() -> None:
    model = fastprefix.attach(models.decoder(attention_dropout=0.5), fastprefix.PromptTuningConfig(5))
    for training, path in (
        (False, "shared"),
        (True, "textbook: dropout in the model differs by row"),
    ):
        model.train(training)(**models.batch())
        assert get_method(model).prompt_path == path


def test_dropout_that_is_added_later_is_noticed() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PromptTuningConfig(5), check=False).train()
    paths, projection = [], model.model.layers[0].mlp.down_proj
    dropout = torch.nn.Dropout(0.5)
    for layer in (projection, torch.nn.Sequential(projection, dropout)):
        model.model.layers[0].mlp.down_proj = layer
        model(**models.batch())
        paths.append(model.fastprefix.prompt_path)
    dropout.p = 0.0
    model(**models.batch())
    assert [*paths, model.fastprefix.prompt_path] == [
        "shared", "textbook: dropout in the model differs by row", "shared"
    ]  # fmt: skip
    dropout.p = 0.5
    with pytest.raises(ValueError, match="`adapter_names` must not name the prompt 'default' while dropout"):
        model(**models.batch(), adapter_names=["default"] * 3)


@pytest.mark.peft
@torch.no_grad()
def test_peft_layers_in_the_model_are_followed() -> None:
    peft_support.require(peft_support.layers_in_models)
    inputs, base = models.batch(), models.decoder()
    base.add_adapter(peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    model = fastprefix.attach(base.double().eval(), fastprefix.PromptTuningConfig(5))
    model(**inputs)
    model.disable_adapters()
    actual = model(**inputs).logits
    with torch.enable_grad():
        torch.testing.assert_close(actual, model(**inputs).logits, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_cache_goes_on_as_it_was_begun() -> None:
    """A prompt in a cache is not attended to twice, and a prompt that is not in a cache is not left out."""
    ids = models.batch()["input_ids"]
    model = fastprefix.attach(models.decoder(attention_dropout=0.5), fastprefix.PromptTuningConfig(5))
    expected = model(ids).logits[:, -1:]
    model.train()
    model.model.layers.eval()  # the textbook's path, and nothing is dropped
    begun = model(ids[:, :-1], use_cache=True).past_key_values
    model.eval()
    actual = model(ids[:, -1:], past_key_values=begun).logits
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    begun = model(ids[:, :-1], use_cache=True).past_key_values
    model.train()
    with pytest.raises(ValueError, match="`past_key_values`"):
        model(ids[:, -1:], past_key_values=begun)


ROWS = {"shared_prompt": False}
OTHERS: dict[str, tuple[fastprefix.PromptTuningConfig | fastprefix.MultitaskPromptConfig, ...]] = {
    "shorter": (fastprefix.PromptTuningConfig(5), fastprefix.PromptTuningConfig(3)),
    "shorter in every row": (fastprefix.PromptTuningConfig(5, **ROWS), fastprefix.PromptTuningConfig(3, **ROWS)),
    "shorter, then shared": (fastprefix.PromptTuningConfig(5, **ROWS), fastprefix.PromptTuningConfig(3)),
    "with tasks": (fastprefix.PromptTuningConfig(3), fastprefix.MultitaskPromptConfig(3, num_tasks=2)),
    "as long as those of all tasks": (
        fastprefix.MultitaskPromptConfig(3, num_tasks=2),
        fastprefix.PromptTuningConfig(6),
    ),
}


def attach_two(*configs: Any) -> Any:
    """Return a model with the adapters "first" and "second", of which the first is in use."""
    model = models.decoder()
    for name, config in zip(("first", "second"), configs, strict=True):
        fastprefix.attach(model, config, name=name, check=False)
        models.randomize(model)
    return fastprefix.set_adapter(model, "first")


def continue_cache(model: Any, begun: Any, *, adapter: str = "second") -> Tensor:
    fastprefix.set_adapter(model, adapter)
    logits: Tensor = model(models.batch()["input_ids"][:, -1:], past_key_values=begun).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_refuses_a_prompt_of_other_sizes(other: str) -> None:
    """The positions after the prompt would not fit those of the tokens in the cache."""
    model, ids = attach_two(*OTHERS[other]), models.batch()["input_ids"][:, :-1]
    tasks = {"task_ids": torch.tensor([0, 1, 0])} if "all tasks" in other else {}
    begun = model(ids, use_cache=True, **tasks).past_key_values
    with pytest.raises(ValueError, match=r"`past_key_values` must hold .* of the adapter, but it was filled with"):
        continue_cache(model, begun)
    assert begun.get_seq_length() == ids.shape[1]
    assert continue_cache(model, begun, adapter="first").isfinite().all()


@torch.no_grad()
def test_a_cache_of_a_shared_prompt_refuses_a_prompt_in_every_row() -> None:
    model = attach_two(fastprefix.PromptTuningConfig(5), fastprefix.PromptTuningConfig(5, **ROWS))
    begun = model(models.batch()["input_ids"][:, :-1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="which this call does not support: shared_prompt=False"):
        continue_cache(model, begun)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, ROWS], ids=["shared", "in every row"])
def test_a_cache_keeps_its_prompt_under_an_adapter_of_the_same_length(options: dict[str, Any]) -> None:
    model = attach_two(fastprefix.PromptTuningConfig(5, **options), fastprefix.PromptTuningConfig(5, **options))
    ids = models.batch()["input_ids"]
    expected = model(ids).logits[:, -1:]
    begun = model(ids[:, :-1], use_cache=True).past_key_values
    torch.testing.assert_close(continue_cache(model, begun), expected, rtol=1e-10, atol=1e-10)


def empty(cache: Cache, how: str) -> None:
    """Remove all tokens of a cache."""
    if how == "reset":
        cache.reset()
    else:
        cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("how", ["reset", "crop"])
@pytest.mark.parametrize("begun", ["shared", "textbook"])
@pytest.mark.parametrize("again", ["shared", "textbook"])
def test_a_cache_that_was_emptied_begins_anew(begun: str, again: str, how: str) -> None:
    """The prompt is attended to once, whether emptying the cache has removed it or not."""
    ids = models.batch()["input_ids"]
    base = models.decoder(attn_implementation="eager")
    model = fastprefix.attach(base, fastprefix.PromptTuningConfig(5), check=False)
    models.randomize(model)
    cache = DynamicCache()
    with Float64():
        expected = model(ids, use_cache=False).logits
        model(ids, past_key_values=cache, output_attentions=begun == "textbook")
        assert model.fastprefix.prompt_path.startswith(begun)
        for length in (3, 5):
            empty(cache, how)
            parts = [
                model(ids[:, :length], past_key_values=cache, output_attentions=again == "textbook").logits,
                *(model(ids[:, each : each + 1], past_key_values=cache).logits for each in range(length, ids.shape[1])),
            ]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_an_emptied_cache_holds_no_prompt_of_another_length() -> None:
    ids, cache = models.batch()["input_ids"], DynamicCache()
    model = fastprefix.attach(models.decoder(), fastprefix.PromptTuningConfig(5, shared_prompt=False), check=False)
    fastprefix.attach(model, fastprefix.PromptTuningConfig(3, shared_prompt=False), name="other", check=False)
    model(ids, past_key_values=cache)
    cache.reset()
    fastprefix.set_adapter(model, "default")
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 7


def test_a_static_cache_has_no_room_for_a_prompt_in_every_row() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PromptTuningConfig(5, shared_prompt=False))
    with pytest.raises(ValueError, match="`past_key_values`"):
        model.generate(**models.batch(), max_new_tokens=2, cache_implementation="static")


def test_prompts_are_shared_by_adapters_attached_under_autocast() -> None:
    model = models.decoder().float()
    with torch.autocast("cpu", torch.bfloat16):
        fastprefix.attach(model, fastprefix.PromptTuningConfig(3))
    assert model.fastprefix.prompt_path == "shared"


class RandomScale(nn.Module):
    """A layer of PEFT with rates for each adapter."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rank_dropout = {"default": rate}


class OwnDropout(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.p = rate


@pytest.mark.parametrize("layer", [RandomScale, OwnDropout, nn.Dropout])
def test_other_kinds_of_dropout_are_noticed(layer: Callable[[float], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), layer(0.0))
    assert not sharing.Randomness(model.train()).acts()
    model = nn.Sequential(nn.Linear(2, 2), layer(0.5))
    assert sharing.Randomness(model.train()).acts()
    assert not sharing.Randomness(model.eval()).acts()


def test_a_prompt_is_computed_again_after_a_training_step() -> None:
    """Some optimizers change weights through ``data``, which PyTorch's version counters do not record."""
    config = fastprefix.PromptTuningConfig(3, modules_to_save=["model.layers.0"])
    model, inputs = fastprefix.attach(models.decoder(), config), models.batch()
    with torch.no_grad():
        model(**inputs)
    model(**inputs).logits.sum().backward()
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data.mul_(3.0)
    with torch.no_grad():
        actual = model(**inputs).logits
        assert model.fastprefix.prompt_path == "shared"
        assert torch.equal(actual, copy.deepcopy(model)(**inputs).logits)
