"""Cartridges (Eyuboglu et al., "Cartridges: lightweight and general-purpose long context representations via
self-study", arXiv 2506.06266).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import LearningRates, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig


@dataclass(kw_only=True)
class CartridgeConfig(PrefixTuningConfig):
    """Prefix tuning with the defaults of a cartridge, a long prefix that represents a document.

    The prefix starts from the keys and values of a text. Its first token is frozen, because models use it as an
    attention sink. The positions of the input tokens are shifted by the length of the prefix, as with a key/value
    cache.
    """

    learning_rates: ClassVar[LearningRates] = LearningRates(rest=2e-2)

    init: Literal["normal", "zero", "text", "chunks", "cache"] = "text"
    add_special_tokens: bool = True
    prefix_position: Literal["none", "shift"] = "shift"
    num_frozen_tokens: int = 1


register("cartridge", CartridgeConfig, PrefixTuning)
