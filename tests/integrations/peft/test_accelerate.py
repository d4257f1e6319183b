"""Test ``fastprefix.accelerate`` against PEFT itself, in float64."""

import copy
import pickle
import re
import runpy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.adaption_prompt import layer as adaption_layer
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    Trainer,
    TrainingArguments,
)

import fastprefix
from fastprefix.integrations.peft import acceleration
from fastprefix.integrations.transformers.checking import conformance
from fastprefix.integrations.transformers.models import attention
from fastprefix.integrations.transformers.models.attention import GivenPrefix
from fastprefix.integrations.transformers.models.discovery import find_layers
from fastprefix.integrations.transformers.sharding.tensor_parallel import TensorParallelHeads

from ... import models, peft_support
from ...float64 import Float64
from ..transformers.prompts.test_shared_prompt import GROUPED, NO_DROPOUT, SMALL
from ..transformers.test_adapters import describe
from ..transformers.test_attach import assert_same, loss_and_gradients

pytestmark = pytest.mark.peft
LENGTH = 5
KINDS: dict[str, Callable[..., Any]] = {
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH),
    "prefix-projection": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda task: peft.CartridgeConfig(task_type=task, num_virtual_tokens=LENGTH, num_frozen_tokens=2),
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH),
    "p-tuning": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=16
    ),
    "p-tuning-lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "adaption": lambda task: peft.AdaptionPromptConfig(task_type=task, adapter_len=LENGTH, adapter_layers=1),
}
PREFIXES = ["prefix", "prefix-projection", "cartridge"]
OF_PEFTS_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose heads PEFT runs itself
CASES = [("encoder", kind) for kind in PREFIXES] + [("decoder", kind) for kind in KINDS]
PADDINGS = ["none", "right", "left"]


@pytest.fixture(autouse=True)
def _adaption_prompts_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make PEFT compute the softmax over an adaption prompt in float64. It always uses float32."""

    class Functional:
        def softmax(self, scores: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
            return scores.softmax(dim)

    monkeypatch.setattr(adaption_layer, "F", Functional())


def tuned(base: Any, kind: str, task: str, **options: Any) -> Any:
    """Return a PEFT model with random parameters."""
    if kind in PREFIXES and task in OF_PEFTS_HEADS:
        peft_support.require(peft_support.prefixes_of_classifiers)
    torch.manual_seed(0)
    config = KINDS[kind](task)
    for name, value in options.items():
        setattr(config, name, value)
    model = peft.get_peft_model(base, config).double().eval()
    models.randomize(model)
    return model


def family(name: str, kind: str) -> Any:
    """Return the name of one of the two small models."""
    return tuned(models.encoder(), kind, "SEQ_CLS") if name == "encoder" else tuned(models.decoder(), kind, "CAUSAL_LM")


def evaluated(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all outputs of the model, and the gradients of a combination of its logits."""
    return loss_and_gradients(model, inputs, ...)  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_loss_and_gradients_are_pefts(name: str, kind: str, padding: str) -> None:
    inputs = models.batch(padding)
    labels = inputs["input_ids"] if name == "decoder" else torch.tensor([0, 1, 1])
    model = family(name, kind)
    expected, state = evaluated(model, inputs), model.state_dict()
    with Float64():  # transformers computes a loss in float32
        loss = model(**inputs, labels=labels).loss
    assert fastprefix.accelerate(model) is model
    assert_same(evaluated(model, inputs), expected)
    with Float64():
        torch.testing.assert_close(model(**inputs, labels=labels).loss, loss, rtol=1e-12, atol=1e-12)
    assert_same(model.state_dict(), state)
    assert model.fastprefix.prompt_path == ("shared" if kind.startswith("p-") or kind == "prompt" else None)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradient_checkpointing(name: str, kind: str, reentrant: bool) -> None:
    """PEFT itself loses the prefix's gradient with checkpointing, or fails."""
    inputs, model = models.batch("right"), family(name, kind)
    expected = evaluated(model.train(), inputs)
    fastprefix.accelerate(model)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
        if kind == "prefix-projection":
            with pytest.raises(ValueError, match="use_reentrant"):
                evaluated(model, inputs)
            return
    assert_same(evaluated(model, inputs), expected)


