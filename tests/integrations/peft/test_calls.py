"""Test calls of accelerated PEFT models against PEFT: the prefix of each call, and the cost of a prompt's rows."""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BloomConfig,
    CohereConfig,
    DebertaV2Config,
    DebertaV2Model,
    Gemma2Config,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StableLmConfig,
)

import fastprefix

from ... import models
from ...float64 import Float64
from ..transformers.prompts.test_shared_prompt import GROUPED, NO_DROPOUT, SMALL
from ..transformers.test_attach import assert_same
from .test_accelerate import (  # noqa: F401 (a fixture)
    GPT2,
    LENGTH,
    OPT,
    _adaption_prompts_in_float64,
    evaluated,
    family,
    tuned,
)

pytestmark = pytest.mark.peft

STABLELM = {**SMALL, "num_key_value_heads": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0}


def stablelm(kind: str, **options: Any) -> Any:
    """Return a model whose layers do not pass keywords to their attention."""
    torch.manual_seed(0)
    return tuned(AutoModelForCausalLM.from_config(StableLmConfig(**STABLELM, **options)), kind, "CAUSAL_LM")


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["prefix", "prefix-projection", "cartridge", "prompt"])
def test_layers_that_hand_no_keywords_on(kind: str, padding: str) -> None:
    model, inputs = stablelm(kind), models.batch(padding)
    with Float64():
        expected = evaluated(model, inputs)
        fastprefix.accelerate(model)
        assert_same(evaluated(model, inputs), expected)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(**inputs, **options)
    assert torch.equal(fastprefix.decelerate(model).generate(**inputs, **options), tokens)


