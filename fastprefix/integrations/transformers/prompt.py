"""Run prompt methods on a model: the backbone gets the prompt before the tokens, the caller gets his tokens alone.

The hooks sit on the backbone, so heads, labels and losses see only the tokens that the caller passed. In an
encoder-decoder the prompt stands before the encoder's tokens, and the decoder sees it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...methods import PromptMethod
from .discovery import backbone_of
from .hooks import Positions, by_name, checked_names, find_cache, past_length, refuse_packed, refuse_replicas


class PromptHooks:
    """A prompt method for a model; its hooks are set from ``install`` to ``remove``."""

    def __init__(self, model: PreTrainedModel, method: PromptMethod, backbone: nn.Module | None = None) -> None:
        self.method = method
        self.backbone: Any = backbone_of(model) if backbone is None else backbone
        self.model = model
        self.names = checked_names(self.backbone)
        self.positions = Positions.of(self.backbone)
        self.inserted = 0  # prompt rows of the call in progress
        self.handles: list[RemovableHandle] = []

    def install(self, model: PreTrainedModel) -> None:
        """Set the hooks."""
        self.handles = [
            self.backbone.register_forward_pre_hook(self.insert, with_kwargs=True),
            self.backbone.register_forward_hook(self.crop),
        ]
        pooler = getattr(self.backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            self.handles.append(pooler.register_forward_pre_hook(self.crop_pooled))

    @property
    def embedding(self) -> Any:
        """The model's, which may be given another one."""
        return self.model.get_input_embeddings()

    @property
    def table(self) -> Tensor:
        """The embedding table."""
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    def insert(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the backbone: embeddings with the prompt; masks, positions and types to match."""
        refuse_replicas(module)
        arguments = by_name(self.names, args, kwargs)
        refuse_packed(arguments, self.backbone.config)
        ids, rows = self.tokens(arguments)
        length = self.method.config.num_virtual_tokens
        past = past_length(arguments)
        if getattr(find_cache(arguments), "is_compileable", False):
            raise ValueError(
                "past_key_values, cache_implementation: takes a cache that grows, since the prompt's rows are in it "
                "beside the tokens, got a static one"
            )
        self.inserted = 0 if past > 0 else length
        embeds = self.embed(ids, rows, max(past - length, 0), with_prompt=self.inserted > 0)
        limit = self.positions.limit
        if limit is not None and past + embeds.shape[1] > limit:
            raise ValueError(
                f"num_virtual_tokens = {length} and an input of {past + embeds.shape[1] - length} tokens exceed the "
                f"model's {limit} positions"
            )
        arguments.update(input_ids=None, inputs_embeds=embeds)
        self._extend(arguments, embeds, length)
        return (), {name: value for name, value in arguments.items() if value is not None or name in kwargs}

    def crop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the backbone: hidden states of the caller's tokens."""
        if self.inserted == 0:
            return output
        if isinstance(output, tuple):
            return (output[0][:, self.inserted :], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, self.inserted :]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(state[:, self.inserted :] for state in output.hidden_states)
        return output

    def crop_pooled(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Forward pre-hook of a pooler inside the backbone: it pools the caller's first token, not the prompt's."""
        return (args[0][:, self.inserted :], *args[1:])

    def remove(self) -> None:
        """Take everything back."""
        for handle in self.handles:
            handle.remove()

    def tokens(self, arguments: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """The caller's ids ``[B, N]``, or his embeddings ``[B, N, d]``: one of them.

        Raises:
            ValueError: none or both of them.
        """
        ids, rows = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if (ids is None) == (rows is None):
            raise ValueError("input_ids or inputs_embeds: takes exactly one of them")
        return ids, rows

    def embed(self, ids: Tensor | None, rows: Tensor | None, first_position: int, with_prompt: bool) -> Tensor:
        """The embeddings ``[B, S + N, d]`` with the method's offset, without the prompt ``[B, N, d]``."""
        if ids is not None and type(self.embedding) is nn.Embedding and self.embedding.max_norm is None:
            return self.method.embed(ids, self.table, first_position, with_prompt)
        # An embedding that does more than look up (scaling, for one), or rows from the caller: they are the table.
        if rows is None:
            rows = self.embedding(ids)
        positions = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).reshape(rows.shape[:2])
        return self.method.embed(positions, rows.flatten(0, 1), first_position, with_prompt)

    def _extend(self, arguments: dict[str, Any], embeds: Tensor, length: int) -> None:
        """Masks, positions and token types for the prompt's rows."""
        batch, inserted = embeds.shape[0], self.inserted
        mask = arguments.get("attention_mask")
        if mask is not None:
            arguments["attention_mask"] = _extended_mask(mask, batch, length, inserted)
        positions = arguments.get("position_ids")
        if positions is not None:
            first = self.positions.first
            prompt = torch.arange(first, first + inserted, device=positions.device).expand(positions.shape[0], -1)
            arguments["position_ids"] = torch.cat([prompt, positions + length], dim=1)
        types = arguments.get("token_type_ids")
        if types is not None:
            arguments["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], inserted), types], dim=1)


def _extended_mask(mask: Any, batch: int, length: int, inserted: int) -> Tensor:
    """A mask for a prompt of so many tokens too, which all tokens see.

    In a mask for each query the prompt's own rows are causal. That leaves open what a prompt sees of the tokens where
    these see one another ahead.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return torch.cat([mask.new_ones(batch, length), mask], dim=1)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or inserted == 0:
        raise ValueError("attention_mask takes [B, K] with a prompt in every row, or without a cache [B, 1, N, N]")
    seen, hidden = (True, False) if mask.dtype is torch.bool else (0.0, torch.finfo(mask.dtype).min)
    tokens = mask.shape[3]
    if mask.shape[2] != tokens or (mask.triu(1) == seen).logical_and(mask.new_ones(tokens, tokens).triu(1) != 0).any():
        raise ValueError("attention_mask takes a causal [B, 1, N, N], or [B, K], with a prompt in every row")
    extended = mask.new_full((*mask.shape[:2], length + tokens, length + tokens), seen)
    extended[:, :, :length].masked_fill_(extended.new_ones(length, length + tokens).triu(1) != 0, hidden)
    extended[:, :, length:, length:] = mask
    return extended


_MASK = "encoder_attention_mask"


class EncoderPromptHooks(PromptHooks):
    """A prompt method for an encoder-decoder of text.

    The encoder's output keeps the prompt's rows, ``[B, S + N, d]``; the mask ``[B, N]`` that the decoder is given
    for it is extended.
    """

    def __init__(self, model: PreTrainedModel, method: PromptMethod) -> None:
        super().__init__(model, method, model.get_encoder())
        self.decoder: nn.Module = model.get_decoder()
        self.decoder_names = checked_names(self.decoder)
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
