"""Test several adapters on one model: switching, isolation of the others, saving and resuming by name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.integrations.transformers import adapter
from fastprefix.integrations.transformers.adapter import Adapter
from fastprefix.integrations.transformers.attachment import get_method
from fastprefix.integrations.transformers.files import saving
from fastprefix.integrations.transformers.mixed_batches.routing import Routing
from fastprefix.integrations.transformers.models import switching
from fastprefix.integrations.transformers.models.switching import Implementation
from fastprefix.integrations.transformers.prefixes.prefix import PrefixHooks
from fastprefix.integrations.transformers.prompts.prompt import PromptHooks

from ... import models
from .test_attach import FAMILIES, METHODS

PAIRS = [("prefix", "adept"), ("apt", "prefix-mlp"), ("prompt_tuning", "llama-adapter")]


def with_two(family: str, pair: tuple[str, str]) -> tuple[Any, dict[str, Tensor]]:
    """Return a model with the adapters "a" and "b", and the logits of each."""
    model, inputs, logits = FAMILIES[family](), models.batch("right"), {}
    for name, method, std in (("a", pair[0], 0.3), ("b", pair[1], 0.4)):
        assert fastprefix.attach(model, METHODS[method](), name=name) is model
        models.randomize(model, std)
        logits[name] = model(**inputs).logits.detach()
    return model, logits


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_at_a_time(family: str, pair: tuple[str, str]) -> None:
    """Each adapter runs as if it were alone, with its own head and parameters. Without one, the base runs."""
    base, inputs = FAMILIES[family](), models.batch("right")
    plain = base(**inputs).logits
    model, logits = with_two(family, pair)
    for name in ("a", "b", "b", "a"):
        fastprefix.set_adapter(model, name)
        assert torch.equal(model(**inputs).logits, logits[name])
        with fastprefix.disable_adapter(model):
            assert torch.equal(model(**inputs).logits, plain)
            assert not trainable(model)
        assert torch.equal(model(**inputs).logits, logits[name])
        method = {f"fastprefix.{key}" for key, _ in get_method(model).named_parameters()}
        assert trainable(model) == method | ({"classifier.weight", "classifier.bias"} & set(base.state_dict()))
    assert fastprefix.detach(model) is model
    state = base.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("method", ["prefix", "adept"])
def test_what_is_configured_meanwhile_holds_after_detach(method: str) -> None:
    model = models.decoder()
    config, own = model.config, model.config._attn_implementation
    fastprefix.attach(model, METHODS[method]())
    model.config.use_cache = False
    with fastprefix.disable_adapter(model):
        assert not model.config.use_cache
        assert model.config._attn_implementation == own
    fastprefix.attach(model, METHODS[method](), name="b")
    assert not model.config.use_cache
    assert fastprefix.detach(model).config is config
    assert not config.use_cache
    assert config._attn_implementation == own


def test_a_model_that_gained_a_parameter_is_detached() -> None:
    model = fastprefix.attach(models.encoder(), METHODS["prefix"]())
    model.extra = torch.nn.Linear(2, 2)
    assert not any(name.startswith("fastprefix") for name, _ in fastprefix.detach(model).named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", ["prefix", "apt", "adept"])
def test_another_attention_on_an_attached_model_is_noticed(method: str) -> None:
    model, inputs = fastprefix.attach(models.decoder(), METHODS[method]()), models.batch()
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="`set_attn_implementation` must not"):
        model(**inputs)
    fastprefix.detach(model)
    model(**inputs)


def test_one_is_taken_off() -> None:
    model, logits = with_two("encoder", PAIRS[0])
    inputs = models.batch("right")
    fastprefix.detach(model, "a")  # not the one in use
    assert torch.equal(model(**inputs).logits, logits["b"])
    fastprefix.attach(model, METHODS["apt"](), name="a")
    fastprefix.detach(model, "a")  # the one in use
    assert torch.equal(model(**inputs).logits, models.encoder()(**inputs).logits)
    with pytest.raises(ValueError, match="none of its adapters in use, which are 'b'"):
        fastprefix.save_adapter(model, "nowhere")
    fastprefix.set_adapter(model, "b")
    assert torch.equal(model(**inputs).logits, logits["b"])
    fastprefix.detach(model, "b")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("family", "method"), [("decoder", "prefix-mlp"), ("decoder", "adept"), ("encoder", "adept")])
def test_a_merged_one_is_taken_off_and_put_back(family: str, method: str) -> None:
    base, inputs = FAMILIES[family](), models.batch("right")
    model = fastprefix.attach(FAMILIES[family](), METHODS[method](), name="merged")
    models.randomize(model)
    merged = fastprefix.merge(model)(**inputs).logits
    with fastprefix.disable_adapter(model):
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(model(**inputs).logits, merged)
    fastprefix.attach(model, METHODS["apt"](), name="other")
    models.randomize(model)
    other = model(**inputs).logits
    assert torch.equal(fastprefix.set_adapter(model, "merged")(**inputs).logits, merged)
    assert not trainable(model)
    assert torch.equal(fastprefix.set_adapter(model, "other")(**inputs).logits, other)
    assert trainable(model)
    assert torch.equal(fastprefix.detach(model)(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["prefix-mlp", "apt", "adept"])
def test_the_base_model_runs_between_forward_and_backward(method: str, checkpointing: bool) -> None:
    """A loss that keeps a policy near its base model runs both."""
    inputs, gradients = models.batch("right"), []
    for compares in (False, True):
        model = fastprefix.attach(models.encoder(), METHODS[method]()).train()
        models.randomize(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits = model(**inputs).logits
        if compares:
            with fastprefix.disable_adapter(model), torch.no_grad():
                model(**inputs)
        logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("name", [None, "first"])
def test_detached_while_disabled(name: str | None) -> None:
    model = models.decoder()
    expected = model(**models.batch()).logits
    for each in ("second", "first"):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(4), name=each)
    with fastprefix.disable_adapter(model):
        fastprefix.detach(model, name)
    torch.testing.assert_close(model(**models.batch()).logits, expected, rtol=0, atol=0)
    if name is not None:
        fastprefix.detach(fastprefix.set_adapter(model, "second"))
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(4))


def test_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model, logits = with_two("encoder", PAIRS[1])
    inputs = models.batch("right")
    fastprefix.save_adapter(model, tmp_path / "a", name="a")
    fastprefix.save_adapter(model, tmp_path / "b")
    assert torch.equal(model(**inputs).logits, logits["b"])
    other = models.encoder()
    for name in ("a", "b"):
        fastprefix.load_adapter(other, tmp_path / name, name=name)
    for name in ("b", "a"):
        assert torch.equal(fastprefix.set_adapter(other, name)(**inputs).logits, logits[name])


@pytest.mark.parametrize("method", ["prefix-mlp", "apt", "adept", "llama-adapter"])
def test_training_resumes_from_a_saved_adapter(method: str, tmp_path: Path) -> None:
    """Interrupted training ends with the same parameters and optimizer state."""
    inputs, labels = models.batch("right"), torch.tensor([0, 1, 1])

    def train(model: Any, steps: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=0.01, prompt_lr=0.1))
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
        return optimizer.state_dict()

    torch.manual_seed(3)
    model = fastprefix.attach(models.encoder(), METHODS[method]())
    state = train(model, 3)
    fastprefix.save_adapter(model, tmp_path)
    torch.save(state, tmp_path / "optimizer.pt")
    train(model, 3, state)
    resumed = fastprefix.load_adapter(models.encoder(), tmp_path)
    train(resumed, 3, torch.load(tmp_path / "optimizer.pt"))
    expected = dict(model.named_parameters())
    assert trainable(resumed) == trainable(model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in resumed.named_parameters())


def test_copies_have_their_own() -> None:
    model, logits = with_two("decoder", PAIRS[0])
    inputs, other = models.batch("right"), copy.deepcopy(model)
    fastprefix.set_adapter(other, "a")
    models.randomize(other, 1.0)
    assert torch.equal(model(**inputs).logits, logits["b"])
    assert torch.equal(fastprefix.set_adapter(model, "a")(**inputs).logits, logits["a"])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            lambda model: fastprefix.attach(model, METHODS["apt"](), name="a"),
            "an adapter named 'a' is attached already",
        ),
        (lambda model: fastprefix.attach(model, fastprefix.APTConfig(3, pooling="mean"), name="c"), "pooling"),
        (lambda model: fastprefix.set_adapter(model, "c"), "`name` must be one of 'a', 'b', but is 'c'"),
        (lambda model: fastprefix.detach(model, "c"), "`name` must be one of 'a', 'b', but is 'c'"),
        (
            lambda model: fastprefix.save_adapter(model, "nowhere", name="c"),
            "`name` must be one of 'a', 'b', but is 'c'",
        ),
    ],
)
def test_errors_leave_the_one_in_use(function: Callable[[Any], Any], says: str) -> None:
    model, logits = with_two("decoder", PAIRS[0])
    with pytest.raises(ValueError, match=says):
        function(model)
    assert torch.equal(model(**models.batch("right")).logits, logits["b"])


def test_an_adapter_that_does_not_fit_leaves_the_one_in_use(tmp_path: Path) -> None:
    other = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(5, modules_to_save=["lm_head"]))
    fastprefix.save_adapter(other, tmp_path)
    model, _ = with_two("decoder", PAIRS[0])
    model.lm_head = torch.nn.Linear(models.WIDTH, 7, bias=False).double()
    expected = model(**models.batch()).logits
    with pytest.raises(ValueError, match=r"modules_to_save\.lm_head\.weight must be"):
        fastprefix.load_adapter(model, tmp_path, name="c")
    assert torch.equal(model(**models.batch()).logits, expected)


PLACES: dict[str, tuple[object, str]] = {
    "prefix": (PrefixHooks, "install"),
    "prompt": (PromptHooks, "install"),
    "attention": (Implementation, "_switch"),
    "configuration": (switching, "_record_configuration"),
    "options": (Adapter, "mark"),
    "routing": (Routing, "install"),
    "values": (saving, "fill"),
    "weights": (adapter, "_fit_shape"),
}


def describe(model: Any) -> list[Any]:
    """Return the state of a model that an attached adapter changes."""
    return [
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(name, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        [id(config) for config in switching.list_configurations(model)],
        [config._attn_implementation for config in switching.list_configurations(model)],
        sorted(vars(model.config)),
    ]


FAILING = [
    *(("prefix-mlp", place) for place in ("prefix", "attention", "configuration", "options", "routing")),
    *(("prompt_tuning", place) for place in ("prompt", "attention")),
    *(("adept-textbook", place) for place in ("prompt", "options")),
    ("multitask", "prompt"),
]
CONFIGS: dict[str, Callable[[], Any]] = {
    **METHODS,
    "adept-textbook": lambda: fastprefix.ADePTConfig(3, bottleneck_dim=3, shared_prompt=False),
    "multitask": lambda: fastprefix.MultitaskPromptConfig(3, num_tasks=2),
}


@pytest.mark.parametrize(("method", "place"), FAILING)
def test_attaching_fails_and_changes_nothing(method: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, inputs = models.encoder(), models.encoder(), models.batch("right")
    if method != "adept-textbook":
        model, plain = models.decoder(), models.decoder()
    before = describe(model)
    with monkeypatch.context() as patch:
        models.fail_once(patch, *PLACES[place])
        with pytest.raises(models.InjectedError):
            fastprefix.attach(model, CONFIGS[method](), check=False)
    assert describe(model) == before
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    fastprefix.attach(model, CONFIGS[method](), check=False)


ACTIONS: dict[str, Callable[[Any, Path], Any]] = {
    "attach": lambda model, folder: fastprefix.attach(model, METHODS["prefix"](), name="c", check=False),
    "load_adapter": lambda model, folder: fastprefix.load_adapter(model, folder, name="c"),
    "set_adapter": lambda model, folder: fastprefix.set_adapter(model, "a"),
    "disable_adapter": lambda model, folder: fastprefix.disable_adapter(model).__enter__(),
}


@pytest.mark.parametrize(
    ("action", "place", "number"),
    [
        # The first calls are for the adapter in use, which is disabled and enabled again.
        *((action, place, 2) for action in ("attach", "load_adapter") for place in ("prefix", "options")),
        *((action, "routing", 3) for action in ("attach", "load_adapter")),
        *(("set_adapter", place, 1) for place in ("prefix", "options", "routing")),
        ("load_adapter", "values", 1),
        ("disable_adapter", "routing", 1),
        # A head has a weight and a bias. Those of the base come first, then those of the other adapter.
        *(("set_adapter", "weights", number) for number in (1, 2, 3, 4)),
        *(("disable_adapter", "weights", number) for number in (1, 2)),
    ],
)
def test_an_unexpected_error_leaves_the_one_in_use(
    action: str, place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, logits = with_two("encoder", ("prefix", "apt"))
    fastprefix.save_adapter(model, tmp_path, name="a")
    before = describe(model)
    with monkeypatch.context() as patch:
        models.fail_once(patch, *PLACES[place], number)
        with pytest.raises(models.InjectedError):
            ACTIONS[action](model, tmp_path)
    assert describe(model) == before
    assert torch.equal(model(**models.batch("right")).logits, logits["b"])
    fastprefix.set_adapter(model, "a")
    assert torch.equal(model(**models.batch("right")).logits, logits["a"])


def test_nothing_attached() -> None:
    with pytest.raises(ValueError, match="method attached"):
        fastprefix.set_adapter(models.decoder(), "a")
    with pytest.raises(ValueError, match="method attached"), fastprefix.disable_adapter(models.decoder()):
        pass


def test_an_adapter_in_use_with_other_labels_does_not_refuse_another(tmp_path: Path) -> None:
    orders = {"a": ["negative", "positive"], "b": ["positive", "negative"]}
    for name, labels in orders.items():
        model = models.encoder()
        model.config.id2label = dict(enumerate(labels))
        fastprefix.save_adapter(fastprefix.attach(model, METHODS["prefix"](), check=False), tmp_path / name)
    model = models.encoder()
    for name in orders:
        fastprefix.load_adapter(model, tmp_path / name, name=name)
    for name, labels in orders.items():
        fastprefix.set_adapter(model, name)
        assert list((model.config.id2label or {}).values()) == labels
    fastprefix.detach(model)
    assert list((model.config.id2label or {}).values()) == ["LABEL_0", "LABEL_1"]
