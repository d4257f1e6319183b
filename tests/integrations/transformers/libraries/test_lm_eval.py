"""Test lm-evaluation-harness on a decoder with an adapter: log-likelihoods, generation, and a whole task."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix

from .... import models
from ..test_attach import METHODS

harness = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
tasks = pytest.importorskip("lm_eval.tasks")
instances = pytest.importorskip("lm_eval.api.instance")
pytestmark = pytest.mark.filterwarnings("ignore")
REQUESTS = [("w5 w6 w7", " w8 w9"), ("w10", " w11"), ("w15 w16", " w17 w18 w19"), ("w5 w6 w7", " w8 w12")]
METHOD_NAMES = ["prefix", "apt", "prompt_tuning", "adept"]


def attached(method: str) -> tuple[Any, Any]:
    """Return a decoder with a random adapter, alone and wrapped for the harness, in batches of two."""
    model = fastprefix.attach(models.decoder(), METHODS[method](), check=False)
    models.randomize(model, 1.0)
    tokenizer = models.tokenizer(model_max_length=32)
    return model, huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=32)


def log_likelihood(model: Any, context: str, target: str) -> float:
    """Return the log-likelihood of a target after a context, computed by the model alone."""
    tokenizer = models.tokenizer()
    ids = tokenizer(context + target, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    count = len(tokenizer(target)["input_ids"])
    return float(log_probabilities.gather(1, ids[0, 1:, None])[-count:].sum())


def make_requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [instances.Instance(kind, {}, each, 0) for each in arguments]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_log_likelihoods(method: str) -> None:
    model, wrapped = attached(method)
    found = wrapped.loglikelihood(make_requests("loglikelihood", REQUESTS), disable_tqdm=True)
    for (context, target), (actual, _) in zip(REQUESTS, found, strict=True):
        assert actual == pytest.approx(log_likelihood(model, context, target), rel=1e-5)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_generation(method: str) -> None:
    model, wrapped = attached(method)
    tokenizer, options = models.tokenizer(), {"until": ["nothing"], "max_gen_toks": 4, "do_sample": False}
    texts = [context for context, _ in REQUESTS[:3]]
    found = wrapped.generate_until(make_requests("generate_until", [(t, options) for t in texts]), disable_tqdm=True)
    for text, actual in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert actual == tokenizer.decode(tokens, skip_special_tokens=True).partition("w2")[0]  # the end, as text


def test_a_task(tmp_path: Path) -> None:
    """The accuracy on multiple-choice questions, with and without the adapter."""
    model, wrapped = attached("prefix")
    rows = [{"text": f"w{i} w{i + 1}", "choices": ["w50", "w60"]} for i in range(5, 25)]
    for row in rows:
        likely = [log_likelihood(model, str(row["text"]), f" {choice}") for choice in row["choices"]]
        row["label"] = likely.index(max(likely))
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
    }

    manager = tasks.TaskManager(include_defaults=False)  # does not read thousands of files

    def evaluate() -> float:
        options = {"tasks": [task], "task_manager": manager, "bootstrap_iters": 0}
        results = harness.simple_evaluate(model=wrapped, **options)["results"]
        return float(results["choices"]["acc,none"])

    assert evaluate() == 1.0
    with fastprefix.disable_adapter(model):
        assert evaluate() < 1.0
