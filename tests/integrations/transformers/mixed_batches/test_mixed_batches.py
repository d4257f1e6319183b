"""Test batches whose rows have different adapters: each row equals the same row alone with its adapter."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from datasets import Dataset
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    CohereConfig,
    DynamicCache,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2MoeConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    StableLmConfig,
    Starcoder2Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import fastprefix
from fastprefix.integrations.transformers.attachment import get_attachment
from fastprefix.integrations.transformers.prompts.prompt import OffsetHooks

from .... import models
from ....float64 import Float64
from ..prompts.test_shared_prompt import EAGER, GROUPED, NO_DROPOUT, SHARING, SMALL, WINDOWED
from ..test_families import ENCODER_DECODERS, FAMILIES, batch

BASE = "__base__"
SHIFT: dict[str, Any] = {"prefix_position": "shift"}
KEPT: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT: dict[str, Any] = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

SHIFTED: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(4, **SHIFT),
    "biases": lambda: fastprefix.PrefixTuningConfig(3, key_bias=True, num_frozen_tokens=1, **SHIFT),
    "prompt": lambda: fastprefix.PromptTuningConfig(6),
    "dept": lambda: fastprefix.DePTConfig(3, rank=2, max_length=40),
    "adept": lambda: fastprefix.ADePTConfig(6, bottleneck_dim=3),
    "wide": lambda: fastprefix.ADePTConfig(2, bottleneck_dim=5),
}
COMPUTED: dict[str, Callable[[], Any]] = {
    "ulpt": lambda: fastprefix.ULPTConfig(4, rank=2),
    "encoder": lambda: fastprefix.PTuningConfig(3, encoder_hidden_dim=8),
    "codebooks": lambda: fastprefix.ACCEPTConfig(
        5, prompt_block=8, prompt_codewords=3, offset_block=4, offset_codewords=2, max_length=30
    ),
    "pair": lambda: fastprefix.ACCEPTConfig(2, prompt_block=4, codebook_offset=False, rank=2, max_length=40),
    "task": lambda: fastprefix.MultitaskPromptConfig(4, num_tasks=1),
}
OWN: dict[str, Callable[[], Any]] = {
    "own": lambda: fastprefix.PrefixTuningConfig(4, softmax="own"),
    "gated": lambda: fastprefix.ResidualPrefixConfig(3, bottleneck_dim=4, hidden_dim=8, softmax="own"),
}
PLAIN: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(4, train="values"),
    "mlp": lambda: fastprefix.PrefixTuningConfig(3, reparameterization="mlp", hidden_dim=8),
    "residual": lambda: fastprefix.ResidualPrefixConfig(5, bottleneck_dim=4, hidden_dim=8),
    "apt": lambda: fastprefix.APTConfig(6),
}
POOLED: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(4),
    "first": lambda: fastprefix.APTConfig(5, pooling="cls"),
    "short": lambda: fastprefix.APTConfig(2, pooling="cls", layer_gate=False),
}
STATES: dict[str, Callable[[], Any]] = {
    "all": lambda: fastprefix.LlamaAdapterConfig(4),
    "last": lambda: fastprefix.LlamaAdapterConfig(3, layers=1),
}
SETS = {"shifted": SHIFTED, "plain": PLAIN, "pooled": POOLED, "states": STATES, "computed": COMPUTED, "own": OWN}

DECODERS: dict[str, Callable[[], PretrainedConfig]] = {
    **SHARING,
    **{f"{name}-window": make for name, make in WINDOWED.items()},
    "llama": lambda: LlamaConfig(**GROUPED),
    "phi3": lambda: Phi3Config(**{**SMALL, "num_key_value_heads": 2}, **KEPT),
    "olmo2": lambda: Olmo2Config(**{**SMALL, "num_key_value_heads": 2}, **KEPT),
    "cohere": lambda: CohereConfig(**{**SMALL, "num_key_value_heads": 2}, **KEPT),
    "stablelm": lambda: StableLmConfig(**{**SMALL, "num_key_value_heads": 2}, **KEPT),
    "starcoder2": lambda: Starcoder2Config(**{**SMALL, "num_key_value_heads": 2}, sliding_window=None, **KEPT),
    "granite": lambda: GraniteConfig(**{**SMALL, "num_key_value_heads": 2}, **KEPT),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}
"""Decoders on which prompts are shared."""


def opt() -> Any:
    return AutoModelForCausalLM.from_config(
        OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            vocab_size=100,
            word_embed_proj_dim=32,
            dropout=0.0,
            init_std=0.2,
        )
    )


def attach_all(model: Any, configs: dict[str, Callable[[], Any]]) -> Any:
    """Attach adapters with random parameters under their names."""
    for seed, (name, make) in enumerate(configs.items()):
        fastprefix.attach(model, make(), name=name, check=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.fastprefix.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def build(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **EAGER).double().eval()


def make_rows(count: int, padding: str = "left") -> dict[str, Tensor]:
    """Return rows of seven tokens, some of which begin or end with padding."""
    torch.manual_seed(1)
    ids = torch.randint(3, models.VOCABULARY, (count, 7))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :3] = 0
    elif padding == "right":
        mask[0, 4:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def take_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


def use(model: Any, name: str) -> Any:
    """Use an adapter in a context, or the base without an adapter."""
    if name == BASE:
        return fastprefix.disable_adapter(model)
    fastprefix.set_adapter(model, name)
    return torch.enable_grad()


def compute_loss(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return a loss that is a sum over the rows, without padding."""
    values: Tensor = output.logits if hasattr(output, "logits") else output[0]
    mask = inputs.get("attention_mask", inputs.get("decoder_attention_mask"))
    if mask is not None and values.ndim == 3 and mask.shape == values.shape[:2]:
        values = values * mask[:, :, None]
    return values.square().sum()


