"""Test conversion of adapters between PEFT and this package: the same logits in both directions, and refusals."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method

from ... import models, peft_support
from ..transformers.test_attach import METHODS, attached
from .test_accelerate import KINDS, LENGTH, OTHERS, family, tuned

pytestmark = pytest.mark.peft
BASES: dict[str, Callable[[], Any]] = {"encoder": models.encoder, "decoder": models.decoder}
PEFTS = [("encoder", "prefix"), ("encoder", "prefix-projection"), ("encoder", "cartridge")]
PEFTS += [("decoder", kind) for kind in KINDS if kind != "adaption"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare with the precision of float32, in which PEFT saves and loads parameters."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(("name", "kind"), PEFTS)
def test_pefts_adapters_are_read(name: str, kind: str, padding: str, tmp_path: Path) -> None:
    inputs, tuned_model = models.batch(padding), family(name, kind)
    tuned_model.save_pretrained(tmp_path)
    expected = tuned_model(**inputs).logits
    model = fastprefix.load_adapter(BASES[name](), tmp_path)
    logits = model(**inputs).logits
    assert_close(logits, expected[:, -7:] if name == "decoder" else expected)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("fastprefix.")}
    assert trainable == ({"classifier.weight", "classifier.bias"} if name == "encoder" else set())
    if name == "decoder" and padding == "none" and peft_support.generation():
        options = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), tuned_model.generate(**inputs, **options))
    fastprefix.save_adapter(model, tmp_path / "own")
    again = fastprefix.load_adapter(BASES[name](), tmp_path / "own")
    assert torch.equal(again(**inputs).logits, logits)


OWN: dict[str, tuple[str, Callable[[], Any]]] = {
    "prompt": ("decoder", lambda: fastprefix.PromptTuningConfig(LENGTH)),
    "p-tuning": ("decoder", lambda: fastprefix.PTuningConfig(LENGTH, encoder_hidden_dim=6)),
    "p-tuning-lstm": ("decoder", lambda: fastprefix.PTuningConfig(LENGTH, encoder="lstm", encoder_hidden_dim=6)),
    "ulpt": ("decoder", lambda: fastprefix.ULPTConfig(LENGTH, rank=3)),
    "prefix": ("decoder", lambda: fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift")),
    "cartridge": (
        "decoder",
        lambda: fastprefix.CartridgeConfig(LENGTH, init="normal", num_frozen_tokens=2, train="values"),
    ),
    "prefix-encoder": ("encoder", lambda: fastprefix.PrefixTuningConfig(LENGTH, prefix_position="shift")),
    "prefix-mlp": (
        "decoder",
        lambda: fastprefix.PrefixTuningConfig(
            LENGTH, reparameterization="mlp", hidden_dim=16, prefix_position="shift", modules_to_save=["lm_head"]
        ),
    ),
    "residual": (
        "encoder",
        lambda: fastprefix.ResidualPrefixConfig(LENGTH, bottleneck_dim=8, hidden_dim=16, prefix_position="shift"),
    ),
    "apt-layers": ("decoder", lambda: fastprefix.APTConfig(LENGTH, token_gate=False, prefix_position="shift")),
}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("case", OWN)
def test_adapters_are_written_as_peft_reads_them(case: str, padding: str, tmp_path: Path) -> None:
    name, config = OWN[case]
    if name == "encoder":
        peft_support.require(peft_support.prefixes_of_classifiers)
    inputs = models.batch(padding)
    model = fastprefix.attach(BASES[name](), config())
    models.randomize(model)
    logits = model(**inputs).logits
    fastprefix.save_adapter(model, tmp_path, format="peft")
    loaded = peft.PeftModel.from_pretrained(BASES[name](), tmp_path).double().eval()
    expected = loaded(**inputs).logits
    assert_close(expected[:, -7:] if name == "decoder" else expected, logits)
    assert_close(fastprefix.load_adapter(BASES[name](), tmp_path)(**inputs).logits, logits)
    fastprefix.accelerate(loaded)
    assert_close(loaded(**inputs).logits, expected)


def test_tied_modules(tmp_path: Path) -> None:
    """PEFT trains and saves a copy of each of them. The copies of a tied model must be equal."""

    def make() -> Any:
        return models.decoder(tie_word_embeddings=True)

    names, inputs = ["lm_head", "model.embed_tokens"], models.batch()
    config = fastprefix.PromptTuningConfig(LENGTH, modules_to_save=names)
    model = fastprefix.attach(make(), config, check=False)
    models.randomize(model)
    logits = model(**inputs).logits
    fastprefix.save_adapter(model, tmp_path, format="peft")
    loaded: Any = peft.PeftModel.from_pretrained(make(), tmp_path).double()
    for module in (loaded.base_model.lm_head, loaded.base_model.model.embed_tokens):
        assert_close(module.modules_to_save["default"].weight, model.lm_head.weight)
    assert_close(fastprefix.load_adapter(make(), tmp_path)(**inputs).logits, logits)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.lm_head.weight"] += 1.0
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight .* must be equal, since `model` ties them"):
        fastprefix.load_adapter(make(), tmp_path)


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama-classifier", "windows"])
def test_positions_of_other_models(name: str, tmp_path: Path) -> None:
    """RoBERTa's positions exclude padding, GPT-2's are learned, and sliding windows cut the prefix."""
    task, auto, config = OTHERS[name]
    torch.manual_seed(0)
    state, inputs = auto.from_config(config()).state_dict(), models.batch("right")

    def base() -> Any:
        model = auto.from_config(config())
        model.load_state_dict(state)
        return model.double().eval()

    tuned_model = tuned(base(), "prefix", task)
    tuned_model.save_pretrained(tmp_path)
    assert_close(fastprefix.load_adapter(base(), tmp_path)(**inputs).logits, tuned_model(**inputs).logits)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_positions_that_are_counted_by_the_mask(padding: str, tmp_path: Path) -> None:
    """OPT computes positions from the mask."""
    task, auto, config = OTHERS["opt"]
    torch.manual_seed(0)
    model = auto.from_config(config()).double().eval()
    expected = tuned(copy.deepcopy(model), "prefix", task)
    expected.save_pretrained(tmp_path)
    inputs = models.batch(padding)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        actual = fastprefix.load_adapter(model, tmp_path)(**inputs).logits
        assert_close(actual[seen], expected(**inputs).logits[seen])


PEFTS_OWN = ("prompt_tuning", "multitask", "p-tuning", "p-tuning-lstm", "ulpt", "prefix-shift")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in PEFTS_OWN])
def test_what_peft_has_no_place_for(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='format="peft"'):
        fastprefix.save_adapter(attached("decoder", method), tmp_path, format="peft")
    assert not list(tmp_path.iterdir())


def test_formats_and_gates_and_heads_that_are_not_pefts(tmp_path: Path) -> None:
    apt = fastprefix.attach(models.decoder(), fastprefix.APTConfig(LENGTH, prefix_position="shift"))
    with pytest.raises(ValueError, match="gates of APTConfig"):
        fastprefix.save_adapter(apt, tmp_path, format="peft")
    with pytest.raises(ValueError, match="`format` must be one of 'fastprefix', 'peft', got 'onnx'"):
        fastprefix.save_adapter(apt, tmp_path, format="onnx")
    with pytest.raises(ValueError, match="causal language model"):
        fastprefix.save_adapter(attached("encoder", "prompt_tuning"), tmp_path, format="peft")
    assert not list(tmp_path.iterdir())


def rewritten(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lora": (lambda folder: rewritten(folder, peft_type="LORA"), "peft_type.*PREFIX_TUNING.*is 'LORA'"),
    "encoder-decoder": (lambda folder: rewritten(folder, num_transformer_submodules=2), "encoder-decoder"),
    "modules": (lambda folder: rewritten(folder, modules_to_save="all-linear"), "list of names, but is 'all-linear'"),
    "tokens": (
        lambda folder: rewritten(folder, num_virtual_tokens=6),
        "`num_virtual_tokens` .* is 6, .* 5 virtual tokens",
    ),
    "no-description": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "was not written by fastprefix.save_adapter or PEFT",
    ),
    "no-json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "JSON"),
    "no-object": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "peft_type"),
    "no-rows": (
        lambda folder: save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors"),
        "prompt_embeddings",
    ),
    "too-wide": (
        lambda folder: save_file({"prompt_embeddings": torch.zeros(5, 65)}, folder / "adapter_model.safetensors"),
        "must have 4 times 2 times 8 columns, but has 65",
    ),
    "more": (
        lambda folder: save_file(
            {**load_file(folder / "adapter_model.safetensors"), "base_model.lm_head.weight": torch.zeros(2)},
            folder / "adapter_model.safetensors",
        ),
        "no parameters for base_model.lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_or_foreign(case: str, tmp_path: Path) -> None:
    damage, says = DAMAGED[case]
    family("decoder", "prefix").save_pretrained(tmp_path)
    damage(tmp_path)
    model = models.decoder()
    with pytest.raises(ValueError, match=says):
        fastprefix.load_adapter(model, tmp_path)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(3))  # nothing was left on it


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    family("decoder", "prefix").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle file, which is never loaded"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def test_the_head_of_another_model(tmp_path: Path) -> None:
    family("encoder", "prefix").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no parameters for base_model\.classifier\.bias"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def test_a_prompt_for_pooling_heads_is_refused(tmp_path: Path) -> None:
    """PEFT's classifier pools the first token of the prompt, not of the text."""
    family("encoder", "prompt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="causal language model"):
        fastprefix.load_adapter(models.encoder(), tmp_path)
    with pytest.raises(ValueError, match="causal language model"):
        fastprefix.load_adapter(AutoModelForSequenceClassification.from_config(models.decoder().config), tmp_path)


def test_files_are_read_and_written_without_peft(tmp_path: Path) -> None:
    family("decoder", "prefix").save_pretrained(tmp_path / "peft")
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import fastprefix; from tests import models\n"
        f"model = fastprefix.load_adapter(models.decoder(), {str(tmp_path / 'peft')!r})\n"
        f"fastprefix.save_adapter(model, {str(tmp_path / 'own')!r}, format='peft')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "own"))
    assert before.keys() == after.keys()
    assert_close(after["prompt_embeddings"].double(), before["prompt_embeddings"].double())


def test_a_loaded_prefix_is_moved_up(tmp_path: Path) -> None:
    family("decoder", "prefix").save_pretrained(tmp_path)
    config = get_method(fastprefix.load_adapter(models.decoder(), tmp_path)).config
    assert type(config) is fastprefix.PrefixTuningConfig
    assert config.prefix_position == "shift"
    assert config.num_virtual_tokens == LENGTH


def test_pefts_prefix_is_replaced_only_by_its_own_kind(tmp_path: Path) -> None:
    family("decoder", "prefix").save_pretrained(tmp_path)
    model = fastprefix.load_adapter(models.decoder(), tmp_path)
    models.randomize(model)
    with pytest.raises(ValueError, match=r"contains an adapter of PEFT \(PREFIX_TUNING\), which would be overwritten"):
        fastprefix.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"contains an adapter of PEFT \(PREFIX_TUNING\), which would be overwritten"):
        fastprefix.save_adapter(attached("decoder", "prompt_tuning"), tmp_path, format="peft")
    fastprefix.save_adapter(model, tmp_path, format="peft")
    again, inputs = fastprefix.load_adapter(models.decoder(), tmp_path), models.batch()
    assert_close(again(**inputs).logits, model(**inputs).logits)


