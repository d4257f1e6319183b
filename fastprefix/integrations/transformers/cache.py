"""A key/value cache that stands for a prefix: it counts the prefix's tokens, and holds none of them.

A model that is given one computes positions and masks as with a cache that holds the prefix, expanded to the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .attention import GivenPrefix


class PrefixCache(Cache):
    """The keys and values of the tokens after a prefix; for calls that carry it, also the prefix, by module."""

    def __init__(self, layers: int, length: int, prefixes: Mapping[nn.Module, GivenPrefix] | None = None) -> None:
        super().__init__(layers=[PrefixCacheLayer(length) for _ in range(layers)])
        self.prefixes = prefixes or {}
        self.length = length

    def bindings(self) -> dict[nn.Module, GivenPrefix]:
        """What the next call's attention modules are bound to."""
        past = int(self.get_seq_length()) - self.length
        return {module: replace(prefix, past=past) for module, prefix in self.prefixes.items()}


class PrefixCacheLayer(DynamicLayer):
    """One layer's tokens, after a prefix of ``prefix_length``."""

    def __init__(self, prefix_length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix_length = prefix_length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens; the first ones are kept as they are, not copied."""
        if self.is_initialized:
            keys, values = super().update(key_states, value_states)
            return keys, values
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """How many tokens came before, those of the prefix too."""
        return self.prefix_length + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there are, and at which position they begin: after the prefix."""
        return int(super().get_seq_length()) + query_length, self.prefix_length