def loss_of(logits: Tensor) -> Tensor:
    """Return a number that depends on every logit."""
    return (logits * torch.arange(logits.numel(), dtype=logits.dtype).reshape(logits.shape).cos()).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    """Return every gradient by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def two_adapters(make: Callable[[str], Any], kind: str) -> Any:
    """Return a model with two adapters of different lengths."""
    model = make(kind)
    config = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    model.add_adapter("other", config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.double()
    model.set_adapter("other")
    models.randomize(model, std=0.5)
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_()
    return model


def two_forwards(model: Any) -> dict[str, Tensor]:
    """Return the gradients of two calls with different prefixes and rows that precede one backward pass."""
    model.zero_grad()
    losses = []
    for name, padding in (("default", "right"), ("other", "left")):
        model.set_adapter(name)
        for parameter in model.prompt_encoder.parameters():
            parameter.requires_grad_()
        losses.append(loss_of(model(**models.batch(padding), use_cache=False).logits))
    with torch.no_grad(), model.disable_adapter():
        model(**models.batch())
    (losses[0] + 2 * losses[1]).backward()
    return gradients(model)


def enable_by_transformers(base: Any, reentrant: bool) -> None:
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def enable_by_wrapper(base: Any, reentrant: bool) -> None:
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    wrapper = functools.partial(CheckpointWrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(
        base, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: module in set(base.model.layers)
    )


MAKERS: dict[str, Callable[[str], Any]] = {
    "llama": lambda kind: family("decoder", kind),
    "stablelm": stablelm,
}


@pytest.mark.parametrize("enable", [enable_by_transformers, enable_by_wrapper])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_two_forwards_before_the_backward(kind: str, name: str, reentrant: bool, enable: Callable[..., None]) -> None:
    """Every layer that runs again gets the prefix of its call."""
    model = two_adapters(MAKERS[name], kind).train()
    expected = two_forwards(model)
    fastprefix.accelerate(model)
    enable(model.get_base_model(), reentrant)
    if reentrant:
        model.get_base_model().enable_input_require_grads()
    for parameter, gradient in two_forwards(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-5)  # StableLM has float32 norms


def test_a_checkpointing_that_is_not_known_is_refused() -> None:
    """A layer that runs again without its prefix would give wrong gradients."""
    model = fastprefix.accelerate(family("decoder", "prefix")).train()
    layer = model.get_base_model().model.layers[0]
    forward = layer.forward
    layer.forward = lambda hidden, **kwargs: checkpoint(
        functools.partial(forward, **kwargs), hidden, use_reentrant=False
    )
    logits = model(**models.batch(), use_cache=False).logits
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        logits.sum().backward()


def wait(barrier: threading.Barrier) -> None:
    """Wait for the other thread."""
    barrier.wait()


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adaption"])
def test_threads_do_not_share_a_call(kind: str) -> None:
    """Two calls run at the same time. Each one waits for the other in its first layer."""
    model, batches = family("decoder", kind), [models.batch("left"), models.batch("right")]
    expected = [model(**inputs).logits for inputs in batches]
    fastprefix.accelerate(model)
    barrier, results = threading.Barrier(2, timeout=30), {}
    layer = model.get_base_model().model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: wait(barrier))

    def call(index: int) -> None:
        results[index] = model(**batches[index]).logits.detach()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for index in range(2):
        torch.testing.assert_close(results[index], expected[index], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adaption"])
def test_a_call_inside_a_call(kind: str) -> None:
    """A hook calls the model with other tokens and without its adapter."""
    model = family("decoder", kind)
    other = {key: value[:1] for key, value in models.batch("right").items()}
    expected, inner = model(**models.batch("left")).logits, model(**other).logits
    fastprefix.accelerate(model)
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any) -> None:
        if not seen:
            seen.append(torch.empty(0))
            seen.append(model(**other).logits)

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(hook)
    actual = model(**models.batch("left")).logits
    handle.remove()
    torch.testing.assert_close(seen[1], inner, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


HEADS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**GPT2, **NO_DROPOUT),
    "opt": lambda: OPTConfig(**OPT),
    "softcap": lambda: Gemma2Config(
        **GROUPED, final_logit_softcapping=5.0, sliding_window=16, attn_implementation="eager"
    ),
    "scaled": lambda: CohereConfig(**GROUPED, pad_token_id=0, logit_scale=0.3),
    "divided": lambda: GraniteConfig(**GROUPED, logits_scaling=3.0),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_and_the_loss_run_over_the_prompt_once(name: str) -> None:
    """Loss, logits and every gradient, including that of a trainable head, are PEFT's."""
    torch.manual_seed(0)
    model = tuned(AutoModelForCausalLM.from_config(HEADS[name]()), "prompt", "CAUSAL_LM")
    head = model.get_base_model().get_output_embeddings()
    head.weight.requires_grad_()
    inputs = models.batch("left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, 2] = -100
    rows: list[tuple[int, ...]] = []

    def results(**options: Any) -> list[Tensor]:
        model.zero_grad()
        output = model(**inputs, **options)
        (loss_of(output.logits) if output.loss is None else output.loss).backward()
        loss = [] if output.loss is None else [output.loss.detach()]
        return [*loss, output.logits.detach(), *gradients(model).values()]

    calls: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(11)},
        {},
        {"logits_to_keep": 3},
    ]
    with Float64():
        expected = [results(**options) for options in calls]
        assert fastprefix.accelerate(model, check=False).fastprefix.prompt_path == "shared"
        linear = nn.functional.linear
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "linear", lambda x, w, b=None: rows.append(x.shape) or linear(x, w, b))
            actual = [results(**options) for options in calls]
    for one, other in zip(actual, expected, strict=True):
        for tensor, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-10, atol=1e-10)
    assert (3, LENGTH + 7, 32) not in rows  # neither a layer nor the head saw the prompt in every row


