"""Test that exports for serving engines give the model's numbers in these engines."""

import base64
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fastprefix
from fastprefix.integrations.transformers.files import mlx_format

from ... import models
from ...float64 import Float64
from .prompts.test_shared_prompt import EAGER, SHARING, WINDOWED
from .test_families import t5

PROMPTS: dict[str, Any] = {
    "prompt": lambda **options: fastprefix.PromptTuningConfig(6, **options),
    "dept": lambda **options: fastprefix.DePTConfig(4, rank=2, max_length=30, **options),
    "adept": lambda **options: fastprefix.ADePTConfig(5, bottleneck_dim=3, **options),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def attach(model: Any, kind: str, **options: Any) -> Any:
    fastprefix.attach(model, PROMPTS[kind](**options), check=False)
    models.randomize(model)
    return model


def generate_from(model: Any, embeds: Tensor) -> Tensor:
    generated: Tensor = model.generate(inputs_embeds=embeds[None], **GREEDY)
    return generated[0]


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("shared", [None, False])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "qwen3", "mistral"])
def test_embeddings_give_the_plain_model_the_same_numbers(family: str, kind: str, shared: bool | None) -> None:
    torch.manual_seed(0)
    with Float64(), torch.no_grad():
        config = {**SHARING, **WINDOWED}[family]() if family != "llama" else models.decoder().config
        plain = AutoModelForCausalLM.from_config(config, **EAGER).double().eval()
        model = attach(copy.deepcopy(plain), kind, shared_prompt=shared)
        inputs = models.batch("left")
        rows = fastprefix.export_prompt_embeds(model, **inputs)
        assert [len(row) for row in rows] == [model.fastprefix.config.num_virtual_tokens + n for n in (7, 5, 3)]
        for row, embeds in enumerate(rows):
            kept = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            alone = model(input_ids=kept[None]).logits[0]
            logits = plain(inputs_embeds=embeds[None]).logits[0, -len(kept) :]
            torch.testing.assert_close(logits, alone, rtol=1e-10, atol=1e-10)
            if kind == "prompt":
                own = model.generate(input_ids=kept[None], **GREEDY)[0, len(kept) :]
                assert torch.equal(generate_from(plain, embeds), own)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_base_generates_as_adept_does(tied: bool, tmp_path: Path) -> None:
    model = attach(models.decoder(tie_word_embeddings=tied), "adept")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = models.batch()["input_ids"]
    fastprefix.export_merged_base(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(map(torch.equal, before.values(), after.values()))
    assert model.config.tie_word_embeddings is tied
    served = models.decoder(tie_word_embeddings=tied)
    served = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    served.generation_config.eos_token_id = None
    with Float64():
        for row, embeds in zip(ids, fastprefix.export_prompt_embeds(model, ids), strict=True):
            own = model.generate(input_ids=row[None], **GREEDY)[0, len(row) :]
            assert torch.equal(generate_from(served, embeds), own)


def test_export_of_embeddings_for_servers() -> None:
    model = attach(models.decoder().to(torch.bfloat16), "prompt")
    (row, *_) = fastprefix.export_prompt_embeds(model, models.batch()["input_ids"])
    assert row.dtype is torch.bfloat16
    text = fastprefix.encode_prompt_embeds(row)
    assert torch.equal(torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True), row)


def attach_prefix(**options: Any) -> Any:
    model = fastprefix.attach(models.decoder(**options), fastprefix.PrefixTuningConfig(5, prefix_position="shift"))
    models.randomize(model)
    return model


