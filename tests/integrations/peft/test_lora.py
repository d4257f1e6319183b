"""Test LoRA and similar layers together with a prefix or a prompt against the textbook."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

import fastprefix
from fastprefix.integrations.transformers.checking.textbook import PrefixTextbook, PromptTextbook
from fastprefix.integrations.transformers.models.discovery import find_method_layers, list_ordinary_ids
from fastprefix.integrations.transformers.models.tuners import find_base_model, list_tuner_parameters

from ... import models
from ...float64 import Float64
from ..transformers import test_families
from ..transformers.prompts.test_shared_prompt import EAGER, SHARING, WINDOWED

pytestmark = pytest.mark.peft

LENGTH, STEPS = 4, 3
OPT = OPTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=48,
    vocab_size=100,
    word_embed_proj_dim=32,
    dropout=0.0,
)


def causal(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_config(make(), **EAGER)


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": models.decoder,
    **{name: causal(SHARING[name]) for name in ("qwen3", "gemma", "mixtral", "gpt_neox", "gpt2", "roberta")},
    **{f"{name}-window": causal(WINDOWED[name]) for name in ("mistral", "gemma2", "gpt_oss")},
    "opt": causal(lambda: OPT),
}
TEXT: dict[str, Callable[[], Any]] = {
    **DECODERS,
    "bert": models.encoder,
    "t5": test_families.FAMILIES["t5"],
    "bart": test_families.FAMILIES["bart"],
}
FAMILIES: dict[str, Callable[[], Any]] = {**TEXT, "vit": test_families.FAMILIES["vit"]}
OF_PREFIXES = [name for name in FAMILIES if name != "opt"]  # whose head does not call its base model
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
}
PREFIXES: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(LENGTH),
    "prefix-mlp": lambda: fastprefix.PrefixTuningConfig(LENGTH, reparameterization="mlp", hidden_dim=8),
    "apt": lambda: fastprefix.APTConfig(LENGTH),
    "llama-adapter": lambda: fastprefix.LlamaAdapterConfig(LENGTH),
}
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: fastprefix.PromptTuningConfig(LENGTH),
    "dept": lambda: fastprefix.DePTConfig(LENGTH, rank=3, max_length=16),
    "adept": lambda: fastprefix.ADePTConfig(LENGTH, bottleneck_dim=3),
}
METHODS = {**PREFIXES, **PROMPTS}


def tuned(family: str = "llama", kind: str = "lora", **options: Any) -> Any:
    """Return a PEFT model in float64 whose LoRA has an effect."""
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", **KINDS[kind], **options}
    config = peft.LoraConfig(r=3, init_lora_weights=False, **options)
    model = peft.get_peft_model(FAMILIES[family]().double(), config)
    return model.double().eval()


def attached(model: Any, config: Any, **options: Any) -> Any:
    """Return the same model with a method whose parameters are random. LoRA's parameters do not change."""
    fastprefix.attach(model, config, check=False, **options)
    randomize(model.fastprefix)
    return model


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_inputs(base: PreTrainedModel, padding: str = "right") -> dict[str, Any]:
    inputs: dict[str, Any] = models.batch(padding)
    if base.main_input_name != "input_ids":
        return {**test_families.batch(base), "labels": torch.tensor([0, 1, 1])}
    if base.config.is_encoder_decoder or base.can_generate():
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    return {**inputs, "labels": torch.tensor([0, 1, 1])}


class Textbook:
    """A PEFT model with a textbook method: concatenated prefixes, or a prompt in every row."""

    def __init__(self, peft_model: Any, config: Any, method: nn.Module) -> None:
        self.model = find_base_model(peft_model)
        self.method: Any = copy.deepcopy(method)
        if isinstance(config, fastprefix.PrefixTuningConfig | fastprefix.LlamaAdapterConfig):
            layers = find_method_layers(self.model, config)
            self.run: Any = PrefixTextbook(self.model, self.method, layers)
        else:
            self.run = PromptTextbook(self.model, self.method, list_ordinary_ids(self.model.config, 40)[-1])

    def trained(self) -> dict[str, nn.Parameter]:
        own = {f"fastprefix.{name}": p for name, p in self.method.named_parameters() if p.requires_grad}
        return {**{n: p for n, p in trained(self.model).items() if not n.startswith("fastprefix.")}, **own}