def test_no_work_is_done_for_frozen_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen = family("decoder", "cartridge"), list[int]()
    former = attention.prefix_attention

    def watch(*args: Any, **options: Any) -> Tensor:
        frozen.append(options["frozen_prefix"])
        return former(*args, **options)

    fastprefix.accelerate(model)
    monkeypatch.setattr(attention, "prefix_attention", watch)
    model(**models.batch())
    assert frozen == [2] * models.LAYERS


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_pefts(kind: str, padding: str, options: dict[str, Any]) -> None:
    if kind != "adaption":
        peft_support.require(peft_support.generation)
    inputs, model = models.batch(padding), family("decoder", kind)

    def generate() -> Tensor:
        torch.manual_seed(3)
        tokens: Tensor = model.generate(**inputs, max_new_tokens=6, **{"do_sample": False, **options})
        return tokens

    expected = generate()
    fastprefix.accelerate(model)
    assert torch.equal(generate(), expected)


ENCODER = {
    **SMALL,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "initializer_range": 0.2, "pad_token_id": 0}
OPT = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2}
OTHERS: dict[str, tuple[str, Any, Callable[[], PretrainedConfig]]] = {
    "tokens": ("TOKEN_CLS", AutoModelForTokenClassification, lambda: BertConfig(**ENCODER)),
    "answers": ("QUESTION_ANS", AutoModelForQuestionAnswering, lambda: BertConfig(**ENCODER)),
    "features": ("FEATURE_EXTRACTION", AutoModel, lambda: BertConfig(**ENCODER)),
    "roberta": ("SEQ_CLS", AutoModelForSequenceClassification, lambda: RobertaConfig(**ENCODER)),
    "llama-classifier": (
        "SEQ_CLS",
        AutoModelForSequenceClassification,
        lambda: LlamaConfig(**GROUPED, pad_token_id=0),
    ),
    "gpt2": ("CAUSAL_LM", AutoModelForCausalLM, lambda: GPT2Config(**GPT2, **NO_DROPOUT)),
    "opt": ("CAUSAL_LM", AutoModelForCausalLM, lambda: OPTConfig(**OPT)),
    "windows": ("CAUSAL_LM", AutoModelForCausalLM, lambda: MistralConfig(**GROUPED, sliding_window=4)),
}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_tasks_and_positions(name: str, kind: str, padding: str) -> None:
    """Heads that PEFT computes, positions from ids and masks, learned positions. Norms round to float32."""
    task, auto, config = OTHERS[name]
    torch.manual_seed(0)
    model, inputs = tuned(auto.from_config(config()).double(), kind, task), models.batch(padding)

    def results() -> list[Tensor]:
        model.zero_grad()
        output = model(**inputs)[0]
        (output * torch.arange(output.numel()).reshape(output.shape).cos()).sum().backward()
        return [output, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = results()
    fastprefix.accelerate(model)
    assert (kind == "prefix") == (model.fastprefix.prompt_path is None)
    for actual, wanted in zip(results(), expected, strict=True):
        assert (actual - wanted).abs().max() <= 4 * torch.finfo(torch.float32).eps * wanted.abs().max()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "windows"])
def test_generation_with_other_positions_and_windows(name: str, kind: str, padding: str) -> None:
    peft_support.require(peft_support.generation)
    task, auto, config = OTHERS[name]
    torch.manual_seed(0)
    model, inputs = tuned(auto.from_config(config()).double(), kind, task), models.batch(padding)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    assert torch.equal(fastprefix.accelerate(model).generate(**inputs, **options), expected)


