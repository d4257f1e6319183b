"""Find out what PEFT supports with the installed transformers, because many tests compare with it.

PEFT 0.21 looks for a model's ``past_key_values``. transformers 5.24 calls them ``cache``: PEFT then refuses prefixes
where it runs the head itself, and ``generate`` of its prompts and prefixes starts anew with every token.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable

import peft
import pytest
import torch

from . import models

INSTALLED = " with ".join(f"{name} {importlib.metadata.version(name)}" for name in ("peft", "transformers"))


@functools.cache
def prefixes_of_classifiers() -> bool:
    """Run a classifier with a prefix, whose head PEFT runs."""
    model = peft.get_peft_model(models.encoder(), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    try:
        model.double()(**models.batch())
    except ValueError:
        return False
    return True


@functools.cache
def generation() -> bool:
    """Generate two tokens after a prompt, with a cache and without one."""
    torch.manual_seed(0)
    model = peft.get_peft_model(models.decoder(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    ids = models.batch()["input_ids"]
    with torch.no_grad():
        tokens = model.double().eval().generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        for _ in range(2):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return torch.equal(tokens, ids)


@functools.cache
def layers_in_models() -> bool:
    """Add PEFT's layers by a method of ``transformers``, which refuses some versions of PEFT."""
    try:
        models.decoder().add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    except ValueError:
        return False
    return True


def require(ability: Callable[[], bool]) -> None:
    """Skip a test if PEFT lacks an ability, or fail it if the environment variable REQUIRE_PEFT is set."""
    if not ability():
        stop = pytest.fail if os.environ.get("REQUIRE_PEFT") else pytest.skip
        stop(f"PEFT lacks {ability.__name__.replace('_', ' ')}: {INSTALLED}")