def train(run: Any, parameters: dict[str, nn.Parameter], inputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the loss and every gradient of several steps."""
    # Adam would divide the rounding of gradients that are 0 by itself.
    optimizer = torch.optim.SGD(parameters.values(), lr=0.02, momentum=0.9)
    steps = []
    for _ in range(STEPS):
        loss = run(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        steps.append({"loss": loss.detach(), **gradients})
        optimizer.step()
    return steps


def assert_same_training(family: str, kind: str, method: str, padding: str = "right") -> None:
    model, config = tuned(family, kind), METHODS[method]()
    plain = copy.deepcopy(model)
    with Float64():
        attached(model, config)
        base = find_base_model(model)
        heads = [name for name in trained(base) if not name.startswith("fastprefix.") and "lora" not in name]
        for name in heads:
            find_base_model(plain).get_parameter(name).requires_grad_()
        book = Textbook(plain, config, model.fastprefix)
        expected = book.trained()
        assert trained(base).keys() == expected.keys()
        assert sum("lora" in name for name in expected) == len(list(list_tuner_parameters(base)))
        inputs = make_inputs(base, padding)
        pairs = zip(train(model, trained(base), inputs), train(book.run, expected, inputs), strict=True)
        for actual, right in pairs:
            assert actual.keys() == right.keys()
            for name, value in right.items():
                torch.testing.assert_close(
                    actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
                )
        if family in DECODERS:
            options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            left = models.batch("left" if method != "dept" else "none")
            assert torch.equal(model.generate(**left, **options), book.model.generate(**left, **options))


@pytest.mark.parametrize("family", OF_PREFIXES)
def test_a_prefix_matches_the_textbook(family: str) -> None:
    assert_same_training(family, "lora", "prefix")


@pytest.mark.parametrize("family", TEXT)
def test_a_prompt_matches_the_textbook(family: str) -> None:
    assert_same_training(family, "lora", "prompt")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((method, "lora") for method in METHODS if method not in ("prefix", "prompt")),
        *((method, kind) for method in ("apt", "adept") for kind in ("dora", "rslora")),
    ],
)
def test_kinds_of_lora_match_the_textbook(method: str, kind: str) -> None:
    assert_same_training("llama", kind, method, padding="none")


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prefix-mlp", "apt", "prompt", "adept"])
def test_gradient_checkpointing_changes_nothing(method: str, reentrant: bool) -> None:
    model = attached(tuned(), METHODS[method]()).train()
    inputs = make_inputs(find_base_model(model))
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(gradients(model, inputs), expected)
    assert {name for name in expected if name != "loss"} == trained(model).keys()


@pytest.mark.parametrize("method", ["prefix", "apt", "adept"])
def test_compiled_as_a_whole(method: str) -> None:
    model = attached(tuned(), METHODS[method]())
    base, inputs = find_base_model(model), models.batch("right")
    inputs["labels"] = inputs["input_ids"]
    expected = gradients(base, inputs)
    torch._dynamo.reset()
    base.forward = torch.compile(base.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    assert_same(gradients(base, inputs), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["prefix", "adept"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_base_of_low_precision(family: str, method: str, autocast: bool) -> None:
    """Trained parameters are float32, and outputs have the precision of the base."""
    base = FAMILIES[family]().to(torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    fastprefix.attach(model, METHODS[method](), check=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**make_inputs(base))
    assert output.logits.dtype is torch.bfloat16
    output.loss.backward()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())