def test_a_prompt_where_the_cache_holds_something_else() -> None:
    """DeepSeek's cache contains the states from which keys and values are computed."""
    peft_support.require(peft_support.generation)
    config = DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=2,
    )
    torch.manual_seed(0)
    model = tuned(AutoModelForCausalLM.from_config(config).double(), "prompt", "CAUSAL_LM")
    inputs = models.batch("left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    logits, tokens = model(**inputs).logits, model.generate(**inputs, **options)
    assert fastprefix.accelerate(model).fastprefix.prompt_path == "shared"
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.generate(**inputs, **options), tokens)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the arguments of every call of ``prefix_attention``."""
    seen: list[dict[str, Any]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, pk: Tensor, pv: Tensor, **options: Any) -> Tensor:
        seen.append({"query": query, "key": key, "prefix_key": pk, **options})
        return fastprefix.prefix_attention(query, key, value, pk, pv, **options)

    monkeypatch.setattr(attention, "prefix_attention", spy)
    return seen


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_nothing_is_expanded_or_concatenated(name: str, kind: str, calls: list[dict[str, Any]]) -> None:
    """The batch has one prefix, and keys and masks are those of the tokens."""
    model = fastprefix.accelerate(family(name, kind))
    calls.clear()
    model(**models.batch("right"))
    heads, size = (4, 8) if name == "encoder" else (2, 8)
    batches = [call["query"].shape[0] for call in calls]
    assert batches == ([1, 1, 3, 3] if model.fastprefix.prompt_path == "shared" else [3, 3])
    for call in calls[-1:]:
        assert call["prefix_key"].shape == (heads, LENGTH, size)
        assert call["key"].shape[2] == call["attn_mask"].shape[3] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_the_active_adapter_is_followed(kind: str) -> None:
    inputs, model = models.batch("left"), family("decoder", kind)
    options = {"adapter_len": 3} if kind == "adaption" else {"num_virtual_tokens": 3}
    config = KINDS[kind]("CAUSAL_LM")
    for name, value in options.items():
        setattr(config, name, value)
    model.add_adapter("other", config)
    model.double()

    def results() -> Iterator[Tensor]:
        for name in ("other", "default"):
            model.set_adapter(name)
            yield model(**inputs).logits
            with model.disable_adapter():
                yield model(**inputs).logits
                yield model.generate(**inputs, max_new_tokens=4, do_sample=False).double()

    expected = list(results())
    fastprefix.accelerate(model)
    for actual, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", PADDINGS)
def test_adaption_prompts_beside_sliding_windows(padding: str) -> None:
    """They have a separate softmax, to which no window applies."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(MistralConfig(**GROUPED, sliding_window=3)).double()
    model, inputs = tuned(base, "adaption", "CAUSAL_LM"), models.batch(padding)
    rows = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[rows]
    torch.testing.assert_close(fastprefix.accelerate(model)(**inputs).logits[rows], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_come_later(kind: str) -> None:
    inputs, model = models.batch("left"), fastprefix.accelerate(family("decoder", kind))
    model.add_adapter("late", KINDS[kind]("CAUSAL_LM"))
    model.double().set_adapter("late")
    models.randomize(model)
    logits = model(**inputs).logits
    torch.testing.assert_close(fastprefix.decelerate(model)(**inputs).logits, logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "kind"), [("encoder", "prefix"), ("decoder", "prefix"), ("decoder", "prompt")])