def collect(model: Any) -> dict[str, Tensor]:
    """Return and clear the gradients of all adapters."""
    gradients = {}
    for name, adapter in get_attachment(model).adapters.items():
        for key, parameter in adapter.method.named_parameters():
            if parameter.grad is not None:
                gradients[f"{name}.{key}"], parameter.grad = parameter.grad, None
    return gradients


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) <= 1e-10 * max(float(expected.abs().max()), 1e-3)


def assert_rows_are_alone(model: Any, names: Sequence[str], inputs: dict[str, Tensor]) -> None:
    """Compare values and gradients of a mixed batch with those of each row alone with its adapter."""
    losses = []
    for row, name in enumerate(names):
        with use(model, name):
            alone = take_row(inputs, row)
            loss = compute_loss(model(**alone), alone)
            losses.append(loss.detach())
            if loss.requires_grad:
                loss.backward()
    expected = collect(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = model(**inputs, adapter_names=list(names))
            for row in range(len(names)):
                part = type(output)({"logits": output["logits"][row : row + 1]}) if "logits" in output else None
                own = (output[0][row : row + 1],) if part is None else part
                assert_close(compute_loss(own, take_row(inputs, row)).detach(), losses[row])
            if grad:
                compute_loss(output, inputs).backward()
    actual = collect(model)
    assert actual.keys() == expected.keys()
    assert actual
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


def assert_generates_alone(model: Any, names: Sequence[str], inputs: dict[str, Tensor], **options: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    generated = model.generate(**inputs, adapter_names=list(names), **options)
    count = len(generated) // len(names)
    for row, name in enumerate(names):
        with use(model, name):
            alone = model.generate(**take_row(inputs, row), **options)
        assert torch.equal(generated[row * count : (row + 1) * count], alone), name


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_rows_are_what_they_are_alone(which: str, padding: str) -> None:
    model = attach_all(models.decoder(), SETS[which])
    names = [*SETS[which], BASE, next(iter(SETS[which]))]
    inputs = make_rows(len(names), padding)
    assert_rows_are_alone(model, names, inputs)
    if padding != "right":
        assert_generates_alone(model, names, inputs)
        assert_generates_alone(model, names, inputs, num_beams=3, num_return_sequences=2)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("family", DECODERS)
def test_families_of_decoders(family: str) -> None:
    with Float64():
        model = build(DECODERS[family]())
        attach_all(model, {name: SHIFTED[name] for name in ("prefix", "prompt", "adept")})
        names = ["adept", BASE, "prefix", "prompt"]
        assert_rows_are_alone(model, names, make_rows(4))
        assert_generates_alone(model, names, make_rows(4), max_new_tokens=4)


MORE: dict[str, Callable[[], Any]] = {
    "opt": opt,
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**BERT, max_position_embeddings=40)),
    "gpt2-attention": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, scale_attn_by_inverse_layer_idx=True, **NO_DROPOUT)
    ),
}


