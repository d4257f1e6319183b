"""Use a model without its adapters as the reference model of preference optimization, without a second copy."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attachment import get_attachment, use_adapter
from .models.switching import evaluating
from .models.tuners import disable_tuners, find_base_model


class ReferenceModel(nn.Module):
    """A view of a model that runs it without fastprefix adapters and without PEFT's layers.

    Pass it to trainers that require a reference model, such as ``DPOTrainer(model, ref_model=ReferenceModel(model))``
    of TRL. It has no parameters. Each call disables the adapters and enables them again afterwards. After ``eval()`` of
    this view, its calls run without dropout.

    Args:
        model: a model with a method attached, or a PEFT model around one.

    Raises:
        ValueError: if the model has no method attached.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        get_attachment(model)
        self._held = (find_base_model(model),)  # in a tuple, so that PyTorch does not register the model as a submodule

    @property
    def _model(self) -> PreTrainedModel:
        return self._held[0]

    @property
    def config(self) -> Any:
        """Return the configuration of the model."""
        return self._model.config

    @property
    def device(self) -> Any:
        """Return the device of the model."""
        return self._model.device

    @property
    def dtype(self) -> Any:
        """Return the dtype of the model."""
        return self._model.dtype

    def get_output_embeddings(self) -> Any:
        """Return the output embeddings (the head) of the model."""
        return self._model.get_output_embeddings()

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model without its adapters and without its head."""
        return self._run(self._model.base_model, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model without its adapters."""
        return self._run(self._model, args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = nullcontext() if self.training else evaluating(self._model)
        with use_adapter(self._model, None), disable_tuners(self._model), mode:
            return module(*args, **kwargs)
