"""Test visual prompts on vision transformers: values and gradients against plain PyTorch, and the caller's view."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SwinModel,
)

import fastprefix
from fastprefix.integrations.transformers.attachment import attach, get_method
from fastprefix.integrations.transformers.checking.conformance import check
from fastprefix.integrations.transformers.models.discovery import make_small_copy

from .... import models, vision_models
from ....vision_models import FAMILIES, LAYERS, PATCH, SIDE, WIDTH

DEPTHS = ["shallow", "deep"]
ROWS = 4
BANK = torch.eye(3, WIDTH)


def attached(family: str, depth: str, check: bool = True, name: str = "default", **options: Any) -> Any:
    config = fastprefix.VisualPromptConfig(ROWS, depth=depth, **options)
    model = fastprefix.attach(FAMILIES[family](), config, check=check, name=name)
    models.randomize(model)
    return model


def run(model: Any, **options: Any) -> Any:
    return model(**vision_models.inputs(model), **options)


def find_result(output: Any) -> Tensor:
    """Return the logits, or the corresponding result of another kind of model."""
    names = ("logits", "logits_per_image", "pooler_output")
    result: Tensor = next(output[name] for name in names if name in output)
    return result


def textbook_vit(model: Any, method: Any, depth: str, pixels: Tensor) -> Tensor:
    """Return the logits of a ViT with prompt tokens in every image."""
    vit = model.vit
    state = vit.embeddings(pixels)
    for index, layer in enumerate(vit.layers):
        if index == 0 or depth == "deep":
            rows = method.prompts[index].expand(len(state), -1, -1)
            state = torch.cat([state[:, :1], rows, state[:, 1 + (ROWS if index else 0) :]], dim=1)
        hidden, attention = layer.layernorm_before(state), layer.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (p(hidden).unflatten(-1, (4, -1)).transpose(1, 2) for p in projections)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        state = state + attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        state = state + layer.mlp(layer.layernorm_after(state))
    return model.classifier(vit.layernorm(state)[:, 0])


@pytest.mark.parametrize("depth", DEPTHS)
def test_values_and_gradients_are_the_textbooks(depth: str) -> None:
    model = attached("vit", depth)
    method, plain = get_method(model), vision_models.vit()
    plain.classifier.load_state_dict(model.classifier.state_dict())
    expected = textbook_vit(plain, method, depth, vision_models.images())
    weights = torch.arange(expected.numel(), dtype=torch.float64).cos().view_as(expected)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), [method.prompts])
    actual = run(model).logits
    (actual * weights).sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(method.prompts.grad, gradient, rtol=1e-10, atol=1e-10)
    assert method.prompt_path == ("shared" if depth == "deep" else "textbook: its prompt tokens depend on the image")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_the_textbook(family: str, depth: str) -> None:
    def attach_unchecked(model: Any, config: Any) -> Any:
        return attach(model, config, check=False)

    situations = ["ids", "several images", "gradient checkpointing", "hidden states", "tuples"]
    report = check(FAMILIES[family](), fastprefix.VisualPromptConfig(ROWS, depth=depth), attach_unchecked, situations)
    assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)


def test_checkpointed_layers_run_again_as_in_their_own_call() -> None:
    """The prompt runs in every image, although a later evaluation shares it."""
    gradients = []
    for checkpointing in (False, True):
        model = attached("vit", "deep", check=False, dropout=1e-30).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = run(model).logits.square().sum()
        with torch.no_grad():
            run(model.eval())
        assert model.fastprefix.prompt_path == "shared"
        model.train()
        loss.backward()
        gradients.append(model.fastprefix.prompts.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 1e-30], ids=["shared", "in every image"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_layers_are_recomputed_with_the_adapter_of_their_call(depth: str, dropout: float) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = attached("vit", depth, check=False, dropout=dropout, name="a", modules_to_save=[])
        other = fastprefix.VisualPromptConfig(ROWS + 1, depth=depth, modules_to_save=[])
        fastprefix.attach(model, other, name="b", check=False)
        models.randomize(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fastprefix.set_adapter(model, "a")
        first = model.fastprefix
        loss = run(model).logits.square().sum()
        fastprefix.set_adapter(model, "b")
        loss = loss + run(model).logits.square().sum()
        loss.backward()
        gradients.append([first.prompts.grad, model.fastprefix.prompts.grad])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


KINDS: dict[str, Callable[[], Any]] = {
    "deep": lambda: fastprefix.VisualPromptConfig(ROWS, depth="deep", modules_to_save=[]),
    "shallow": lambda: fastprefix.VisualPromptConfig(ROWS, modules_to_save=[]),
    "dropout": lambda: fastprefix.VisualPromptConfig(ROWS, depth="deep", dropout=1e-30, modules_to_save=[]),
    "ship": lambda: fastprefix.SHIPConfig(
        3, num_shared=2, num_attribute=2, bank=BANK, matching_loss=True, modules_to_save=[]
    ),
    "prefix": lambda: fastprefix.PrefixTuningConfig(ROWS, modules_to_save=[]),
}


def two_adapters(first: str, then: str) -> Any:
    """Return a model in training mode with two adapters, the first of which is in use."""
    model = fastprefix.attach(vision_models.vit(), KINDS[first](), name="first", check=False)
    models.randomize(model)
    fastprefix.attach(model, KINDS[then](), name="then", check=False)
    models.randomize(model)
    return fastprefix.set_adapter(model.train(), "first")


def loss_of(model: Any) -> Tensor:
    """Return the sum of the squared logits and the matching loss."""
    loss: Tensor = run(model).logits.square().sum()
    matching = getattr(model.fastprefix, "matching_loss", None)
    return loss if matching is None else loss + matching


@pytest.mark.parametrize(
    ("first", "then"),
    [("ship", "deep"), ("ship", "prefix"), ("shallow", "deep"), ("shallow", "prefix"), ("dropout", "prefix")],
)
def test_an_adapter_of_another_kind_is_in_use_when_layers_are_recomputed(first: str, then: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = two_adapters(first, then)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        method, loss = model.fastprefix, loss_of(model)
        fastprefix.set_adapter(model, "then")
        loss.backward()
        gradients.append([parameter.grad for parameter in method.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("first", "change", "match"),
    [
        ("dropout", lambda model: fastprefix.set_adapter(model, "then"), "the attention is"),
        ("shallow", fastprefix.detach, "other parameters of the layers"),
    ],
)
def test_a_backward_pass_after_a_change_of_the_layers_is_refused(first: str, change: Any, match: str) -> None:
    model = two_adapters(first, "shallow")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = loss_of(model)
    change(model)
    with pytest.raises(RuntimeError, match=f"switched, disabled or detached before .* {match}"):
        loss.backward()


def test_deep_rows_with_dropout_stand_in_every_image() -> None:
    model = attached("vit", "deep", check=False, dropout=0.3)
    expected = run(model).logits
    assert model.fastprefix.prompt_path == "shared"
    model.train()
    torch.manual_seed(0)
    first, second = run(model).logits, run(model).logits
    assert model.fastprefix.prompt_path == "textbook: dropout of its prompt tokens differs between images"
    assert not torch.equal(first, second)
    model.fastprefix.config.dropout = 1e-30
    torch.testing.assert_close(run(model).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_caller_sees_the_tokens_of_the_image_alone(family: str, depth: str) -> None:
    model = attached(family, depth, check=False)
    vision = model.vision_model if family == "clip" else model
    pixels = vision_models.images()
    output = vision(pixels, output_hidden_states=True)
    tokens = (SIDE // PATCH) ** 2 + {"siglip": 0, "deit": 2}.get(family, 1)
    assert [state.shape for state in output.hidden_states] == [(3, tokens, WIDTH)] * (LAYERS + 1)
    assert isinstance(vision(pixels, return_dict=False), tuple)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_detach_copies_and_files(family: str, depth: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    plain, modules = find_result(run(model)), [name for name, _ in model.named_modules()]
    fastprefix.attach(model, fastprefix.VisualPromptConfig(ROWS, depth=depth), check=False)
    models.randomize(model)
    expected = find_result(run(model))
    assert not torch.equal(expected, plain)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(find_result(run(copied)), expected)
        models.randomize(copied, 1.0)
        assert not torch.equal(find_result(run(copied)), expected)
    fastprefix.save_adapter(model, tmp_path)
    loaded = fastprefix.load_adapter(FAMILIES[family](), tmp_path)
    torch.testing.assert_close(find_result(run(loaded)), expected, rtol=1e-5, atol=1e-5)
    with fastprefix.disable_adapter(model):
        torch.testing.assert_close(find_result(run(model)), plain, rtol=1e-12, atol=1e-12)  # SigLIP's head rounds anew
    fastprefix.detach(model)
    assert torch.equal(find_result(run(model)), plain)
    assert [name for name, _ in model.named_modules()] == modules
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_rows_merge_into_a_prefix(family: str, tmp_path: Path) -> None:
    model = attached(family, "deep", check=False)
    expected = find_result(run(model))
    fastprefix.merge(model)
    assert type(get_method(model).config) is fastprefix.PrefixTuningConfig
    torch.testing.assert_close(find_result(run(model)), expected, rtol=1e-10, atol=1e-10)
    if family == "clip":
        with pytest.raises(ValueError, match="only in the layers for images"):
            fastprefix.save_adapter(model, tmp_path)
    else:
        fastprefix.save_adapter(model, tmp_path)
        loaded = fastprefix.load_adapter(FAMILIES[family](), tmp_path)
        torch.testing.assert_close(find_result(run(loaded)), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="its prompt tokens depend on the image"):
        fastprefix.merge(attached(family, "shallow", check=False))


def test_deep_rows_in_a_model_of_images_and_text_merge(tmp_path: Path) -> None:
    image = {**vision_models.TEXT, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**image, initializer_range=0.2),
        text_config=LlamaConfig(**vision_models.TEXT, num_key_value_heads=2, initializer_range=0.2),
        image_token_index=49,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).double().eval()
    fastprefix.attach(model, fastprefix.VisualPromptConfig(ROWS, depth="deep"), check=False)
    models.randomize(model, 1.0)
    inputs: Any = {"input_ids": torch.tensor([[49] * 4 + [5, 6, 7]] * 2)}
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(**inputs).logits
    fastprefix.merge(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
    with fastprefix.disable_adapter(model):
        assert not torch.allclose(model(**inputs).logits, expected, rtol=1e-2)
    with pytest.raises(ValueError, match="only in the layers for images"):
        fastprefix.save_adapter(model, tmp_path)


@pytest.mark.parametrize("depth", DEPTHS)
def test_training_lowers_the_loss(depth: str) -> None:
    model = fastprefix.attach(vision_models.vit(), fastprefix.VisualPromptConfig(ROWS, depth=depth)).train()
    assert fastprefix.count_parameters(model).groups == {
        "fastprefix": (LAYERS if depth == "deep" else 1) * ROWS * WIDTH,
        "classifier": 3 * WIDTH + 3,
    }
    optimizer = torch.optim.Adam(fastprefix.parameter_groups(model, lr=0.02))
    losses = []
    for _ in range(8):
        loss = run(model, labels=torch.tensor([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_attention_weights() -> None:
    model = vision_models.vit()
    model.set_attn_implementation("eager")
    fastprefix.attach(model, fastprefix.VisualPromptConfig(ROWS), check=False)
    rows = (SIDE // PATCH) ** 2 + 1 + ROWS
    assert run(model, output_attentions=True).attentions[0].shape == (3, 4, rows, rows)
    with pytest.raises(ValueError, match="`output_attentions` must be False"):
        run(attached("vit", "deep", check=False), output_attentions=True)
    with pytest.raises(ValueError, match="`output_attentions` must be False"):
        run(attached("vit", "deep", check=False, dropout=0.5).train(), output_attentions=True)


def test_reentrant_checkpointing_is_refused() -> None:
    model = attached("vit", "deep", check=False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="`use_reentrant` must be False"):
        run(model)


def test_models_that_are_no_stack_over_an_image_are_refused(tmp_path: Path) -> None:
    swin = make_small_copy(AutoConfig.for_model("swin"), SwinModel)
    for model in (swin, models.decoder()):
        with pytest.raises(ValueError, match="`model` must"):
            fastprefix.attach(model, fastprefix.VisualPromptConfig(ROWS))
        assert not hasattr(model, "fastprefix")
    with pytest.raises(ValueError, match="must be a text model for PromptTuningConfig"):
        fastprefix.attach(vision_models.vit(), fastprefix.PromptTuningConfig(3))
    with pytest.raises(ValueError, match='format="peft"'):
        fastprefix.save_adapter(attached("vit", "deep", check=False), tmp_path, format="peft")
    with pytest.raises(ValueError, match="`model` must have a prefix"):
        fastprefix.export_cache(attached("vit", "deep", check=False))


def test_rows_with_rotated_positions_stand_in_every_image() -> None:
    model = make_small_copy(AutoConfig.for_model("dinov3_vit"), dtype=torch.float64)
    fastprefix.attach(model, fastprefix.VisualPromptConfig(ROWS, depth="deep"))
    assert model.fastprefix.prompt_path.startswith("textbook: a layer does not run on rows alone")