@pytest.mark.parametrize("family", MORE)
def test_families_of_other_models(family: str) -> None:
    torch.manual_seed(0)
    with Float64():
        model = attach_all(MORE[family]().double().eval(), {name: PLAIN[name] for name in ("prefix", "apt")})
        assert_rows_are_alone(model, ["apt", "prefix", BASE, "apt"], make_rows(4, "right"))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("clip", "wav2vec2", "whisper-encoder")])
def test_families_with_two_halves_or_images(family: str) -> None:
    torch.manual_seed(0)
    with Float64():
        configs = {
            "prefix": lambda: fastprefix.PrefixTuningConfig(4, modules_to_save=[]),
            "residual": lambda: fastprefix.ResidualPrefixConfig(5, bottleneck_dim=4, hidden_dim=8, modules_to_save=[]),
        }
        model = attach_all(FAMILIES[family]().double().eval(), configs)
        inputs, names = batch(model), ["residual", BASE, "prefix"]
        decoded = {"decoder_input_ids": torch.randint(3, 100, (3, 4))} if family in ENCODER_DECODERS else {}
        assert_rows_are_alone(model, names, {**inputs, **decoded})
        if decoded:
            assert_generates_alone(model, names, inputs, num_beams=2)


@pytest.mark.parametrize("make", [BertForMaskedLM, RobertaForMaskedLM])
def test_shifted_prefixes_of_an_encoder(make: Any) -> None:
    torch.manual_seed(0)
    model = make(make.config_class(**BERT, max_position_embeddings=40)).double().eval()
    attach_all(model, {name: SHIFTED[name] for name in ("prefix", "biases")})
    assert_rows_are_alone(model, ["biases", "prefix", BASE], make_rows(3, "right"))


def test_each_example_of_several_choices_has_one_name() -> None:
    torch.manual_seed(0)
    model = BertForMultipleChoice(BertConfig(**BERT)).double().eval()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2, modules_to_save=[]), name="a", check=False)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(5, modules_to_save=[]), name="b", check=False)
    ids = torch.randint(3, 100, (3, 2, 5))
    mixed = model(input_ids=ids, adapter_names=["b", "a", BASE]).logits
    for row, name in enumerate(("b", "a", BASE)):
        with use(model, name):
            torch.testing.assert_close(mixed[row : row + 1], model(input_ids=ids[row : row + 1]).logits)


def decoder() -> Any:
    return attach_all(models.decoder(), SHIFTED)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_names_belong_to_the_cache(cache: str) -> None:
    model, names, inputs = decoder(), ["adept", BASE, "prefix"], make_rows(3, "none")
    ids = inputs["input_ids"]
    whole = model(input_ids=ids, adapter_names=names).logits
    with torch.no_grad():
        held = DynamicCache() if cache == "dynamic" else StaticCache(model.config, max_cache_len=12)
        first = model(input_ids=ids[:, :4], past_key_values=held, adapter_names=names)
        rest = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values)  # without names
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=ids[:, :1], past_key_values=held, adapter_names=[BASE, BASE, "prefix"])
    again = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, adapter_names=names)
    continued = model.generate(
        input_ids=ids, past_key_values=model(ids[:, :6], adapter_names=names).past_key_values, max_new_tokens=3
    )
    assert torch.equal(again, continued)


