"""Test SHIP on vision transformers: values and gradients against plain PyTorch, and options from training images."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

import fastprefix
from fastprefix.integrations.transformers.attachment import attach, get_method
from fastprefix.integrations.transformers.checking.conformance import check
from fastprefix.integrations.transformers.vision import features
from fastprefix.integrations.transformers.vision import visual_prompt as vision

from .... import models, vision_models
from ....vision_models import FAMILIES, LAYERS
from .test_visual_prompt import find_result, run

BANK = torch.randn(5, vision_models.WIDTH, generator=torch.Generator().manual_seed(3))
OPTIONS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "some layers": {"layers": [0, 2]},
    "the first layer": {"layers": [0]},
    "no attributes": {"layers": [0, 1], "num_attribute": 0},
    "no shared rows": {"layers": [0, 1], "num_shared": 0},
    "a bank": {"bank": BANK},
    "a bank, some layers": {"layers": [0, 1], "bank": BANK},
}


def configure(**options: Any) -> fastprefix.SHIPConfig:
    return fastprefix.SHIPConfig(3, **{"num_shared": 2, "num_attribute": 4, **options})


def attached(family: str = "vit", **options: Any) -> Any:
    model = fastprefix.attach(FAMILIES[family](), configure(**options), check=False)
    models.randomize(model)
    return model


def textbook(model: Any, method: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits and the loss of a ViT with prompt tokens in every image, computed row by row."""
    of, vit = method.config, model.vit
    state, rows, attention, loss = vit.embeddings(pixels), {}, None, None
    n = state.shape[1]
    for index, layer in enumerate(vit.layers):
        tokens = state[:, :n]
        given = {name: state[:, n:][:, at] for name, at in rows.items()}
        if index in method.entered:
            given = {"own": method.prompts[method.entered.index(index)].expand(len(state), -1, -1)}
            if index in method.attributed:
                attribute = method.attributes[method.attributed.index(index)].expand(len(state), -1, -1)
                if of.bank is not None and index > 0:
                    order = attention[:, 1:].argsort(dim=1, descending=True)[:, : of.num_attribute] + 1
                    top = torch.stack([each[places] for each, places in zip(tokens, order, strict=True)])
                    cosines = torch.cosine_similarity(top[:, :, None], method.bank[None, None], dim=-1)
                    attribute = 0.1 * cosines.softmax(-1) @ method.bank + 0.9 * attribute
                given["attribute"] = attribute
        given["shared"] = method.shared.expand(len(state), -1, -1)
        rows, start = {}, 0
        for name, value in given.items():
            rows[name] = slice(start, start := start + value.shape[1])
        together = torch.cat(list(given.values()), dim=1)
        state = torch.cat([tokens, together], dim=1)
        hidden, module = layer.layernorm_before(state), layer.attention
        projections = (module.q_proj, module.k_proj, module.v_proj)
        query, key, value = (p(hidden).unflatten(-1, (4, -1)).transpose(1, 2) for p in projections)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        apart = (
            scores[..., :n].softmax(-1) @ value[:, :, :n] * 0.9 + scores[..., n:].softmax(-1) @ value[:, :, n:] * 0.1
        )
        attention = scores[:, :, 0, :n].softmax(-1).mean(1)
        if index + 1 < len(vit.layers):
            output = torch.cat([apart[:, :, :n], value[:, :, n:]], dim=2)
        else:
            output = scores.softmax(-1) @ value
            order = scores[:, :, 0].softmax(-1).mean(1)[:, 1:n].argsort(dim=1, descending=True)[:, :10] + 1
            top = torch.stack([each[places] for each, places in zip(tokens, order, strict=True)])
            cosines = torch.cosine_similarity(together[:, :, None], top[:, None], dim=-1)
            loss = 0.5 * (1 - cosines).amin(-1).mean()
        state = state + module.o_proj(output.transpose(1, 2).flatten(2))
        state = state + layer.mlp(layer.layernorm_after(state))
    return model.classifier(vit.layernorm(state)[:, 0]), loss


@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients_are_the_textbooks(case: str, with_loss: bool) -> None:
    model = attached(**OPTIONS[case], matching_loss=with_loss)
    method, plain = get_method(model), vision_models.vit()
    plain.classifier.load_state_dict(model.classifier.state_dict())
    expected, loss = textbook(plain, method, vision_models.images())
    weights = torch.arange(expected.numel(), dtype=torch.float64).cos().view_as(expected)
    parameters = [p for p in method.parameters() if p.requires_grad and p.numel()]
    assert len(parameters) == 3 - case.startswith("no ")
    value = (expected * weights).sum() + (loss if with_loss else 0.0)
    gradients = torch.autograd.grad(value, parameters)
    logits = run(model).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    if with_loss:
        torch.testing.assert_close(method.matching_loss, loss, rtol=1e-10, atol=1e-10)
    ((logits * weights).sum() + (method.matching_loss if with_loss else 0.0)).backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
    assert method.prompt_path == "shared"


