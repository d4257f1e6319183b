"""Test prefix tokens that are not trained (``num_frozen_tokens``), also in PEFT's cartridges."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastprefix
from fastprefix.integrations.transformers.attachment import get_attachment

from .... import models

LENGTH, FROZEN = 5, 2


def attached(config: Any) -> Any:
    model = fastprefix.attach(models.decoder(), config)
    models.randomize(model)
    return model


def prefixes(model: Any) -> list[tuple[Tensor, Tensor]]:
    return [(key.detach().clone(), value.detach().clone()) for key, value in model.fastprefix.prefixes()]


@pytest.mark.parametrize("config", [fastprefix.PrefixTuningConfig, fastprefix.APTConfig])
def test_steps_and_weight_decay_leave_frozen_tokens_alone(config: Any) -> None:
    model = attached(config(LENGTH, num_frozen_tokens=FROZEN))
    before = prefixes(model)
    plain = fastprefix.attach(models.decoder(), config(LENGTH))
    frozen = 2 * models.LAYERS * models.KV_HEADS * FROZEN * (models.WIDTH // models.HEADS)
    counts = [fastprefix.count_parameters(each) for each in (plain, model)]
    assert counts[0].trainable - counts[1].trainable == frozen
    assert counts[0].total == counts[1].total
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(**models.batch(), labels=models.batch()["input_ids"]).loss.backward()
        optimizer.step()
    for former, now in zip(before, prefixes(model), strict=True):
        for old, new in zip(former, now, strict=True):
            assert torch.equal(old[:, :FROZEN], new[:, :FROZEN])
            assert (old[:, FROZEN:] != new[:, FROZEN:]).all()


def test_values_and_gradients_are_those_of_a_prefix_without_frozen_tokens() -> None:
    model, plain = (attached(fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=n)) for n in (FROZEN, 0))
    plain.fastprefix.set_prefixes(prefixes(model))
    logits = [each(**models.batch("left")).logits for each in (model, plain)]
    assert torch.equal(*logits)
    for each in logits:
        each.square().sum().backward()
    for which in ("keys", "values"):
        pairs = zip(getattr(model.fastprefix.prefix, which), getattr(plain.fastprefix.prefix, which), strict=True)
        for mine, whole in pairs:
            torch.testing.assert_close(mine.grad, whole.grad[:, FROZEN:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", [{"init": "normal"}, {"init": "zero"}, {"init": "text", "init_text": "any"}])
def test_all_tokens_are_initialized(init: dict[str, Any]) -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, 7]}

    results = []
    for frozen in (0, FROZEN):
        torch.manual_seed(0)
        config = fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=frozen, **init)
        results.append(prefixes(fastprefix.attach(models.decoder(), config, tokenizer=tokenizer)))
    for plain, frozen in zip(*results, strict=True):
        assert all(map(torch.equal, plain, frozen))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_saved_and_loaded(tmp_path: Path, whole: bool, merged: bool) -> None:
    model = attached(fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=FROZEN))
    expected = model(**models.batch()).logits
    if whole:
        model.save_pretrained(tmp_path)
    else:
        if merged:
            fastprefix.merge(model)
        fastprefix.save_adapter(model, tmp_path)
    loaded = fastprefix.load_adapter(models.decoder(), tmp_path)
    assert torch.equal(loaded(**models.batch()).logits, expected)
    assert [key.shape[1] for key in loaded.fastprefix.prefix.frozen_keys] == [FROZEN] * models.LAYERS
    assert not any(p.requires_grad for p in loaded.fastprefix.prefix.frozen_values)


@pytest.mark.parametrize("frozen", [1, LENGTH - 1])
def test_cartridges_of_peft(tmp_path: Path, frozen: int) -> None:
    peft = pytest.importorskip("peft")
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_frozen_tokens=frozen)
    theirs = peft.get_peft_model(models.decoder(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastprefix.load_adapter(models.decoder(), tmp_path / "theirs")
    rows = theirs.prompt_encoder["default"].weight.detach()
    blocks = rows.view(LENGTH, 2 * models.LAYERS, models.KV_HEADS, -1).permute(1, 2, 0, 3)
    loaded = [tensor for pair in prefixes(ours) for tensor in pair]
    torch.testing.assert_close(torch.stack(loaded), blocks.to(loaded[0].dtype), rtol=0, atol=0)
    ours(**models.batch(), labels=models.batch()["input_ids"]).loss.backward()
    trained = {name: p.shape for name, p in ours.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * models.LAYERS
    assert {shape[1] for shape in trained.values()} == {LENGTH - frozen}

    fastprefix.save_adapter(ours, tmp_path / "ours", format="peft")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["num_frozen_tokens"] == frozen
    again = peft.PeftModel.from_pretrained(models.decoder(), tmp_path / "ours")
    encoder = again.prompt_encoder["default"]
    torch.testing.assert_close(encoder.weight.detach(), rows.to(encoder.weight.dtype), rtol=0, atol=0)
    assert encoder.frozen_embedding.shape[0] == frozen


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_frozen_tokens": 6}, ValueError),
        ({"num_frozen_tokens": -1}, ValueError),
        ({"num_frozen_tokens": True}, TypeError),
        ({"num_frozen_tokens": 1, "reparameterization": "mlp"}, ValueError),
    ],
)
def test_wrong_counts_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="`num_frozen_tokens` must be"):
        fastprefix.PrefixTuningConfig(LENGTH, **options)


def is_view(model: Any) -> bool:
    """Return whether all tokens are a view of the parameters, so that no call copies them."""
    places = {p.untyped_storage().data_ptr() for p in model.fastprefix.prefix.parameters()}
    found = {tensor.untyped_storage().data_ptr() for pair in model.fastprefix.prefixes() for tensor in pair}
    return found == places and len(places) == 2 * models.LAYERS


@pytest.mark.parametrize("change", ["attached", "converted", "copied", "pickled", "loaded", "stepped", "merged"])
def test_frozen_tokens_are_joined_without_a_copy(change: str, tmp_path: Path) -> None:
    model = attached(fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=FROZEN))
    expected = prefixes(model)
    if change == "converted":
        model.float()
        expected = [(key.float(), value.float()) for key, value in expected]
    elif change == "copied":
        former, model = model, copy.deepcopy(model)
        models.randomize(former)
    elif change == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif change == "loaded":
        state = model.state_dict()
        model = fastprefix.attach(models.decoder(), fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=FROZEN))
        model.load_state_dict(state)
        assert all(tensor.is_contiguous() for tensor in state.values())
    elif change == "stepped":
        model(**models.batch()).logits.sum().backward()
        torch.optim.SGD(fastprefix.parameter_groups(model, lr=0.1)).step()
        step = [p.grad for p in model.fastprefix.prefix.parameters() if p.grad is not None]
        assert len(step) == 2 * models.LAYERS
        expected = [
            tuple(torch.cat([t[:, :FROZEN], t[:, FROZEN:] - 0.1 * p.grad], 1) for t, p in zip(pair, own, strict=True))
            for pair, *own in zip(expected, model.fastprefix.prefix.keys, model.fastprefix.prefix.values, strict=True)
        ]  # type: ignore[misc]
    elif change == "merged":
        fastprefix.merge(model)
    assert is_view(model)
    torch.testing.assert_close(prefixes(model), expected, rtol=1e-15, atol=1e-15)


def test_memory_that_came_apart_is_concatenated() -> None:
    """Other code can replace ``data``, and a trace has no memory."""
    model = attached(fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=FROZEN))
    logits = model(**models.batch()).logits
    for parameter in model.fastprefix.prefix.keys:
        parameter.data = parameter.data.clone()
    assert not is_view(model)
    assert torch.equal(model(**models.batch()).logits, logits)
    model.to("cpu")
    assert not is_view(model) or torch.equal(model(**models.batch()).logits, logits)


def test_one_head_is_saved(tmp_path: Path) -> None:
    """With one head, frozen and trained tokens are contiguous parts of the same memory."""
    base = LlamaForCausalLM(LlamaConfig(**{**models.SIZES, "num_key_value_heads": 1}))
    state = copy.deepcopy(base.state_dict())
    model = fastprefix.attach(base, fastprefix.PrefixTuningConfig(LENGTH, num_frozen_tokens=FROZEN))
    fastprefix.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    for folder in ("adapter", "whole"):
        other: Any = LlamaForCausalLM(base.config)
        other.load_state_dict(state)
        loaded = fastprefix.load_adapter(other, tmp_path / folder)
        assert all(map(torch.equal, *(sum(prefixes(each), ()) for each in (loaded, model))))


def test_generated_tokens_use_the_prefix_of_the_call_before() -> None:
    """It is computed and cast once per sequence, and again after a parameter has changed."""
    config = fastprefix.PrefixTuningConfig(LENGTH, reparameterization="mlp", hidden_dim=8)
    model = fastprefix.attach(models.decoder(), config).bfloat16()
    model.fastprefix.float()
    ids = models.batch()["input_ids"]
    calls: list[int] = []
    model.fastprefix.prefix.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        places = []
        for _ in range(2):
            model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
            kept = get_attachment(model).hooks.kept  # type: ignore[attr-defined]
            places.append([pair[0].data_ptr() for pair in kept.casts.values()])
            assert {pair[0].dtype for pair in kept.casts.values()} == {torch.bfloat16}
        assert places[0] == places[1]
        assert len(calls) == 1
        before = model(input_ids=ids, use_cache=True)
        model.fastprefix.prefix.embedding.add_(1.0)
        changed = model(input_ids=ids[:, :1], past_key_values=before.past_key_values).logits
        again = model(input_ids=ids, use_cache=True)
        assert len(calls) == 4
        assert not torch.equal(again.logits, before.logits)
        assert changed.isfinite().all()
    model(input_ids=ids)
    assert get_attachment(model).hooks.kept is None  # type: ignore[attr-defined]