@torch.no_grad()
def test_names_move_with_the_rows_of_the_cache() -> None:
    model, names = attach_all(models.decoder(), POOLED), ["first", BASE, "short"]
    ids = make_rows(3, "none")["input_ids"]
    whole = model(input_ids=ids, adapter_names=names).logits
    cache = model(input_ids=ids[:, :4], adapter_names=names).past_key_values
    for method, rows in (("reorder_cache", [2, 0, 1]), ("batch_select_indices", [1, 1, 0, 2])):
        moved = copy.deepcopy(cache)
        getattr(moved, method)(torch.tensor(rows))
        rest = model(input_ids=ids[rows, 4:], past_key_values=moved).logits
        torch.testing.assert_close(rest, whole[rows, 4:], rtol=1e-10, atol=1e-10)
    cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1, 2, 2]
    rest = model(input_ids=ids[rows, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[rows, 4:], rtol=1e-10, atol=1e-10)


def test_a_cache_without_names_cannot_get_them() -> None:
    model, ids = decoder(), make_rows(2, "none")["input_ids"]
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match="`past_key_values`"):
        model(input_ids=ids[:, :1], past_key_values=cache, adapter_names=["prefix", "prefix"])


def test_hooks_that_cannot_be_set_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = decoder(), make_rows(3)
    plain = model(**inputs).logits

    def fail(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(OffsetHooks, "install", fail)
        with pytest.raises(MemoryError):
            model(**inputs, adapter_names=["prefix", BASE, "adept"])
    assert torch.equal(model(**inputs).logits, plain)
    fastprefix.detach(model)
    assert not any(hasattr(module, "_fastprefix_watched") for module in model.modules())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("queries", [1, 7])
def test_masks_with_which_a_prompt_is_not_shared_are_refused(queries: int, cached: bool) -> None:
    """A mask of one row hides no token from the prompt, and any 4-D mask replaces sliding windows."""
    model = attach_all(AutoModelForCausalLM.from_config(WINDOWED["mistral"]()).double().eval(), SHIFTED)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[-queries:].expand(2, 1, -1, -1)
    inputs = {"input_ids": make_rows(2, "none")["input_ids"], "attention_mask": mask}
    model(**inputs, adapter_names=["prefix", BASE])
    cache = DynamicCache() if cached else None
    with pytest.raises(ValueError, match="`attention_mask` cannot be used with the prompt 'prompt' in `adapter_names`"):
        model(**inputs, adapter_names=["prompt", BASE], past_key_values=cache)


def test_an_emptied_cache_forgets_its_names() -> None:
    model, ids = decoder(), make_rows(2, "none")["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False}
    expected, cache = model.generate(**options), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, adapter_names=[BASE, "adept"])
    cache.reset()
    assert torch.equal(model.generate(**options, past_key_values=cache), expected)


def test_sampling_gives_each_row_its_own_distribution() -> None:
    model, inputs = decoder(), make_rows(3)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "top_k": 3, "pad_token_id": 0}
    torch.manual_seed(3)
    sampled = model.generate(**inputs, adapter_names=["prompt", BASE, "prefix"], num_return_sequences=4, **options)
    assert sampled.shape[0] == 12
    names = [name for name in ("prompt", BASE, "prefix") for _ in range(4)]
    mask = torch.nn.functional.pad(inputs["attention_mask"].repeat_interleave(4, 0), (0, 5), value=1)
    output = model(input_ids=sampled, attention_mask=mask, adapter_names=names)
    best = output.logits[:, 6:-1].topk(3).indices
    assert bool((best == sampled[:, 7:, None]).any(-1).all())