def test_trainer_trains_the_same(name: str, kind: str, tmp_path: Path) -> None:
    """The accelerated model uses gradient checkpointing. PEFT without it is the reference."""
    inputs = models.batch("right")
    labels = inputs["input_ids"] if name == "decoder" else torch.tensor([0, 1, 1])
    rows = [{**{key: value[i] for key, value in inputs.items()}, "labels": labels[i]} for i in range(3)]

    def trained(model: Any, **options: Any) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True, **options
        )
        Trainer(model, arguments, train_dataset=rows).train()
        return dict(model.named_parameters())

    expected = trained(family(name, kind))
    actual = trained(fastprefix.accelerate(family(name, kind)), gradient_checkpointing=True)
    assert actual.keys() == expected.keys()
    for parameter in expected:
        torch.testing.assert_close(actual[parameter], expected[parameter], rtol=1e-6, atol=1e-6)
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_belongs_to_its_own_forward(kind: str) -> None:
    """A layer that runs again in the backward pass gets its prefix, whatever ran in between (as in DPO)."""
    inputs, model = models.batch(), family("decoder", kind).train()
    expected = evaluated(model, inputs)
    fastprefix.accelerate(model)
    model.get_base_model().gradient_checkpointing_enable()
    model.zero_grad()
    logits = model(**inputs).logits
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    (logits * torch.arange(logits.numel(), dtype=logits.dtype).cos().reshape(logits.shape)).sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({"logits": logits.detach(), **actual}, expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_saved_as_by_peft_and_loaded(name: str, kind: str, tmp_path: Path) -> None:
    inputs, model = models.batch("right"), family(name, kind)
    model.save_pretrained(tmp_path / "before")
    logits = model(**inputs).logits
    fastprefix.accelerate(model).save_pretrained(tmp_path / "after")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    base = models.encoder() if name == "encoder" else models.decoder()
    loaded = fastprefix.accelerate(peft.PeftModel.from_pretrained(base, tmp_path / "after").double().eval())
    torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=1e-5, atol=1e-5)  # saved in float32, some of it


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_whole_and_their_own(kind: str, copied: Callable[[Any], Any]) -> None:
    inputs, model = models.batch(), fastprefix.accelerate(family("decoder", kind))
    expected = model(**inputs).logits
    other = copied(model)
    models.randomize(model, std=0.7)
    assert torch.equal(other(**inputs).logits, expected)
    fastprefix.decelerate(model)
    assert torch.equal(other(**inputs).logits, expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_decelerated_is_as_before(name: str, kind: str) -> None:
    inputs, model = models.batch("left"), family(name, kind)
    expected, attributes = model(**inputs).logits, set(vars(model))
    assert fastprefix.decelerate(fastprefix.accelerate(model)) is model
    assert torch.equal(model(**inputs).logits, expected)
    assert set(vars(model)) == attributes
    assert model.base_model.config._attn_implementation == "sdpa"
    fastprefix.accelerate(model)


def test_hidden_states_and_tuples_of_a_shared_prompt() -> None:
    inputs, model = models.batch("left"), family("decoder", "prompt")
    expected = model(**inputs, output_hidden_states=True).hidden_states
    logits = model(**inputs, return_dict=False)[0]
    fastprefix.accelerate(model)
    actual = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], logits, rtol=1e-10, atol=1e-10)


def test_prompts_that_cannot_be_shared_stay_with_peft() -> None:
    encoder = fastprefix.accelerate(family("encoder", "prompt"))
    assert encoder.fastprefix.prompt_path.startswith("textbook: its attention is not causal")
    assert fastprefix.accelerate(tuned(bart(), "prompt", "SEQ_2_SEQ_LM")).fastprefix.prompt_path.startswith(
        "textbook: "
    )
    assert fastprefix.decelerate(encoder) is encoder


def test_dropout_in_training_runs_the_prompt_in_every_row() -> None:
    """PEFT does so too, with the model's attention and the same random numbers."""
    model = tuned(models.decoder(attention_dropout=0.5), "prompt", "CAUSAL_LM").train()

    def results() -> dict[str, Tensor]:
        torch.manual_seed(4)
        return evaluated(model, models.batch())

    expected = results()
    assert fastprefix.accelerate(model).fastprefix.prompt_path == "shared"
    assert_same(results(), expected)


def test_a_prompt_for_the_caller_is_the_prompt() -> None:
    """Outside of PEFT's own calls, ``get_prompt`` returns the same as before."""
    model = family("decoder", "prompt")
    expected = model.get_prompt(3)
    fastprefix.accelerate(model)
    assert torch.equal(model.get_prompt(3), expected)
    assert model.get_prompt(3).requires_grad
    ids = models.batch()["input_ids"]
    embeds = torch.cat([expected, model.get_input_embeddings()(ids)], dim=1)
    torch.testing.assert_close(model.base_model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adaption"])
def test_low_precision_and_autocast(kind: str) -> None:
    inputs, model = models.batch("left"), fastprefix.accelerate(family("decoder", kind))
    exact = model(**inputs).logits
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
    model.get_base_model().bfloat16()
    assert (model(**inputs).logits - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", ["cartridge", "prompt", "adaption"])
def test_compiled_without_graph_breaks(kind: str) -> None:
    inputs = models.batch("right")
    model = fastprefix.accelerate(tuned(models.decoder(layers=1), kind, "CAUSAL_LM"))
    expected = evaluated(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = evaluated(compiled, inputs)
    assert_same({name.removeprefix("_orig_mod."): tensor for name, tensor in actual.items()}, expected)


def bart() -> Any:
    return BartForConditionalGeneration(
        BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, vocab_size=100)
    )


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lora": (
        lambda: peft.get_peft_model(models.decoder(), peft.LoraConfig(task_type="CAUSAL_LM")),
        "`peft_model` must have one of PREFIX_TUNING.*but has LORA",
    ),
    "interface": (
        lambda: tuned(
            AutoModelForCausalLM.from_config(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100)),
            "prefix",
            "CAUSAL_LM",
        ),
        "attention interface",
    ),
    "gpt2-adaption": (
        lambda: tuned(AutoModelForCausalLM.from_config(GPT2Config(**GPT2)), "adaption", "CAUSAL_LM"),
        "after the output projection",
    ),
    "biased-adaption": (
        lambda: tuned(models.decoder(attention_bias=True), "adaption", "CAUSAL_LM"),
        "bias, which PEFT adds twice",
    ),
    "twice": (lambda: fastprefix.accelerate(family("decoder", "prefix")), "already accelerated"),
    "attached": (
        lambda: tuned(fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(3)), "prompt", "CAUSAL_LM"),
        "Detach it first",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str) -> None:
    make, says = REFUSED[case]
    model = make()
    attributes = set(vars(model))
    with pytest.raises(ValueError, match=says):
        fastprefix.accelerate(model)
    assert set(vars(model)) == attributes


