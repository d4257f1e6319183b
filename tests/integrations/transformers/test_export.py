"""Test ``torch.export`` and ONNX exports of models with a method, merged or not."""

import copy
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2DoubleHeadsModel

import fastprefix

from ... import models

METHODS: dict[str, Any] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(3),
    "apt": lambda: fastprefix.APTConfig(3),
    "prompt": lambda: fastprefix.PromptTuningConfig(3),
    "adept": lambda: fastprefix.ADePTConfig(3, bottleneck_dim=2),
}


def prepared(method: str, merged: bool) -> tuple[Any, dict[str, Any]]:
    model = fastprefix.attach(models.decoder().float(), METHODS[method]())
    models.randomize(model)
    if merged:
        fastprefix.merge(model)
    return model, {**models.batch("left"), "use_cache": False}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_torch_export(method: str, merged: bool) -> None:
    model, inputs = prepared(method, merged)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("method", "merged"), [("prefix", False), ("prompt", True)])
def test_onnx(method: str, merged: bool) -> None:
    """ONNX has no operators of this package, so the export contains the formula in plain PyTorch."""
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, inputs = prepared(method, merged)
    with torch.no_grad():
        program = torch.onnx.export(model, (), kwargs={**inputs, "return_dict": False}, dynamo=True, verbose=False)
        expected = model(**inputs).logits
    names = [each.name for each in program.model_proto.graph.input]
    output = reference.ReferenceEvaluator(program.model_proto).run(None, {n: inputs[n].numpy() for n in names})
    torch.testing.assert_close(torch.from_numpy(output[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["none", "shift"])
def test_several_choices_in_a_row(position: Any) -> None:
    """GPT-2's double-heads model receives ids with three dimensions."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    plain = GPT2DoubleHeadsModel(GPT2Config(**sizes, **dropouts, initializer_range=0.2)).double().eval()
    model = fastprefix.attach(copy.deepcopy(plain), fastprefix.PrefixTuningConfig(3, prefix_position=position))
    models.randomize(model)
    ids = torch.arange(5, 33).view(2, 2, 7)
    output = model(ids, mc_token_ids=torch.full((2, 2), 6)).logits
    flat = model.lm_head(model.transformer(ids.view(4, 7)).last_hidden_state)
    torch.testing.assert_close(output.view_as(flat), flat, rtol=1e-10, atol=1e-10)
