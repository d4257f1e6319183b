"""Test composition of several prefixes to one adapter, and replacement of prefixes in place."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, Trainer, TrainingArguments

import fastprefix
from fastprefix.integrations.transformers.attachment import get_attachment
from fastprefix.integrations.transformers.models import attention

from .... import models
from .test_cartridges import assert_close, make_cache, prefixes, write_cartridge

SHIFT: dict[str, Any] = {"prefix_position": "shift"}
PARTS: dict[str, Callable[[], Any]] = {
    "a": lambda: fastprefix.PrefixTuningConfig(4, num_frozen_tokens=1, **SHIFT),
    "b": lambda: fastprefix.PrefixTuningConfig(3, num_frozen_tokens=2, train="values", **SHIFT),
    "c": lambda: fastprefix.PrefixTuningConfig(5, key_bias=True, **SHIFT),
    "mlp": lambda: fastprefix.PrefixTuningConfig(3, reparameterization="mlp", hidden_dim=8, **SHIFT),
    "gates": lambda: fastprefix.APTConfig(4, token_gate=False, num_frozen_tokens=1, **SHIFT),
    "residual": lambda: fastprefix.ResidualPrefixConfig(3, bottleneck_dim=4, hidden_dim=8, **SHIFT),
}


def attached(*names: str, base: Any = None) -> Any:
    """Return a decoder with adapters of these names, with random parameters."""
    model = models.decoder() if base is None else base
    for seed, name in enumerate(names):
        fastprefix.attach(model, PARTS[name](), name=name, check=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.fastprefix.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def concatenate_caches(model: Any, names: tuple[str, ...], rows: int) -> DynamicCache:
    """Return the concatenated caches of adapters."""
    caches = []
    for name in names:
        fastprefix.set_adapter(model, name)
        caches.append(fastprefix.export_cache(model, rows))
    cache = DynamicCache()
    for layer in range(models.LAYERS):
        stored = [each.layers[layer] for each in caches]
        cache.update(torch.cat([s.keys for s in stored], 2), torch.cat([s.values for s in stored], 2), layer)
    return cache


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a", "mlp"), ("gates", "residual")], ids=str)
def test_it_is_the_concatenation_of_the_caches(names: tuple[str, ...]) -> None:
    model, inputs = attached(*names), models.batch("right")
    cache = concatenate_caches(model, names, 3)
    length = cache.get_seq_length()
    mask = torch.cat([torch.ones(3, length, dtype=torch.long), inputs["attention_mask"]], dim=1)
    with fastprefix.disable_adapter(model), torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    assert fastprefix.compose(model, list(names), name="all") is model
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    exported = fastprefix.export_cache(model)
    again = concatenate_caches(model, names, 1)
    for mine, other in zip(exported.layers, again.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys)
    fastprefix.set_adapter(model, "all")
    assert torch.equal(model(**inputs).logits, logits)
    torch.testing.assert_close(fastprefix.merge(model)(**inputs).logits, logits, rtol=1e-12, atol=1e-12)


def gradients(model: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**models.batch("left"), **options).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("names", [("a", "b"), ("c", "a"), ("residual", "gates")], ids=str)
def test_gradients_are_those_of_one_prefix(names: tuple[str, ...], checkpointing: bool | None) -> None:
    model = fastprefix.compose(attached(*names), list(names), name="all").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    found = gradients(model)
    method = model.fastprefix
    pairs = method.prefixes()
    plain = fastprefix.attach(
        models.decoder(),
        fastprefix.PrefixTuningConfig(pairs[0][0].shape[1], key_bias="c" in names, **SHIFT),
    )
    plain.fastprefix.set_prefixes(pairs)
    if "c" in names:
        plain.fastprefix.set_key_biases([method.key_bias(layer) for layer in range(models.LAYERS)])
    gradients(plain.train())
    wanted: list[Tensor] = []
    for layer in range(models.LAYERS):
        outputs, grads = [], []
        for tensor, parameters in zip(
            pairs[layer], (plain.fastprefix.prefix.keys, plain.fastprefix.prefix.values), strict=True
        ):
            outputs.append(tensor)
            grads.append(parameters[layer].grad)
        if "c" in names:
            outputs.append(method.key_bias(layer))
            grads.append(plain.fastprefix.key_biases[layer].grad)
        wanted.append(sum((o * g).sum() for o, g in zip(outputs, grads, strict=True)))  # type: ignore[arg-type]
    model.zero_grad()
    torch.stack(wanted).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def trained_parts(model: Any) -> set[str]:
    return {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}


def test_parts_that_are_not_trained_are_frozen_while_it_is_in_use() -> None:
    model = attached("a", "b", "c")
    alone = fastprefix.count_parameters(fastprefix.set_adapter(model, "a")).trainable
    fastprefix.compose(model, ["a", "b", "c"], name="abc", trainable=["c"])
    assert trained_parts(model) == {"2"}
    before = {name: p.detach().clone() for name, p in model.fastprefix.named_parameters()}
    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=0.1, weight_decay=0.5))
    model(**models.batch()).logits.sum().backward()
    optimizer.step()
    changed = {
        name.split(".")[1] for name, p in model.fastprefix.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {"2"}
    fastprefix.set_adapter(model, "a")
    assert fastprefix.count_parameters(model).trainable == alone
    with fastprefix.disable_adapter(model):
        pass
    fastprefix.set_adapter(model, "abc")
    assert trained_parts(model) == {"2"}
    fastprefix.detach(model, "abc")
    fastprefix.set_adapter(model, "b")
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"values"}


def test_it_trains_the_parameters_of_its_parts() -> None:
    model = fastprefix.compose(attached("a", "b"), ["a", "b"], name="ab", trainable=["b"])
    logits = model(**models.batch()).logits
    with torch.no_grad():
        fastprefix.set_adapter(model, "b").fastprefix.prefix.values[0].add_(1.0)
    fastprefix.set_adapter(model, "ab")
    assert not torch.equal(model(**models.batch()).logits, logits)


@pytest.mark.parametrize(
    ("names", "trainable", "frozen"),
    [
        (("a", "b"), None, 1),
        (("a", "b"), ["b"], 4 + 2),
        (("a", "b"), ["a"], 1),
        (("a", "b"), [], 7),
        (("a", "gates"), ["gates"], 4),
    ],
    ids=str,
)
def test_no_work_is_done_for_frozen_tokens_in_front(
    names: tuple[str, ...], trainable: list[str] | None, frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    former = attention.prefix_attention

    def watch(*args: Any, **options: Any) -> Tensor:
        seen.append(options["frozen_prefix"])
        return former(*args, **options)

    model = fastprefix.compose(attached(*names), list(names), name="all", trainable=trainable)
    monkeypatch.setattr(attention, "prefix_attention", watch)
    model(**models.batch())
    assert seen == [frozen] * models.LAYERS


@pytest.mark.parametrize("how", ["saved", "whole", "copied", "pickled", "peft"])
def test_saved_loaded_and_copied(how: str, tmp_path: Path) -> None:
    model = fastprefix.compose(attached("a", "b"), ["a", "b"], name="ab", trainable=["b"])
    expected = model(**models.batch()).logits
    if how == "copied":
        again = copy.deepcopy(model)
    elif how == "pickled":
        again = pickle.loads(pickle.dumps(model))
    else:
        if how == "whole":
            model.save_pretrained(tmp_path)
        else:
            fastprefix.save_adapter(model, tmp_path, format="peft" if how == "peft" else "fastprefix")
        again = fastprefix.load_adapter(models.decoder(), tmp_path)
    tolerance = 1e-5 if how == "peft" else 0.0
    torch.testing.assert_close(again(**models.batch()).logits, expected, rtol=tolerance, atol=tolerance)
    if how == "peft":
        assert get_attachment(again).config.num_frozen_tokens == 6
    else:
        assert trained_parts(again) == {"1"}
        again(**models.batch()).logits.sum().backward()


def test_a_composition_can_be_a_part() -> None:
    model = attached("a", "b", "c")
    fastprefix.compose(model, ["a", "b", "c"], name="flat")
    expected = model(**models.batch()).logits
    fastprefix.compose(model, ["a", "b"], name="ab", trainable=["b"])
    fastprefix.compose(model, ["ab", "c"], name="nested")
    assert torch.equal(model(**models.batch()).logits, expected)
    assert trained_parts(model) == {"1", "2"}


def test_biases_of_frozen_parts_get_no_gradient() -> None:
    """Nor do their keys and values, even while other code has made them trainable."""
    model = attached("c", "a")
    fastprefix.compose(model, ["c", "a"], name="ca", trainable=["a"])
    model.fastprefix.requires_grad_(True)
    model(**models.batch()).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.fastprefix.parts[0].parameters())
    assert all(key.grad is not None for key in model.fastprefix.parts[1].prefix.keys)


def test_generation() -> None:
    model = attached("a", "b")
    cache = concatenate_caches(model, ("a", "b"), 1)
    fastprefix.compose(model, ["a", "b"], name="ab")
    ids = models.batch()["input_ids"][:1]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    with fastprefix.disable_adapter(model), torch.no_grad():
        for _ in range(4):
            logits = model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"names": ["a", "z"]}, "`name` must be one of"),
    "a string": ({"names": "a"}, "`names` must be a list"),
    "none": ({"names": []}, "`names` must be a list"),
    "twice": ({"names": ["a", "a"]}, "`names` must be a list of one or more different"),
    "twice inside": ({"names": ["a", "ab"]}, "each prefix once, but 'a' and 'ab' share a prefix"),
    "taken": ({"names": ["a", "b"], "name": "a"}, "`name` must be unique"),
    "not a part": ({"names": ["a"], "trainable": ["b"]}, "`trainable` must contain only names"),
    "gates": ({"names": ["a", "apt"]}, "gates of APT depend on the input"),
    "a prompt": ({"names": ["a", "prompt"]}, "'prompt' does not: it is a PromptTuning"),
    "an own softmax": ({"names": ["a", "llama"]}, "'llama' does not: it is a LlamaAdapter"),
    "a head": ({"names": ["a", "head"]}, "it trains lm_head"),
    "positions": ({"names": ["a", "none"]}, "`prefix_position` must be the same"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_part_is_refused(case: str) -> None:
    model = attached("a", "b")
    others = {
        "apt": fastprefix.APTConfig(3, **SHIFT),
        "prompt": fastprefix.PromptTuningConfig(3),
        "llama": fastprefix.LlamaAdapterConfig(3),
        "head": fastprefix.PrefixTuningConfig(3, modules_to_save=["lm_head"], **SHIFT),
        "none": fastprefix.PrefixTuningConfig(3),
    }
    options, message = WRONG[case]
    for name in others.keys() & set(options["names"]):
        fastprefix.attach(model, others[name], name=name, check=False)
    if "ab" in options["names"]:
        fastprefix.compose(model, ["a", "b"], name="ab")
    active = get_attachment(model).active
    with pytest.raises(ValueError, match=message):
        fastprefix.compose(model, **{"name": "all", **options})
    assert get_attachment(model).active == active
    assert "all" not in get_attachment(model).adapters


def test_it_cannot_be_attached_as_a_method() -> None:
    from fastprefix.methods import CompositionConfig

    config = CompositionConfig(4, parts=[PARTS["a"]().to_dict()], trainable=[True])
    with pytest.raises(ValueError, match=r"call fastprefix\.compose"):
        fastprefix.attach(models.decoder(), config)


# Swapping


def state_of(seed: int, length: int) -> fastprefix.PrefixState:
    return fastprefix.PrefixState([(s.keys[0], s.values[0]) for s in make_cache(seed, length).layers])


@pytest.mark.parametrize("lengths", [(6,), (1, 5), (2, 4), (3, 3), (1, 1, 4)], ids=str)
def test_prefixes_are_swapped_in_place(lengths: tuple[int, ...]) -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(6, num_frozen_tokens=2, **SHIFT))
    places = [p.data_ptr() for p in model.fastprefix.parameters()]
    states = [state_of(seed, length) for seed, length in enumerate(lengths)]
    fastprefix.swap_prefix(model, states if len(states) > 1 else states[0])
    expected = [
        (torch.cat([s.pairs[i][0] for s in states], 1), torch.cat([s.pairs[i][1] for s in states], 1))
        for i in range(models.LAYERS)
    ]
    assert_close(prefixes(model), expected)
    assert places == [p.data_ptr() for p in model.fastprefix.parameters()]


def test_halves_of_a_prefix_are_exchanged() -> None:
    """Sources that are views of the prefix are read before it is overwritten."""
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(4, **SHIFT), check=False)
    fastprefix.swap_prefix(model, state_of(0, 4))
    pairs = model.fastprefix.prefixes()
    halves = [
        fastprefix.PrefixState([(k[:, part].detach(), v[:, part].detach()) for k, v in pairs])
        for part in (slice(2, 4), slice(2))
    ]
    fastprefix.swap_prefix(model, halves)
    assert_close(prefixes(model), [(k.roll(2, 1), v.roll(2, 1)) for k, v in state_of(0, 4).pairs])


def test_a_prefix_that_moves_tokens_further_is_not_swapped_in(tmp_path: Path) -> None:
    config = fastprefix.PrefixTuningConfig(4, **SHIFT, position_shift=40)
    fastprefix.save_adapter(fastprefix.attach(models.decoder(), config, check=False), tmp_path)
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(4, **SHIFT), check=False)
    with pytest.raises(ValueError, match=r"move the tokens by 4 positions .*, but move them by \[40\]"):
        fastprefix.swap_prefix(model, tmp_path)
    same = fastprefix.attach(models.decoder(), config, check=False)
    fastprefix.swap_prefix(same, tmp_path)


def test_an_average_is_swapped_in(tmp_path: Path) -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(4, **SHIFT), check=False)
    given = [state_of(seed, 4) for seed in range(2)]
    for index, state in enumerate(given):
        fastprefix.swap_prefix(model, state)
        fastprefix.save_adapter(model, tmp_path / str(index))
    first, second = (fastprefix.read_prefix(model, tmp_path / str(index)).pairs for index in range(2))
    pairs = [((ka + kb) / 2, (va + vb) / 2) for (ka, va), (kb, vb) in zip(first, second, strict=True)]
    fastprefix.swap_prefix(model, fastprefix.PrefixState(pairs))
    layers = zip(given[0].pairs, given[1].pairs, strict=True)
    assert_close(prefixes(model), [(0.5 * (a[0] + b[0]), 0.5 * (a[1] + b[1])) for a, b in layers])


@pytest.mark.parametrize("kind", ["ours", "cartridge", "peft", "whole"])
def test_prefixes_are_swapped_in_from_files(kind: str, tmp_path: Path) -> None:
    source = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(6, num_frozen_tokens=2, **SHIFT))
    if kind == "cartridge":
        write_cartridge(tmp_path / "cache_last.pt")
        fastprefix.detach(source)
        fastprefix.load_adapter(source, tmp_path)
    elif kind == "whole":
        source.save_pretrained(tmp_path)
    else:
        fastprefix.save_adapter(source, tmp_path, format="peft" if kind == "peft" else "fastprefix")
    model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(6, **SHIFT))
    fastprefix.swap_prefix(model, tmp_path)
    torch.testing.assert_close(prefixes(model), prefixes(source), rtol=1e-6, atol=1e-6)
    state = fastprefix.read_prefix(model, tmp_path)
    assert (state.length, state.prefix_position) == (6, "shift")
    assert_close(state.pairs, prefixes(model))


def test_biases_are_swapped_too(tmp_path: Path) -> None:
    model = attached("c", "a")
    fastprefix.save_adapter(model, tmp_path, name="c")
    other = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(5 + 4, key_bias=True, **SHIFT))
    models.randomize(other)
    fastprefix.swap_prefix(other, [fastprefix.read_prefix(model, tmp_path), state_of(1, 4)])
    fastprefix.set_adapter(model, "c")
    for mine, theirs in zip(other.fastprefix.key_biases, model.fastprefix.key_biases, strict=True):
        assert torch.equal(mine[:, :5], theirs)
        assert not mine[:, 5:].any()
    plain = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(5, **SHIFT))
    with pytest.raises(ValueError, match="no key biases"):
        fastprefix.swap_prefix(plain, tmp_path)


@pytest.mark.parametrize(
    ("config", "sources", "message"),
    [
        (PARTS["a"](), state_of(0, 5), "must have 4 tokens in total, as the prefix does, but have"),
        (PARTS["mlp"](), state_of(0, 3), "must be an adapter with free keys and values"),
        (fastprefix.PromptTuningConfig(3), state_of(0, 3), "must be an adapter with free keys and values"),
        (
            PARTS["a"](),
            fastprefix.PrefixState([(torch.zeros(4, 4, 8), torch.zeros(4, 4, 8))] * 2),
            r"must have keys and values \[\(\(2, 4, 8\), \(2, 4, 8\)\), .* but has \[\(\(4, 4, 8\)",
        ),
        (PARTS["a"](), fastprefix.PrefixState([]), r"must have keys and values .* but has \[\]"),
        (PARTS["a"](), fastprefix.PrefixState([(torch.zeros(4), torch.zeros(4))] * 2), "must have keys and values"),
        (
            PARTS["a"](),
            fastprefix.PrefixState([*state_of(0, 4).pairs[:1], *state_of(0, 3).pairs[:1]]),
            r"must have keys and values .* \(2, 3, 8\)",
        ),
        (
            PARTS["c"](),
            fastprefix.PrefixState(state_of(0, 5).pairs, [torch.ones(2, 5)]),
            r"must have key biases \[\(2, 5\), \(2, 5\)\] in its layers, but has \[\(2, 5\)\]",
        ),
        (
            PARTS["c"](),
            fastprefix.PrefixState(state_of(0, 5).pairs, [torch.ones(2, 5), torch.ones(2, 1)]),
            "must have key biases",
        ),
        (
            PARTS["a"](),
            fastprefix.PrefixState(state_of(0, 4).pairs, prefix_position="none"),
            "must have prefix_position='shift'",
        ),
    ],
)
def test_what_does_not_fit_is_not_swapped(config: Any, sources: Any, message: str) -> None:
    model = fastprefix.attach(models.decoder(), config, check=False)
    before = copy.deepcopy(model.fastprefix.state_dict())
    with pytest.raises(ValueError, match=message):
        fastprefix.swap_prefix(model, sources)
    assert all(torch.equal(value, before[name]) for name, value in model.fastprefix.state_dict().items())


def test_only_free_prefixes_are_read(tmp_path: Path) -> None:
    model = attached("mlp")
    fastprefix.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"must contain a prefix of free keys and values.*prefix\.project_in"):
        fastprefix.read_prefix(model, tmp_path)


def test_training_among_distractors_compiles_once() -> None:
    """Frozen prefixes precede the trained prefix and change in every step."""
    model = attached("a", "b").train()
    fastprefix.compose(model, ["a", "b"], name="ab", trainable=["b"])
    compiled: Any = torch.compile(model, backend="aot_eager")
    inputs = models.batch()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        for step in range(2):  # the first calls of all
            fastprefix.swap_prefix(model, state_of(step, 4), name="a")
            compiled(**inputs).logits.sum().backward()
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted > 0
    for step in range(3):
        model.zero_grad()
        fastprefix.swap_prefix(model, state_of(10 + step, 4), name="a")
        logits = compiled(**inputs).logits
        logits.sum().backward()
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-10, atol=1e-10)
        assert all(p.grad is None for p in model.fastprefix.parts[0].parameters())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_trainer_with_distractors(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Distract(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            fastprefix.swap_prefix(kwargs["model"], state_of(state.global_step, 4), name="a")

    model = attached("a", "b", base=models.decoder().float())
    fastprefix.compose(model, ["a", "b"], name="ab", trainable=["b"])
    before = prefixes(model)
    rows = [{"input_ids": row, "labels": row} for row in models.batch()["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[Distract()]).train()  # type: ignore[arg-type]
    after = prefixes(model)
    expected = state_of(1, 4).pairs
    for i in range(models.LAYERS):
        assert torch.equal(after[i][1][:, :4], expected[i][1].float())
        assert torch.equal(after[i][0][:, 4:], before[i][0][:, 4:])  # keys of "b" are not trained
        assert not torch.equal(after[i][1][:, 6:], before[i][1][:, 6:])


def test_views_of_the_prefix_are_swapped_with_their_biases() -> None:
    config = fastprefix.PrefixTuningConfig(4, key_bias=True, **SHIFT)
    model: Any = fastprefix.attach(models.decoder(), config, check=False)
    method = model.fastprefix
    with torch.no_grad():
        for bias in method.key_biases:
            bias.copy_(torch.arange(4.0).expand_as(bias))

    def read(tokens: slice) -> fastprefix.PrefixState:
        pairs = [(key[:, tokens].detach(), value[:, tokens].detach()) for key, value in method.prefixes()]
        return fastprefix.PrefixState(pairs, [bias.detach()[:, tokens] for bias in method.key_biases])

    fastprefix.swap_prefix(model, [read(slice(2, 4)), read(slice(0, 2))])
    for bias in method.key_biases:
        assert torch.equal(bias, torch.tensor([2.0, 3.0, 0.0, 1.0]).expand_as(bias))


def test_rates_and_gates_of_a_composition() -> None:
    """The rates are the lowest of the trained parts. Gates of frozen parts are in no group."""
    model = models.decoder()
    cartridge = fastprefix.CartridgeConfig(3, init="cache")
    fastprefix.attach(model, cartridge, name="a", past_key_values=make_cache(length=3), check=False)
    fastprefix.attach(model, fastprefix.APTConfig(3, token_gate=False, **SHIFT), name="b", check=False)
    fastprefix.compose(model, ["a", "b"], name="ab", trainable=["a"])
    assert model.fastprefix.config.learning_rates.rest == 2e-2
    groups = fastprefix.parameter_groups(model, gate_lr=0.1)
    assert [group["lr"] for group in groups] == [2e-2]
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


@pytest.mark.parametrize("lost", ["prefix.values.1", "prefix.frozen_keys.0", "key_biases.1", "prefix.keys"])
def test_damaged_prefixes_are_not_read(lost: str, tmp_path: Path) -> None:
    config = fastprefix.PrefixTuningConfig(4, num_frozen_tokens=2, key_bias=True, **SHIFT)
    fastprefix.save_adapter(fastprefix.attach(models.decoder(), config, check=False), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(lost)}
    save_file(kept, file, header)
    with pytest.raises(ValueError, match=r"contains a damaged prefix: "):
        fastprefix.read_prefix(models.decoder(), tmp_path)