def test_refused_while_disabled_or_not_of_peft() -> None:
    model = family("decoder", "prefix")
    with model.disable_adapter(), pytest.raises(ValueError, match="disable_adapter"):
        fastprefix.accelerate(model)
    with pytest.raises(TypeError, match=r"peft\.PeftModel, but is LlamaForCausalLM"):
        fastprefix.accelerate(models.decoder())
    with pytest.raises(ValueError, match="accelerated model"):
        fastprefix.decelerate(model)


def test_layers_without_a_place_in_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "find_layers", lambda model: [replace(find_layers(model)[0], local=True)])
    with pytest.raises(ValueError, match=r"peft_model.*'model\.layers\.0\.self_attn'"):
        fastprefix.accelerate(family("decoder", "prefix"))
    monkeypatch.setattr(acceleration, "find_layers", lambda model: find_layers(model)[1:])
    with pytest.raises(ValueError, match=r"peft_model.*numbered attention layers"):
        fastprefix.accelerate(family("decoder", "prefix"), check=False)
    prompt = fastprefix.accelerate(family("decoder", "prompt"), check=False)
    assert prompt.fastprefix.prompt_path.startswith("textbook: `peft_model`")


def test_what_would_differ_in_a_trial_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = family("decoder", "prefix"), models.batch()
    expected = model(**inputs).logits
    monkeypatch.setattr(attention.GivenPrefix, "get_prefix", lambda self, query, key, value: (self.key * 2, self.value))
    with pytest.raises(ValueError, match="would not give PEFT's results"):
        fastprefix.accelerate(model, check=False)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adaption"])
def test_an_unexpected_error_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = family("decoder", kind), models.batch()
    expected, before = model(**inputs).logits, describe(model)
    base = type(model.get_base_model())
    with monkeypatch.context() as patch:
        models.fail_once(
            patch, *((base, "get_output_embeddings") if kind == "prompt" else (TensorParallelHeads, "find"))
        )
        with pytest.raises(models.InjectedError):
            fastprefix.accelerate(model, check=False)
    assert describe(model) == before
    assert torch.equal(model(**inputs).logits, expected)
    fastprefix.accelerate(model)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_attention_weights_are_refused() -> None:
    model = fastprefix.accelerate(family("decoder", "prefix"))
    with pytest.raises(ValueError, match="output_attentions"):
        model(**models.batch(), output_attentions=True)


def test_a_cache_that_the_caller_continues() -> None:
    """The cache that a call returns continues like PEFT's."""
    ids, model = models.batch()["input_ids"], fastprefix.accelerate(family("decoder", "prefix"))
    whole = model(input_ids=ids).logits[:, -1]
    start = model(input_ids=ids[:, :-1], use_cache=True)
    assert start.past_key_values.get_seq_length() == LENGTH + 6
    last = model.base_model(input_ids=ids[:, -1:], past_key_values=start.past_key_values).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-10, atol=1e-10)


def test_functions_for_attached_models_name_pefts_own() -> None:
    model = fastprefix.accelerate(tuned(models.decoder(), "prefix", "CAUSAL_LM"))
    for call in (fastprefix.parameter_groups, fastprefix.merge, lambda each: fastprefix.save_adapter(each, "folder")):
        with pytest.raises(ValueError, match="PEFT's own adapter has PEFT's methods, such as save_pretrained"):
            call(model)