def test_a_loss_of_the_callers_own_gets_all_logits() -> None:
    model, inputs = family("decoder", "prompt"), models.batch()
    seen: list[torch.Size] = []

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        seen.append(logits.shape)
        return logits.sum() + labels.sum()

    model.get_base_model().loss_function = loss
    expected = model(**inputs, labels=inputs["input_ids"]).loss
    fastprefix.accelerate(model)
    torch.testing.assert_close(model(**inputs, labels=inputs["input_ids"]).loss, expected, rtol=1e-10, atol=1e-10)
    assert seen == [torch.Size([3, LENGTH + 7, 100])] * 2
    assert fastprefix.decelerate(model).get_base_model().loss_function is loss


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("use_cache", [None, False, True])
def test_the_output_has_a_cache_if_the_caller_asked_for_one(use_cache: bool | None, return_dict: bool) -> None:
    model = family("decoder", "prompt").eval()
    options = {**models.batch(), "use_cache": use_cache, "return_dict": return_dict, "output_hidden_states": True}
    expected = model(**options)
    assert fastprefix.accelerate(model).fastprefix.prompt_path == "shared"
    actual = model(**options)
    assert len(actual) == len(expected)
    if return_dict:
        assert actual.keys() == expected.keys()


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_token_types_of_a_decoder(kind: str, auto: Any) -> None:
    """PEFT gives the prompt a type too, and GPT-2 embeds it."""
    torch.manual_seed(0)
    task = "SEQ_CLS" if auto is AutoModelForSequenceClassification else "TOKEN_CLS"
    model = tuned(auto.from_config(GPT2Config(**GPT2, **NO_DROPOUT)), kind, task)
    if kind == "prefix" and "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        pytest.skip("this PEFT gives such a model of this transformers no prefix: its cache has another name")
    inputs = {**models.batch("right"), "token_type_ids": models.batch()["input_ids"] % 2 + 3}
    expected = evaluated(model, inputs)
    fastprefix.accelerate(model)
    assert model.fastprefix.prompt_path in (None, "shared")
    assert_same(evaluated(model, inputs), expected)


TEXT = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_EYES = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
QWEN_IDS = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}


def test_pictures_and_positions_of_several_dimensions() -> None:
    """Qwen2-VL remembers the positions of a batch from one call to the next."""
    models.require("transformers", 5, 23)
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**QWEN_EYES, "temporal_patch_size": 2, "mlp_ratio": 2},
        **QWEN_IDS,
    )

    def make() -> Any:
        torch.manual_seed(0)
        return tuned(Qwen2VLForConditionalGeneration(config), "prompt", "CAUSAL_LM")

    def pictures(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 90, (rows, 16), generator=torch.Generator().manual_seed(0))
        ids[:, 2:8] = torch.tensor([96, 98, 98, 98, 98, 95])
        pixels = torch.randn(16 * rows, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grid = torch.tensor([[1, 4, 4]] * rows)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == 98).long(),
        }

    def generated(model: Any, rows: int) -> Tensor:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        tokens: Tensor = model.generate(**pictures(rows), **options)
        return tokens

    def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(**inputs).logits
        return output

    def results(model: Any) -> list[Tensor]:
        words = models.batch("left")
        one = {key: value[:1] for key, value in words.items()}
        return [logits(model, words), generated(model, 1), logits(model, one), generated(model, 2)]

    with Float64():
        expected, model = results(make()), fastprefix.accelerate(make())
        assert model.fastprefix.prompt_path == "shared"
        for actual, wanted in zip(results(model), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_disabled_is_the_model_on_its_own_attention(kind: str) -> None:
    """Without a mask, PaliGemma's SDPA attends to all tokens, and its eager attention does not."""
    eyes = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    text = {**TEXT, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8}
    config = PaliGemmaConfig(text_config=text, vision_config=eyes, image_token_index=98, projection_dim=32)
    torch.manual_seed(0)
    model = tuned(PaliGemmaForConditionalGeneration(config), kind, "CAUSAL_LM")
    inputs = models.batch()
    ids = inputs["input_ids"]

    def disabled() -> Tensor:
        with model.disable_adapter():
            logits: Tensor = model(input_ids=ids).logits
        return logits

    expected, adapted = disabled(), model(**inputs).logits
    fastprefix.accelerate(model)
    assert torch.equal(disabled(), expected)
    torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adaption"])
def test_a_disabled_model_trains_with_checkpointing_as_before(kind: str) -> None:
    """Its layers also run again on the model's own attention."""
    model, inputs = family("decoder", kind).train(), models.batch("left")
    embedding = model.get_base_model().get_input_embeddings().weight.requires_grad_()

    def gradient() -> Tensor:
        embedding.grad = None
        with model.disable_adapter():
            loss_of(model(**inputs).logits).backward()
        assert embedding.grad is not None
        return embedding.grad

    expected = gradient()
    fastprefix.accelerate(model).get_base_model().gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected, rtol=1e-12, atol=1e-12)


