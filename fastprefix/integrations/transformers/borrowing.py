"""A model run on another attention function for a while, and left as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

_LOCK = threading.Lock()


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set a model's attention, and that of parts with a copy of its configuration (T5's halves), which older
    ``transformers`` pass over.
    """
    model.set_attn_implementation(name)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part.config) is type(model.config):
            part.config._attn_implementation_internal = name


@contextmanager
def borrowed(model: PreTrainedModel, name: str, function: Any, mask: Any) -> Iterator[None]:
    """A model on another attention function and mask function, for evaluation without gradients; one at a time."""
    with _LOCK, forgotten(model), attention_implementation(model, name, function, mask), torch.no_grad():
        yield


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str, function: Any, mask: Any) -> Iterator[None]:
    """A model on another attention function and mask function, which have a name meanwhile."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)
    try:
        set_attention(model, name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


@contextmanager
def forgotten(model: nn.Module) -> Iterator[None]:
    """``evaluated``, and what modules remember of the calls is forgotten, such as Qwen-VL's positions of a batch."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with evaluated(model):
            yield
    finally:
        for module, attributes in before:
            now = vars(module)
            now.clear()
            now.update(attributes)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode back afterwards; the random state is left alone too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training