@pytest.mark.parametrize(
    ("name", "kind", "versions", "warned"),
    [
        ("decoder", "prefix", ("0.21.2", "5.24.0"), True),
        ("decoder", "prompt", ("0.21.2", "5.25.0"), True),
        ("decoder", "adaption", ("0.21.2", "5.24.0"), False),
        ("decoder", "prefix", ("0.21.2", "5.23.0"), False),
        ("decoder", "prefix", ("0.22.0", "5.24.0"), False),
        ("encoder", "prompt", ("0.21.2", "5.24.0"), False),
    ],
)
def test_wrong_tokens_of_peft_are_announced(
    name: str, kind: str, versions: tuple[str, str], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(getattr(models, name)(), kind, "CAUSAL_LM" if name == "decoder" else "SEQ_CLS")
    for package, version in zip((peft, transformers), versions, strict=True):
        monkeypatch.setattr(package, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastprefix.accelerate(model)
    assert any("returns wrong tokens" in str(warning.message) for warning in caught) is warned
    assert all(warning.filename == __file__ for warning in caught if "wrong tokens" in str(warning.message))


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT alone, accelerated, and with gradient checkpointing: the loss is the same."""
    runpy.run_path(str(Path(__file__).parents[3] / "examples" / "peft_accelerate.py"), run_name="__main__")
    losses = re.findall(r"loss (\S+)", capsys.readouterr().out)
    assert len(losses) == 3
    assert len(set(losses)) == 1


def test_a_mask_of_one_row_says_what_every_query_sees() -> None:
    """It is not a causal mask."""
    model, inputs = family("decoder", "adaption"), models.batch()
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    expected = model(inputs["input_ids"], attention_mask=mask).logits
    actual = fastprefix.accelerate(model)(inputs["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_what_the_check_sees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    conformance.forget_reports()
    own = GivenPrefix.get_prefix
    monkeypatch.setattr(
        GivenPrefix, "get_prefix", lambda self, q, k, v: tuple(1.000001 * t for t in own(self, q, k, v))
    )
    peft_model = peft.get_peft_model(
        models.decoder(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    with pytest.raises(ValueError, match="PREFIX_TUNING on LlamaForCausalLM: with ids, its values or gradients differ"):
        fastprefix.accelerate(peft_model)
    conformance.forget_reports()


def test_a_model_with_a_verified_small_copy_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial with and without the adapter is only needed if no small copy represents the model."""
    monkeypatch.setattr(conformance, "_TINY", 0)
    model = family("decoder", "prompt")
    runs: list[int] = []
    model.get_base_model().model.layers[-1].register_forward_hook(lambda *args: runs.append(1))
    assert fastprefix.accelerate(model).fastprefix.prompt_path == "shared"
    assert len(runs) == 1


def test_adaption_prompts_beside_an_attached_prefix_are_refused() -> None:
    model = fastprefix.accelerate(family("decoder", "adaption"))
    base, inputs = model.get_base_model(), models.batch()
    expected = model(**inputs).logits
    fastprefix.attach(base, fastprefix.PrefixTuningConfig(4), check=False)
    with pytest.raises(ValueError, match=r"an adapter of fastprefix\.attach in use"):
        model(**inputs)
    fastprefix.detach(base)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_generate_refuses_names_that_it_cannot_follow() -> None:
    model = fastprefix.accelerate(family("decoder", "adaption"))
    with pytest.raises(ValueError, match="`adapter_names` must not be given"):
        model.generate(**models.batch(), adapter_names=["a", "b", "c"], max_new_tokens=2)


@pytest.mark.parametrize("kind", ["prefix", "adaption"])
def test_a_method_that_the_caller_replaced_is_called_and_restored(kind: str) -> None:
    model, calls = family("decoder", kind), []
    former: Any = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return former(*args, **kwargs)

    model.generate = generate
    fastprefix.accelerate(model)
    model.generate(**models.batch(), max_new_tokens=2, do_sample=False)
    assert len(calls) == 1
    assert fastprefix.decelerate(model).generate is generate
