"""Prompt methods on an encoder-decoder: the prompt stands before the encoder's tokens, and the decoder sees it too."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...methods import PromptMethod
from .calls import by_name, parameter_names
from .prompt import PromptAttachment

_MASK = "encoder_attention_mask"


class EncoderPromptAttachment(PromptAttachment):
    """A prompt method for an encoder-decoder of text.

    The encoder's output keeps the prompt's rows, ``[B, S + N, d]``; the mask ``[B, N]`` that the decoder is given
    for it is extended.
    """

    def __init__(self, model: PreTrainedModel, method: PromptMethod) -> None:
        super().__init__(model, method, model.get_encoder())
        self.decoder: nn.Module = model.get_decoder()
        self.decoder_names = parameter_names(self.decoder)
        missing = [name for name in ("inputs_embeds", "attention_mask") if name not in self.names]
        if missing or _MASK not in self.decoder_names:
            raise ValueError(
                f"model takes one whose encoder takes inputs_embeds and attention_mask, and whose decoder takes "
                f"{_MASK}; in {type(model).__name__} there is no {missing[0] if missing else _MASK}"
            )

    def install(self, model: PreTrainedModel) -> None:
        """Set the hooks."""
        self.handles = [
            self.backbone.register_forward_pre_hook(self.insert, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self.extend_mask, with_kwargs=True),
        ]

    def extend_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the decoder: all of its tokens see the prompt."""
        arguments = by_name(self.decoder_names, args, kwargs)
        mask, states = arguments.get(_MASK), arguments.get("encoder_hidden_states")
        length = self.method.config.num_virtual_tokens
        if mask is None or states is None or mask.shape[-1] + length != states.shape[1]:
            return None  # nothing is hidden, or the caller's mask counts the prompt
        if mask.ndim != 2:
            raise ValueError(f"attention_mask takes [B, N] with a prompt in every row, got {list(mask.shape)}")
        extended = nn.functional.pad(mask, (length, 0), value=1)
        return (), {**arguments, _MASK: extended}
