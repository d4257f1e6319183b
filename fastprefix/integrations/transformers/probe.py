"""Finding a model's attention layers by running it once on two tokens: whatever calls the attention interface, is one.

That needs no knowledge of model families. It also gives the keys and values that a text has in every layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ...methods import AttentionShape
from ...methods.budget import embedding_width
from .attention import fastprefix_attention
from .masks import fastprefix_mask, read_mask

_NAME = "fastprefix_probe"
_LOCK = threading.Lock()


@dataclass
class Layer:
    """An attention module, and what it was called with."""

    name: str
    module: nn.Module
    shape: AttentionShape
    key: Tensor
    value: Tensor


def text_keys_values(model: PreTrainedModel, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` that the model computes for ids ``[m]``, layer by layer."""
    return [(layer.key[0], layer.value[0]) for layer in find_layers(model, input_ids[None])]


def find_layers(model: PreTrainedModel, input_ids: Tensor | None = None) -> list[Layer]:
    """The attention layers of a model, in the order in which they are called. Run on ``input_ids`` ``[1, N]``.

    Raises:
        ValueError: the model's attention does not go through the attention interface.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"model takes a model whose attention goes through the attention interface, got {_name(model)}"
        )
    if input_ids is None:
        input_ids = torch.zeros(1, 2, dtype=torch.long)
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, Layer] = {}

    def probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        shape = AttentionShape(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            key_size=key.shape[3],
            value_size=value.shape[3],
            width=_hidden_size(module, model),
            causal=_is_causal(mask, query),
        )
        calls.setdefault(module, Layer(names[module], module, shape, key, value))
        return fastprefix_attention(module, query, key, value, mask, **kwargs)

    with _LOCK, _evaluated(model), attention_implementation(model, _NAME, probe), torch.no_grad():
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    if not calls:
        raise ValueError(
            f"{_name(model)} never called the attention interface: it has no attention to give a prefix to"
        )
    return list(calls.values())


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str, function: Any) -> Iterator[None]:
    """Run a model on another attention function for a while."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, fastprefix_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode back afterwards; the random state is left alone too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _is_causal(mask: Tensor | None, query: Tensor) -> bool:
    """Whether the first of two tokens is kept from seeing the second."""
    masking = read_mask(mask, query)
    if masking.is_causal or masking.attn_mask is None:
        return masking.is_causal
    seen = masking.attn_mask[0, 0, 0, -1]
    return not bool(seen) if seen.dtype is torch.bool else bool(seen < -1)


def _hidden_size(module: nn.Module, model: PreTrainedModel) -> int:
    config = getattr(module, "config", model.config)
    return int(getattr(config, "hidden_size", None) or embedding_width(model))


def _name(model: nn.Module) -> str:
    return type(model).__name__
