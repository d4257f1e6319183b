"""PEFT's prefix tuning and cartridges: their keys and values as they are, instead of a cache expanded to the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ..transformers.attention import CARRIED, GivenPrefix
from ..transformers.discovery import Layer, backbone_of
from ..transformers.hooks import (
    by_name,
    cache_parameter,
    checked_names,
    find_cache,
    parameter_names,
    reentrant,
    refuse_one_row_masks,
    refuse_replicas,
    rows_for_masks,
)
from ..transformers.prefix import PrefixCache
from ..transformers.switching import Implementation, runs_with_adapter


class CachedPrefix:
    """A model whose attention takes its prefix from the ``PrefixCache`` that it is called with, if it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.backbone: Any = backbone_of(model)
        self.names = checked_names(self.backbone)
        self.cache_name = cache_parameter(self.names) or "past_key_values"
        self.implementation = Implementation(model, {})
        self.handles = [self.backbone.register_forward_pre_hook(self.begin, with_kwargs=True)]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the backbone: the call carries its prefix to the attention."""
        self.implementation.check()
        refuse_replicas(module)
        arguments = by_name(self.names, args, kwargs)
        if arguments.get("output_attentions") or getattr(self.backbone.config, "output_attentions", False):
            raise ValueError("output_attentions takes False on an accelerated model: its kernels make no weights")
        if self.backbone.config.is_encoder_decoder:
            refuse_one_row_masks(arguments)
        else:
            arguments = rows_for_masks(arguments)
        cache: Any = find_cache(arguments)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if isinstance(cache, PrefixCache):
            if runs_with_adapter(self.backbone):
                raise ValueError(
                    "`peft_model` has a base model with an adapter of fastprefix.attach in use, which cannot act in "
                    "the same call as an accelerated PEFT adapter: call the base model itself, or detach its adapter"
                )
            arguments[CARRIED] = cache.bindings()
        return (), arguments

    def remove(self) -> None:
        """Take everything back."""
        for handle in self.handles:
            handle.remove()
        self.implementation.restore()


class PrefixAcceleration(CachedPrefix):
    """``get_prompt`` of a PEFT model with prefixes gives a cache that does not hold them.

    ``layers`` are its attention layers by their ``layer_idx``, the places that they have in PEFT's cache; those of an
    encoder-decoder, in which the decoder attends to itself.
    """

    def __init__(self, peft_model: Any, layers: dict[int, Layer]) -> None:
        super().__init__(peft_model.base_model)
        self.layers = layers
        self.peft_model = peft_model
        peft_model.get_prompt = self.get_prompt
        self.handles += [
            layer.module.register_forward_pre_hook(_bias_prefix, with_kwargs=True)
            for layer in layers.values()
            if getattr(layer.module, "has_relative_attention_bias", False)
            and "position_bias" in parameter_names(layer.module)
        ]

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> PrefixCache | EncoderDecoderCache:
        """The active adapter's prefix, computed once a call, for whatever batch size."""
        peft_model = self.peft_model
        config = peft_model.active_peft_config
        encoder = peft_model.prompt_encoder[peft_model.active_adapter]
        length, heads, layers = config.num_virtual_tokens, config.num_attention_heads, config.num_layers
        rows = self._rows(encoder, config).to(peft_model.base_model.dtype)
        keys_values = rows.view(length, 2 * layers, heads, -1).permute(1, 2, 0, 3).unbind(0)
        two_halves = self.backbone.config.is_encoder_decoder
        # PEFT repeats the rows and gives each layer four in turn, of which cross-attention ignores its two.
        first = {i: (4 * i) % (2 * layers) if two_halves else 2 * i for i in self.layers}
        prefixes = {
            layer.module: GivenPrefix(keys_values[first[i]], keys_values[first[i] + 1], window=layer.window)
            for i, layer in self.layers.items()
        }
        cache = PrefixCache(layers, length, prefixes)
        return EncoderDecoderCache(cache, DynamicCache()) if two_halves else cache

    def _rows(self, encoder: Any, config: Any) -> Tensor:
        """All layers' keys and values ``[m, 2 L H D]``, as PEFT's encoder gives them."""
        if not (config.inference_mode or reentrant(self.backbone)):
            tokens = torch.arange(config.num_virtual_tokens, device=next(encoder.parameters()).device)
            rows: Tensor = encoder(tokens[None])[0]
            return rows
        # Reentrant checkpointing has every layer go back to the parameters: through views it can, else only once.
        if getattr(encoder, "prefix_projection", False) and not config.inference_mode:
            raise ValueError("prefix_projection takes gradient checkpointing with use_reentrant=False, got True")
        weight: Tensor = encoder.embedding.weight
        return weight

    def remove(self) -> None:
        """Take everything back."""
        super().remove()
        del self.peft_model.get_prompt


def _bias_prefix(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention that makes T5's relative biases: the prefix, which stands at the positions
    before all tokens, gets the first of them. T5 counts the keys, among which it is not.
    """
    binding = kwargs.get(CARRIED, {}).get(module)
    if binding is not None and kwargs.get("position_bias") is None:
        hidden = args[0] if args else kwargs["hidden_states"]
        queries, seen = hidden.shape[1], binding.key.shape[1] + binding.past
        bias = module.compute_bias(queries, seen + queries, device=hidden.device, past_seen_tokens=seen)
        kwargs["position_bias"] = bias
    return args, kwargs
