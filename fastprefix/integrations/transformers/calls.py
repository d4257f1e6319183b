"""Reading and changing the arguments of a forward call in a hook, whichever way the caller passed them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model that turns embeddings into hidden states; some families do not name theirs."""
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional forward arguments, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def past_length(arguments: Mapping[str, Any]) -> int:
    """How many tokens are in the key/value cache that a call brings."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def shifted_positions(arguments: Mapping[str, Any], batch_tokens: Tensor, past: int, shift: int) -> Tensor:
    """Position ids moved up by ``shift``; those of a caller who gave none count from ``past``."""
    positions = arguments.get("position_ids")
    if positions is None:
        tokens = batch_tokens.shape[1]
        positions = torch.arange(past, past + tokens, device=batch_tokens.device)[None]
    return positions + shift