GEMMA4: dict[str, dict[str, Any]] = {
    "plain": {},
    "two head dimensions": {"global_head_dim": 16},
    "more heads": {"num_global_key_value_heads": 1},
    "per-layer embeddings": {"hidden_size_per_layer_input": 8},
    "shared keys": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
    "shared keys of two sizes": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "global_head_dim": 16},
}


@pytest.mark.parametrize("name", GEMMA4)
def test_gemma4_prefixes(name: str) -> None:
    """Layers with other head dimensions get a part of the prefix or none. Layers that share keys get the other's."""
    if "size" in name:
        models.require("peft", 0, 21)
    options = {"hidden_size_per_layer_input": 0, "global_head_dim": 8, **GEMMA4[name]}
    config = Gemma4TextConfig(
        **{**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2},
        **options,
        vocab_size_per_layer_input=100,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model, inputs = tuned(Gemma4ForCausalLM(config), "prefix", "CAUSAL_LM"), models.batch("left")
    generation = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = inputs["attention_mask"].bool()

    def results() -> list[Tensor]:
        model.zero_grad()
        logits = model(**inputs).logits[rows]
        loss_of(logits).backward()
        return [logits.detach(), *gradients(model).values()]

    with Float64():
        expected, tokens = results(), model.generate(**inputs, **generation)
        fastprefix.accelerate(model)
        for actual, wanted in zip(results(), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
        assert torch.equal(model.generate(**inputs, **generation), tokens)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adaption"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_is_noticed(kind: str, attention: str) -> None:
    model = fastprefix.accelerate(family("decoder", kind))
    model.get_base_model().set_attn_implementation(attention)
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        model(**models.batch())


def test_fresh_adaption_prompts_on_a_deep_model() -> None:
    """They have no effect yet, so only rounding differs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=32,
        num_attention_heads=8,
        intermediate_size=512,
        vocab_size=500,
        initializer_range=0.1,
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    model = peft.get_peft_model(
        base, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=10, adapter_layers=31)
    )
    fastprefix.accelerate(model)


def test_a_small_error_of_a_deep_model_is_still_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on rounding is far below the effect of a wrong prefix."""
    from fastprefix.integrations.transformers.models.attention import GivenPrefix

    model = family("decoder", "prefix").float()
    wrong = lambda self, query, key, value: (self.key.to(query), self.value.to(query) * 1.01)  # noqa: E731
    monkeypatch.setattr(GivenPrefix, "get_prefix", wrong)
    with pytest.raises(ValueError, match="would not give PEFT's results"):
        fastprefix.accelerate(model, check=False)


def deberta() -> Any:
    config = DebertaV2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    return tuned(DebertaV2Model(config), "prefix", "FEATURE_EXTRACTION")


def bloom() -> Any:
    base = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100))
    return tuned(base, "prefix", "CAUSAL_LM")


def broken() -> Any:
    """Return a model that raises an error in every call."""
    model = family("decoder", "prefix")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise TypeError("no such argument")

    model.get_base_model().model.layers[0].register_forward_pre_hook(fail)
    return model


@pytest.mark.parametrize("make", [deberta, bloom, broken])
def test_what_cannot_be_accelerated_is_a_value_error(make: Callable[[], Any]) -> None:
    model = make()
    attributes = set(vars(model)), set(vars(model.get_base_model()))
    with pytest.raises(ValueError, match="model"):
        fastprefix.accelerate(model)
    assert (set(vars(model)), set(vars(model.get_base_model()))) == attributes