@pytest.mark.parametrize("case", ["the first layer", "a bank"])
@pytest.mark.parametrize("family", ["deit", "dinov2", "clip", "siglip"])
def test_families_agree_with_the_textbook(family: str, case: str) -> None:
    if family == "siglip" and "bank" in case:
        with pytest.raises(ValueError, match="`model` must have a class token"):
            fastprefix.attach(FAMILIES[family](), configure(**OPTIONS[case]))
        return

    def attach_unchecked(model: Any, config: Any) -> Any:
        return attach(model, config, check=False)

    situations = ["ids", "several images", "gradient checkpointing", "hidden states", "tuples"]
    report = check(FAMILIES[family](), configure(**OPTIONS[case]), attach_unchecked, situations)
    assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)


@pytest.mark.parametrize("case", ["some layers", "a bank, some layers"])
def test_rows_run_once_for_the_whole_batch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = attached(**OPTIONS[case]), []
    own = vision.VisualHooks.run_alone

    def record(hooks: Any, index: int, forward: Any, rows: Tensor) -> Any:
        shapes.append((index, tuple(rows.shape[:2])))
        return own(hooks, index, forward, rows)

    monkeypatch.setattr(vision.VisualHooks, "run_alone", record)
    run(model)
    once = {"some layers": [(0, (1, 9)), (1, (1, 9)), (2, (1, 9))]}
    expected = once.get(case, [(0, (1, 9)), (1, (1, 5)), (2, (1, 5)), (1, (3, 4)), (2, (3, 4))])
    assert shapes == expected


@pytest.mark.parametrize("case", OPTIONS)
def test_detach_copies_and_files(case: str, tmp_path: Path) -> None:
    model = vision_models.vit()
    plain = run(model).logits
    fastprefix.attach(model, configure(**OPTIONS[case], matching_loss=True), check=False)
    models.randomize(model)
    expected = run(model).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied).logits, expected)
    assert {state.shape[1] for state in run(model, output_hidden_states=True).hidden_states} == {10}
    fastprefix.save_adapter(model, tmp_path)
    loaded = fastprefix.load_adapter(vision_models.vit(), tmp_path)
    torch.testing.assert_close(run(loaded).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`model` must have something to merge"):
        fastprefix.merge(model)
    fastprefix.detach(model)
    assert torch.equal(run(model).logits, plain)


@pytest.mark.parametrize("case", ["some layers", "a bank", "a bank, some layers"])
def test_checkpointed_layers_have_the_same_gradients(case: str) -> None:
    """Two calls are differentiated together, and two more are not differentiated."""
    gradients = []
    for checkpointing in (False, True):
        model = attached(**OPTIONS[case], matching_loss=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = run(model).logits.square().sum() + model.fastprefix.matching_loss
        with torch.no_grad():
            model(-vision_models.images())
        loss = loss + model(vision_models.images().flip(0, 2)).logits.pow(3).sum() + model.fastprefix.matching_loss
        with torch.no_grad():
            model(vision_models.images(1))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["some layers", "a bank"])
def test_nothing_of_an_image_is_kept_alive(case: str) -> None:
    model = attached(**OPTIONS[case])
    run(model).logits.sum().backward()
    bindings = [m._fastprefix_binding for m in model.modules() if hasattr(m, "_fastprefix_binding")]
    assert len(bindings) == LAYERS
    assert all(b.image_rows is None and b.attention is None and b.captured is None for b in bindings)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(configure(bank=BANK), id="ship", marks=pytest.mark.slow),
        pytest.param(fastprefix.VisualPromptConfig(4), id="vpt"),
    ],
)
def test_compiled_as_a_whole(config: Any) -> None:
    model = fastprefix.attach(vision_models.vit(), config, check=False)
    models.randomize(model)
    expected = run(model).logits
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(model).logits, expected, rtol=1e-10, atol=1e-10)


def test_training_lowers_the_loss() -> None:
    model = fastprefix.attach(vision_models.vit(), configure(layers=[0, 2], bank=BANK, matching_loss=True)).train()
    optimizer = torch.optim.Adam(fastprefix.parameter_groups(model, lr=0.02))
    bank, losses = model.fastprefix.bank.detach().clone(), []
    for _ in range(8):
        loss = run(model, labels=torch.tensor([0, 1, 2])).loss + model.fastprefix.matching_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(model.fastprefix.bank, bank)


