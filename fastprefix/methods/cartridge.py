"""Cartridges (Eyuboglu et al., "Cartridges: lightweight and general-purpose long context representations via
self-study", arXiv 2506.06266).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import LearningRates, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig


@dataclass(kw_only=True)
class CartridgeConfig(PrefixTuningConfig):
    """Prefix tuning with the defaults of a cartridge: a long prefix that stands for a document.

    It starts from the keys and values of a text, its first token is frozen, since models use that as an attention sink,
    and tokens stand behind it as they would behind a key/value cache.
    """

    learning_rates: ClassVar[LearningRates] = LearningRates(rest=2e-2)

    init: Literal["normal", "zero", "text", "chunks", "cache"] = "text"
    add_special_tokens: bool = True
    prefix_position: Literal["none", "shift"] = "shift"
    num_frozen_tokens: int = 1


register("cartridge", CartridgeConfig, PrefixTuning)
