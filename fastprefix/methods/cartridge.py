"""Cartridges (Eyuboglu et al., "Cartridges: lightweight and general-purpose long context representations via
self-study", arXiv 2506.06266).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .base import LearningRates, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig


@dataclass(kw_only=True)
class CartridgeConfig(PrefixTuningConfig):
    """Prefix tuning with the defaults of a cartridge, a long prefix that represents a document.

    The prefix starts from the keys and values of a text. Its first token is frozen, because models use it as an
    attention sink. The positions of the input tokens are shifted by the length of the prefix, as with a key/value
    cache. The options are those of ``PrefixTuningConfig``. The most important ones are:

    Args:
        num_virtual_tokens: the number of tokens ``m``. A text must have at least as many.
        init: "text" starts from the first m tokens of ``init_text``, "chunks" from pieces spaced evenly over it, and
            "cache" from the ``past_key_values`` that are passed to ``attach``.
        init_text: the document. It is not saved, published or printed, since documents can be private.
        num_frozen_tokens: the number of first tokens that are not trained.
        train: "both", "values" or "keys".
        key_bias: True trains a bias for each key.
        add_special_tokens: True lets the tokenizer add special tokens to the text.
        position_shift: the number of positions by which the input tokens are moved. None means m.
    """

    learning_rates: ClassVar[LearningRates] = LearningRates(rest=2e-2)

    init: Literal["normal", "zero", "text", "chunks", "cache"] = "text"
    init_text: str | None = field(default=None, repr=False)
    add_special_tokens: bool = True
    prefix_position: Literal["none", "shift"] = "shift"
    num_frozen_tokens: int = 1


register("cartridge", CartridgeConfig, PrefixTuning)