def test_calls_without_names_run_with_the_adapter_in_use() -> None:
    model, inputs = decoder(), make_rows(3)
    fastprefix.set_adapter(model, "prompt")
    expected = model(**inputs).logits
    mixed = model(**inputs, adapter_names=["prefix", BASE, "adept"]).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs, adapter_names=["prefix", BASE, "adept"]).logits, mixed)
    model.model(**inputs)  # the backbone by itself, which leaves the mixed batch too
    hidden = model.model(**inputs).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected)
    with fastprefix.disable_adapter(model):
        plain = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, adapter_names=["prefix", BASE, "adept"]).logits, mixed)
        assert torch.equal(model(**inputs).logits, plain)
    fastprefix.detach(model)
    assert torch.equal(model(**inputs).logits, plain)
    assert not {"forward", "generate"} & vars(model).keys()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_runs_layers_again_with_their_own_rows(use_reentrant: bool) -> None:
    """Another mixed batch may run before the backward pass."""
    model, inputs = decoder().train(), make_rows(3)
    names = ["adept", BASE, "biases"]
    model(**inputs, adapter_names=names).logits.square().sum().backward()
    expected = collect(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            model(**inputs, adapter_names=names)
        return
    loss = model(**inputs, adapter_names=names).logits.square().sum()
    model(**inputs, adapter_names=["prefix", "prefix", "prompt"])
    loss.backward()
    actual = collect(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-10)


def test_parameters_of_all_named_adapters_are_trained() -> None:
    """Two adapters, each on its own rows, in one optimizer, take the same steps as alone."""
    inputs, names = make_rows(4), ["prefix", "adept", "adept", "prefix"]
    mixed, alone = decoder(), decoder()

    def make_optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(fastprefix.parameter_groups(model, lr=1e-5, adapter_names=["prefix", "adept"]))

    together, apart = make_optimizer(mixed), make_optimizer(alone)
    collected: list[tuple[Any, list[Tensor]]] = []  # set_adapter drops the gradients of the adapter before
    for _ in range(3):
        together.zero_grad()
        mixed(**inputs, adapter_names=names).logits.square().sum().backward()
        together.step()
        apart.zero_grad()
        for name in ("prefix", "adept"):
            rows = [row for row, each in enumerate(names) if each == name]
            fastprefix.set_adapter(alone, name)
            own = {key: value[rows] for key, value in inputs.items()}
            loss = alone(**own).logits.square().sum()
            loss.backward()
            method = get_attachment(alone).adapters[name].method
            gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
            collected.append((method, gradients))
        for method, gradients in collected:
            for parameter, gradient in zip(method.parameters(), gradients, strict=True):
                parameter.grad = gradient
        collected.clear()
        apart.step()
    for name in ("prefix", "adept"):
        for one, other in zip(
            *(get_attachment(model).adapters[name].method.parameters() for model in (mixed, alone)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_composed_prefixes_are_parts_too() -> None:
    model = attach_all(models.decoder(), {n: SHIFTED[n] for n in ("prefix", "biases")})
    fastprefix.compose(model, ["prefix", "biases"], name="both", trainable=["biases"])
    assert_rows_are_alone(model, ["both", BASE], make_rows(2))


def test_merged_adapters_are_parts_too() -> None:
    model, inputs = decoder(), make_rows(2)
    expected = model(**inputs, adapter_names=["prompt", "prefix"]).logits
    fastprefix.set_adapter(model, "prompt")
    fastprefix.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, adapter_names=["prompt", "prefix"]).logits, expected)
    fastprefix.set_adapter(model, "adept")
    fastprefix.merge(model)
    fastprefix.set_adapter(model, "prefix")
    with pytest.raises(ValueError, match="`adapter_names` must not name 'adept'"):
        model(**inputs, adapter_names=["adept", "prefix"])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_models_are_copied(copied: str) -> None:
    model, inputs, names = decoder(), make_rows(2), ["prompt", "biases"]
    expected = model(**inputs, adapter_names=names).logits
    other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(**inputs, adapter_names=names).logits, expected)
    fastprefix.detach(model)
    assert torch.equal(other(**inputs, adapter_names=names).logits, expected)
    assert len(other.generate(**inputs, adapter_names=names, max_new_tokens=2)) == 2


def test_prompts_in_the_store_follow_their_parameters_and_the_model() -> None:
    model, inputs, names = decoder(), make_rows(2), ["prompt", "prefix"]
    with torch.no_grad():
        for change in (
            lambda: get_attachment(model).adapters["prompt"].method.prompt.add_(1.0),
            lambda: get_attachment(model).adapters["prompt"].method.prompt.data.add_(1.0),
            lambda: model.model.layers[0].self_attn.v_proj.weight.mul_(2.0),
        ):
            model(**inputs, adapter_names=names)
            change()
            mixed = model(**inputs, adapter_names=names).logits
            fastprefix.set_adapter(model, "prompt")
            torch.testing.assert_close(mixed[:1], model(**take_row(inputs, 0)).logits, rtol=1e-10, atol=1e-10)