ENDINGS = [("prefix", ending) for ending in ("embed_tokens", "lm_head", "norm", "mlp", "layers.0.mlp", "o_proj")]
ENDINGS += [("prompt", "norm"), ("prompt", "mlp")]  # PEFT's prompts do not use a trained copy of the embedding


@pytest.mark.parametrize(("kind", "ending"), ENDINGS)
def test_modules_that_peft_trains_are_found_by_the_end_of_their_names(kind: str, ending: str, tmp_path: Path) -> None:
    """Such as both norms of each layer and the last one for "norm". They change the prefix that is checked."""
    kinds = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    config = kinds[kind](task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, modules_to_save=[ending])
    trained: Any = peft.get_peft_model(models.decoder(), config)
    models.randomize(trained)
    inputs = models.batch()
    expected = trained.double().eval()(**inputs).logits[:, -7:]
    trained.save_pretrained(tmp_path / "peft")
    model = fastprefix.load_adapter(models.decoder(), tmp_path / "peft")
    assert_close(model(**inputs).logits, expected)
    fastprefix.save_adapter(model, tmp_path / "own", format="peft")
    assert_close(fastprefix.load_adapter(models.decoder(), tmp_path / "own")(**inputs).logits, expected)
    fastprefix.detach(model)
    assert torch.equal(model(**inputs).logits, models.decoder()(**inputs).logits)