def test_more_attributes_than_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_attribute` must be at most 9, the number of patches, got 10"):
        run(attached(num_attribute=10, bank=BANK))


def test_entered_layers_are_those_that_differ_from_the_one_before() -> None:
    model = vision_models.vit()
    batches = list(vision_models.images(4).split(2))
    with torch.no_grad():
        states = run_plainly(model, torch.cat(batches))
    similarity = torch.tensor([[torch.cosine_similarity(a, b, dim=-1).mean() for b in states] for a in states])
    for alpha in (-1.0, float(similarity[0, 1:].max()) + 1e-9, 1.0):
        expected = [0]
        for layer in range(1, LAYERS):
            if similarity[expected[-1], layer] < alpha:
                expected.append(layer)
        assert fastprefix.find_entered_layers(model, batches, alpha=alpha) == expected
    assert fastprefix.find_entered_layers(model, [{"pixel_values": b} for b in batches], alpha=1.0) == [0, 1, 2]
    assert fastprefix.find_entered_layers(attached(), [(b, 0) for b in batches], alpha=-1.0) == [0]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="`images` must contain at least one batch"):
        fastprefix.find_entered_layers(model, [])
    with pytest.raises(TypeError, match="`images` must contain batches"):
        fastprefix.find_entered_layers(model, [{"labels": torch.zeros(2)}])
    with pytest.raises(ValueError, match="`alpha`"):
        fastprefix.find_entered_layers(model, batches, alpha=2.0)


def run_plainly(model: Any, pixels: Tensor) -> list[Tensor]:
    state, states = model.vit.embeddings(pixels), []
    for layer in model.vit.layers:
        state = layer(state)
        states.append(state)
    return states


def test_a_bank_has_the_means_of_its_clusters() -> None:
    model, batches = vision_models.vit(), list(vision_models.images(4).split(2))
    bank = fastprefix.compute_bank(model, batches, count=6)
    assert torch.equal(bank, fastprefix.compute_bank(attached(), batches, count=6))  # an adapter does not act
    features = run_plainly(model, torch.cat(batches))[-1][:, 1:].flatten(0, 1).float()
    nearest = torch.cdist(features, bank).argmin(1)
    assert nearest.unique().numel() == 6
    for index in range(6):
        torch.testing.assert_close(bank[index], features[nearest == index].mean(0), rtol=1e-4, atol=1e-4)
    every = fastprefix.compute_bank(model, batches, count=36)
    torch.testing.assert_close(every.sum(0), features.sum(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`count` must be at most 36"):
        fastprefix.compute_bank(model, batches, count=37)
    with pytest.raises(ValueError, match="`count` must be at most `most`, which is 5"):
        fastprefix.compute_bank(model, batches, count=6, most=5)
    assert find_result(run(fastprefix.attach(model, configure(bank=bank), check=False))).isfinite().all()


def test_a_bank_is_computed_beside_prompt_tokens_that_run_in_every_image() -> None:
    model, batches = vision_models.vit(), [vision_models.images(2)]
    expected = fastprefix.compute_bank(model, batches, count=4)
    fastprefix.attach(model, fastprefix.VisualPromptConfig(3), check=False)
    assert torch.equal(fastprefix.compute_bank(model, batches, count=4), expected)
    for count in (0, -3):
        with pytest.raises(ValueError, match="`count` must be a whole number of at least 1"):
            fastprefix.compute_bank(model, batches, count=count)


def test_features_are_drawn_from_all_batches() -> None:
    parts = [torch.arange(start, start + 50.0)[:, None] for start in range(0, 200, 50)]
    drawn = features._draw(parts, 40, torch.Generator().manual_seed(0)).flatten()
    assert len(drawn.unique()) == 40
    assert {int(each) // 50 for each in drawn} == {0, 1, 2, 3}


def test_a_bank_of_which_only_the_size_is_known_is_refused() -> None:
    model = attached()
    fastprefix.attach(model, configure(bank=BANK), name="bank", check=False)
    with pytest.raises(ValueError, match=r"`bank` must be a tensor \[C, d\] of prototypes, but only its size"):
        fastprefix.attach(vision_models.vit(), model.fastprefix.config)


def test_tokens_of_which_there_are_none_are_not_trained() -> None:
    """DistributedDataParallel would wait for their gradients."""
    model = fastprefix.attach(vision_models.vit(), configure(num_attribute=0, num_shared=0), check=False)
    assert all(p.numel() > 0 for p in model.parameters() if p.requires_grad)


@pytest.fixture
def _one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_on_models_that_fsdp2_shards() -> None:
    """Deep prompts run in every image. Prompt tokens of SHIP cannot, so it refuses these models."""
    mesh, images = distributed.init_device_mesh("cpu", (1,)), vision_models.images(2)
    for config in (fastprefix.VisualPromptConfig(3, depth="deep"), configure()):
        model = fastprefix.attach(vision_models.vit(), config, check=False)
        expected = find_result(model(pixel_values=images))
        for block in vision.find_vision_stack(model).blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if isinstance(config, fastprefix.SHIPConfig):
            with pytest.raises(ValueError, match="`model` must not be sharded by FSDP2 for SHIP"):
                model(pixel_values=images)
        else:
            torch.testing.assert_close(find_result(model(pixel_values=images)), expected)
            assert "sharded" in str(get_method(model).prompt_path)
    with pytest.raises(ValueError, match=r"Attach before fully_shard\."):
        fastprefix.attach(model, config, name="later")