def train_together(model: Any, folder: Any, **options: Any) -> Trainer:
    """Return a Trainer that trains two adapters in the same batches."""
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "adapter_names": n} for n in ("prefix", "biases") * 2]

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        tensors = {name: torch.tensor([each[name] for each in examples]) for name in ("input_ids", "labels")}
        return {**tensors, "adapter_names": [each["adapter_names"] for each in examples]}

    groups = fastprefix.parameter_groups(model, lr=0.1, adapter_names=["prefix", "biases"])
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    optimizers = (torch.optim.SGD(groups, momentum=0.9), None)
    return Trainer(
        model, arguments, train_dataset=Dataset.from_list(rows), data_collator=collate, optimizers=optimizers
    )


def read_adapters(model: Any) -> dict[str, list[Tensor]]:
    adapters = get_attachment(model).adapters.items()
    return {name: [p.detach().clone() for p in each.method.parameters()] for name, each in adapters}


@pytest.mark.parametrize("used", ["prefix", "adept"])
def test_trainer_trains_adapters_together(tmp_path: Any, used: str) -> None:
    """It clips and clears the gradients of all of them, and its checkpoints contain all of them."""
    model, other = (fastprefix.set_adapter(decoder().float(), used) for _ in range(2))
    before = read_adapters(model)
    options = {"max_steps": 4, "save_steps": 2, "max_grad_norm": 0.1}
    train_together(model, tmp_path, **options).train()
    after = read_adapters(model)
    for name in before:
        assert all(map(torch.equal, before[name], after[name])) == (name not in ("prefix", "biases"))
    gradients = [p.grad for n in ("prefix", "biases") for p in get_attachment(model).adapters[n].method.parameters()]
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    train_together(other, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameters in read_adapters(other).items():
        assert all(map(torch.equal, parameters, after[name]))
    assert fastprefix.count_parameters(model).groups["fastprefix_together"] > 0


def test_adapters_that_are_trained_together_are_parts_of_the_model_until_they_are_detached() -> None:
    model = decoder()
    names = list(model.state_dict())
    fastprefix.parameter_groups(model, adapter_names=["prefix", "biases"])
    for used in ("prefix", "biases", "adept"):
        fastprefix.set_adapter(model, used)
        others = {"prefix", "biases"} - {used}
        assert {n.split(".")[1] for n in model.state_dict() if n.startswith("fastprefix_together.")} == {
            f"adapter_{each}" for each in others
        }
    fastprefix.detach(model, "biases")
    fastprefix.set_adapter(model, "prefix")
    assert not any(name.startswith("fastprefix_together.") for name in model.state_dict())
    base = [name for name in names if not name.startswith("fastprefix.")]
    assert list(fastprefix.detach(model).state_dict()) == base


def test_distributed_data_parallel_needs_all_names_beforehand(tmp_path: Any) -> None:
    inputs, names = make_rows(2, "none"), ["prefix", "adept"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model = decoder()
        with pytest.raises(ValueError, match="'prefix'"):
            DistributedDataParallel(model)(**inputs, adapter_names=names)
        fastprefix.parameter_groups(model, adapter_names=names)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        wrapped(**inputs, adapter_names=names).logits.sum().backward()
        for name in names:
            assert all(p.grad is not None for p in get_attachment(model).adapters[name].method.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_models_are_not_compiled_anew_for_other_names() -> None:
    model, ids = attach_all(models.decoder(), PLAIN).float(), make_rows(3, "none")["input_ids"]
    store = fastprefix.AdapterStore(model, tokens=64)
    mixed = [["prefix", BASE, "mlp"], ["mlp", "residual", "prefix"], [BASE, "mlp", "mlp"], ["residual", "stored", BASE]]
    expected = []
    with torch.no_grad():
        store.load("stored", make_state(model, 7))
        for names in mixed:
            expected.append(model(input_ids=ids, adapter_names=names).logits)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        model.model.compile(backend=counter)
        for turn, names in enumerate([*mixed, *mixed]):
            if turn == 2:
                compiled = counter.frame_count
            if turn == 5:
                store.load("other", make_state(model, 9))
            output = model(input_ids=ids, adapter_names=names).logits
            torch.testing.assert_close(output, expected[turn % 4])
    assert counter.frame_count == compiled


def make_state(model: Any, length: int, **options: Any) -> fastprefix.PrefixState:
    """Return a random prefix for all layers of a decoder."""
    generator = torch.Generator().manual_seed(length)
    shape = (models.KV_HEADS, length, models.WIDTH // models.HEADS)
    pairs = [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(models.LAYERS)
    ]
    return fastprefix.PrefixState(pairs, **options)


class TestErrors:
    """Every misuse is refused with the name of the argument."""

    @pytest.mark.parametrize("names", ["prefix", ["prefix", 3], ("prefix", None), {"prefix": 1}])
    def test_types(self, names: Any) -> None:
        with pytest.raises(TypeError, match="`adapter_names`"):
            decoder()(**make_rows(2), adapter_names=names)

    @pytest.mark.parametrize("names", [[], ["prefix"], ["prefix"] * 3, ["prefix", "nobody"]])
    def test_numbers_and_names(self, names: list[str]) -> None:
        model, inputs = decoder(), make_rows(2)
        for run in (model, model.generate):
            with pytest.raises(ValueError, match="`adapter_names`"):
                run(**inputs, adapter_names=names)
        assert torch.isfinite(model(**inputs).logits).all()

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (lambda: fastprefix.LlamaAdapterConfig(3), SHIFTED["prefix"]),
            (lambda: fastprefix.LlamaAdapterConfig(3), PLAIN["prefix"]),
            (PLAIN["prefix"], SHIFTED["prefix"]),
            (PLAIN["apt"], POOLED["first"]),
        ],
    )
    def test_adapters_that_cannot_be_together(self, first: Any, second: Any) -> None:
        model = attach_all(models.decoder(), {"one": first, "two": second})
        with pytest.raises(ValueError, match=r"'(one|two)' and '(one|two)'"):
            model(**make_rows(2), adapter_names=["one", "two"])

    def test_prompts_in_every_row(self) -> None:
        model = models.decoder()
        fastprefix.attach(model, fastprefix.PromptTuningConfig(3, shared_prompt=False), check=False)
        with pytest.raises(ValueError, match="every row"):
            model(**make_rows(2), adapter_names=["default", BASE])

    def test_trained_heads(self) -> None:
        model = models.encoder()
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(3), name="head", check=False)
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(3, modules_to_save=[]), name="free", check=False)
        with pytest.raises(ValueError, match="'head'"):
            model(**make_rows(2, "right"), adapter_names=["head", "free"])
        fastprefix.set_adapter(model, "head")
        with pytest.raises(ValueError, match="set_adapter"):
            model(**make_rows(2, "right"), adapter_names=["free", BASE])

    @pytest.mark.parametrize("kind", ["prefix", "prompt"])
    def test_parts_of_the_model(self, kind: str) -> None:
        model = decoder()
        fastprefix.set_adapter(model, kind)
        with pytest.raises(ValueError, match="`adapter_names`"):
            model.model(**make_rows(2), adapter_names=[kind, BASE])

    def test_the_name_of_the_base(self) -> None:
        with pytest.raises(ValueError, match="`name`"):
            fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(3), name=BASE)

    def test_dropout_that_draws_in_every_row(self) -> None:
        torch.manual_seed(0)
        model = attach_all(models.decoder(attention_dropout=0.1), {n: SHIFTED[n] for n in ("prompt", "prefix")})
        model.train()
        with pytest.raises(ValueError, match="dropout"):
            model(**make_rows(2), adapter_names=["prompt", "prefix"])


def test_gates_of_an_encoder_decoder_in_a_batch() -> None:
    """Its encoder has a gate per sequence, its decoder one per query. Each layer has only one kind."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)).double().eval()
    fastprefix.attach(model, fastprefix.APTConfig(4), name="a", check=False)
    models.randomize(model)
    inputs = {"input_ids": models.batch()["input_ids"] % 97, "decoder_input_ids": torch.arange(3, 12).view(3, 3)}
    with torch.no_grad():
        actual = model(**inputs, adapter_names=["a", BASE, "a"]).logits
        alone = model(**inputs).logits
        with fastprefix.disable_adapter(model):
            alone[1] = model(**inputs).logits[1]
    torch.testing.assert_close(actual, alone, rtol=1e-9, atol=1e-9)
