"""Describe how methods would run on a model, given only its configuration.

The methods are tried on a small copy of the model with random weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from transformers import AutoConfig, PreTrainedModel

from ...methods import PromptTuningConfig
from .attachment import attach, detach, get_method
from .models.discovery import CopyError, find_layers, make_small_copy
from .vision.visual_prompt import find_vision_stack


def preview(name: str) -> Iterator[str]:
    """Yield lines that describe how methods would run on a model.

    Only the configuration is read. No remote code is run.

    Args:
        name: a local folder, or a model name on the hub or in its local cache.

    Raises:
        OSError: if no configuration is found.
        ValueError: if ``transformers`` itself has no model for the configuration.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    try:
        model = make_small_copy(config, whole=True)
    except CopyError:
        yield "model         has no small copy that runs. Attach a method to it and read model.fastprefix.prompt_path"
        return
    yield f"model         {type(model).__name__} ({config.model_type}), tried with random weights"
    yield f"prompts       {_describe_prompts(model)}"
    yield f"prefixes      {_describe_prefixes(model)}"
    if (rows := _describe_rows(model)) is not None:
        yield f"visual        {rows}"


def _describe_prompts(model: PreTrainedModel) -> str:
    try:
        attach(model, PromptTuningConfig(1))
    except ValueError as error:
        return f"none: {error}"
    path = get_method(model).prompt_path
    detach(model)
    return "shared: run once for the whole batch" if path == "shared" else f"in every row ({path})"


def _describe_rows(model: PreTrainedModel) -> str | None:
    """Describe visual prompts, or return None for a model without images."""
    try:
        stack = find_vision_stack(model)
    except ValueError:
        return None
    how = "once for the whole batch" if stack.reason is None else f"in every image ({stack.reason})"
    return f"{len(stack.blocks)} layers; deep prompts run {how}"


def _describe_prefixes(model: PreTrainedModel) -> str:
    try:
        layers = find_layers(model)
    except ValueError as error:
        return f"none: {error}"
    windows = Counter(layer.window for layer in layers if layer.window is not None)
    windowed = "".join(f", {count} with a sliding window of {window}" for window, count in windows.items())
    return f"{len(layers)} attention layers{windowed}"
