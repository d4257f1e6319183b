"""Test sentence-transformers on an encoder with an adapter: embeddings, training, and saved files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import fastprefix

from .... import models
from ..test_attach import METHODS

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")  # since 6
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]
POOLINGS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "lasttoken": lambda rows: rows[-1],
}
METHOD_NAMES = ["prefix", "apt", "prompt_tuning", "dept", "adept"]


@pytest.fixture(params=["encoder", "decoder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a folder with a small backbone and its tokenizer."""
    base: Any = models.encoder().bert if request.param == "encoder" else models.decoder().model
    base.float().save_pretrained(tmp_path / "base")
    models.tokenizer(model_max_length=32).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def embedder(folder: str) -> Any:
    transformer = modules.Transformer(folder)
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    return library.SentenceTransformer(modules=[transformer, pooling], device="cpu")


def attached(folder: str, method: str) -> Any:
    """Return the embedder with a random adapter on its backbone."""
    model = embedder(folder)
    fastprefix.attach(model.transformers_model, METHODS[method](), check=False)
    models.randomize(model.transformers_model, 0.5)
    return model


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_embeddings_are_pooled_from_the_tokens_alone(method: str, folder: str) -> None:
    model = attached(folder, method)
    backbone, tokenizer = model.transformers_model, models.tokenizer()
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            rows.append(backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy())
    for pooling, choose in POOLINGS.items():
        model[1] = modules.Pooling(models.WIDTH, pooling)
        actual, expected = model.encode(TEXTS, batch_size=3), [choose(row) for row in rows]
        np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-4, atol=1e-4, equal_nan=False)


@pytest.mark.parametrize("method", ["prefix", "prompt_tuning", "adept"])
def test_the_adapter_alone_is_trained_and_restored(method: str, folder: str, tmp_path: Path) -> None:
    model = attached(folder, method)
    backbone = model.transformers_model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    texts = {"anchor": ["w5 w6", "w7 w8", "w9", "w20"], "positive": ["w6 w5", "w8 w7", "w9 w9", "w21"]}
    options = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = library.SentenceTransformerTrainer(
        model,
        args=library.SentenceTransformerTrainingArguments(str(tmp_path / "out"), **options),
        train_dataset=Dataset.from_dict(texts),
        loss=losses.MultipleNegativesRankingLoss(model),
        optimizers=(torch.optim.AdamW(fastprefix.parameter_groups(backbone)), None),
    )
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".fastprefix." in name}

    expected = model.encode(TEXTS)
    fastprefix.save_adapter(backbone, tmp_path / "adapter")
    model.save(str(tmp_path / "whole"))
    for source in (tmp_path / "adapter", tmp_path / "whole", tmp_path / "out" / "checkpoint-2"):
        other = embedder(folder)
        fastprefix.load_adapter(other.transformers_model, source)
        np.testing.assert_allclose(other.encode(TEXTS), expected, rtol=1e-5, atol=1e-5, equal_nan=False)
    whole = library.SentenceTransformer(str(tmp_path / "whole"), device="cpu")  # without the adapter
    fastprefix.load_adapter(whole.transformers_model, tmp_path / "whole")
    np.testing.assert_allclose(whole.encode(TEXTS), expected, rtol=1e-5, atol=1e-5, equal_nan=False)

    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*fastprefix"):  # its trainer loads the base alone
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