def test_a_prompt_cache_of_mlx(tmp_path: Path) -> None:
    model = attach_prefix().float()
    cache = fastprefix.export_cache(model, format="mlx", path=tmp_path / "new.safetensors")
    fastprefix.export_cache(model, 3, format="mlx-0.31", path=tmp_path / "old.safetensors")
    for name in ("new", "old"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            for index, layer in enumerate(cache.layers):
                assert torch.equal(file.get_tensor(f"{index}.0"), layer.keys)
                assert torch.equal(file.get_tensor(f"{index}.1"), layer.values)
                assert metadata[f"{1 if name == 'new' else 2}.{index}"] == "KVCache"
                if name == "new":
                    assert int(file.get_tensor(f"{index}.2")) == 5
                    assert metadata[f"2.{index + 1}.0"] == f"{index}.2"
                else:
                    assert metadata[f"0.{index}"] == ""
            assert len(file.keys()) == len(cache.layers) * (3 if name == "new" else 2)


def test_an_interrupted_export_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = attach_prefix(), tmp_path / "cache.safetensors"
    fastprefix.export_cache(model, format="mlx", path=path)
    former = path.read_bytes()

    def fail(tensors: Any, place: Path, **kwargs: Any) -> None:
        place.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(mlx_format, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        fastprefix.export_cache(model, format="mlx", path=path)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [former]


def test_mlx_computes_the_same(tmp_path: Path) -> None:
    mlx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    caches = pytest.importorskip("mlx_lm.models.cache", reason="MLX-LM is not installed")
    llama = pytest.importorskip("mlx_lm.models.llama")
    model = attach_prefix().float()
    config = model.config
    options = llama.ModelArgs.from_dict({**config.to_dict(), "rope_theta": config.rope_parameters["rope_theta"]})
    other = llama.Model(options)
    weights = [
        (name, mlx.array(value.numpy()))
        for name, value in model.state_dict().items()
        if not name.startswith("fastprefix") and "rotary" not in name
    ]
    other.load_weights(weights, strict=True)
    fastprefix.export_cache(model, format="mlx", path=tmp_path / "cache.safetensors")
    cache, about = caches.load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert about["model"] == "LlamaForCausalLM"
    ids = models.batch()["input_ids"][:1]
    logits = torch.tensor(other(mlx.array(ids.numpy()), cache=cache).tolist())
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


class TestErrors:
    """Adapters that an engine cannot run are refused with the reason."""

    def test_no_prompt(self) -> None:
        with pytest.raises(ValueError, match="`model`"):
            fastprefix.export_prompt_embeds(attach_prefix(), models.batch()["input_ids"])
        with pytest.raises(ValueError, match="`model`"):
            fastprefix.export_merged_base(attach(models.decoder(), "dept"), "nowhere")
        with pytest.raises(ValueError, match="`model`"):
            fastprefix.export_prompt_embeds(models.decoder(), models.batch()["input_ids"])

    def test_a_folder_with_an_adapter(self, tmp_path: Path) -> None:
        """``from_pretrained`` would look for the adapter's base model instead of reading the checkpoint."""
        model = attach(models.decoder(), "adept")
        fastprefix.save_adapter(model, tmp_path)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match="`directory` must be a separate folder"):
            fastprefix.export_merged_base(model, tmp_path)
        assert sorted(tmp_path.iterdir()) == before

    def test_merged_or_with_two_halves(self) -> None:
        model = attach(models.decoder(), "prompt")
        with pytest.raises(ValueError, match="`model`"):
            fastprefix.export_prompt_embeds(fastprefix.merge(model), models.batch()["input_ids"])
        with pytest.raises(ValueError, match="decoder"):
            fastprefix.export_prompt_embeds(attach(t5(), "prompt"), models.batch()["input_ids"])

    def test_shapes(self) -> None:
        model = attach(models.decoder(), "prompt")
        with pytest.raises(ValueError, match="`input_ids`"):
            fastprefix.export_prompt_embeds(model, torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match="`attention_mask`"):
            fastprefix.export_prompt_embeds(model, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4))

    def test_caches(self, tmp_path: Path) -> None:
        model = attach_prefix()
        for options in ({"format": "mlx"}, {"path": tmp_path / "x"}):
            with pytest.raises(ValueError, match="`path`"):
                fastprefix.export_cache(model, **options)
        with pytest.raises(ValueError, match="`format`"):
            fastprefix.export_cache(model, format="gguf")  # type: ignore[arg-type]
        torch.manual_seed(0)
        windowed = AutoModelForCausalLM.from_config(WINDOWED["mistral"]())
        fastprefix.attach(windowed, fastprefix.PrefixTuningConfig(5, prefix_position="shift"), check=False)
        with pytest.raises(ValueError, match="sliding windows"):
            fastprefix.export_cache(windowed, format="mlx", path=tmp_path / "x")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", ["cache", "embeds"])
def test_adapters_that_train_the_head_are_not_exported_without_it(export: str) -> None:
    options: dict[str, Any] = {"modules_to_save": ["lm_head"]}
    prefix = fastprefix.PrefixTuningConfig(3, prefix_position="shift", **options)
    config = prefix if export == "cache" else fastprefix.PromptTuningConfig(3, **options)
    model = fastprefix.attach(models.decoder(), config, check=False)
    run: Any = fastprefix.export_cache if export == "cache" else fastprefix.export_prompt_embeds
    inputs = [] if export == "cache" else [models.batch()["input_ids"]]
    with pytest.raises(ValueError, match=r"but it trains lm_head\."):
        run(model, *inputs)
