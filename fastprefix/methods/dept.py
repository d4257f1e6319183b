"""DePT (Shi & Lipani, "DePT: decomposed prompt tuning for parameter-efficient fine-tuning", ICLR 2024)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import LearningRates, check_finite, check_positive, register
from .budget import find_largest, read_embedding_width
from .prompt_tuning import PromptTuning, PromptTuningConfig


@dataclass(kw_only=True)
class DePTConfig(PromptTuningConfig):
    """A short prompt, and a low-rank offset ``scale (a b)_i`` that is added to the token at position i.

    The published learning rates are 0.3 to 0.4 for the prompt and 1e-4 to 5e-3 for ``a`` and ``b``. The published
    setting at d = 768 is m = 60, r = 30, T = 256.

    Args:
        rank: rank ``r`` of ``a [T, r]`` and ``b [r, d]``.
        max_length: maximum input length ``T``. Longer inputs raise an error, because they have no offset.
        alpha: the scale is ``alpha / sqrt(r)``, as in the authors' code.
    """

    learning_rates: ClassVar[LearningRates] = LearningRates(rest=1e-3)

    rank: int = 30
    max_length: int = 256
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rank", self.rank)
        check_positive("max_length", self.max_length)
        check_finite("alpha", self.alpha)

    @classmethod
    def for_budget(
        cls, model: nn.Module, *, trainable: int, num_virtual_tokens: int, max_length: int = 256, **options: Any
    ) -> "DePTConfig":
        """Return the configuration with the largest rank ``r`` for which ``m d + r (T + d) <= trainable``."""
        d = read_embedding_width(model)
        rank = find_largest("trainable", trainable, fixed=num_virtual_tokens * d, each=max_length + d)
        return cls(num_virtual_tokens, rank=rank, max_length=max_length, **options)


class DePT(PromptTuning):
    """A prompt and the factors ``a`` and ``b`` of an offset. ``b`` starts at 0, so the offset starts at 0."""

    config: DePTConfig
    changes_tokens = True
    changes_positions = True

    def __init__(self, config: DePTConfig, shape: Any) -> None:
        super().__init__(config, shape)
        self._make_offset()

    def _make_offset(self) -> None:
        """Create the parameters of the offset."""
        self.a = nn.Parameter(torch.empty(self.config.max_length, self.config.rank))
        self.b = nn.Parameter(torch.empty(self.config.rank, self.shape.width))

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Initialize the prompt, draw ``a ~ U(-1/sqrt(r), 1/sqrt(r))``, and set ``b = 0``."""
        super().reset_parameters(table, init_ids)
        self._reset_offset()

    def _reset_offset(self) -> None:
        bound = 1.0 / math.sqrt(self.config.rank)
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)

    def offset(self, tokens: int, first_position: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the offset of ``tokens`` tokens from ``first_position`` on, as arguments of ``prompt_embedding``.

        Raises:
            ValueError: the input is longer than ``max_length``.
        """
        end = self._check_end(tokens, first_position)
        pair = (self.a[first_position:end].to(dtype), self.b.to(dtype))
        return {"low_rank": pair, "offset_scale": self.config.alpha / math.sqrt(self.config.rank)}

    def _check_end(self, tokens: int, first_position: int) -> int:
        """Return the position after the last token, or raise ValueError if it is above ``max_length``."""
        end = first_position + tokens
        if end > self.config.max_length:
            raise ValueError(
                f"`input_ids` must have at most max_length = {self.config.max_length} tokens for "
                f"{type(self).__name__}, got {end}"
            )
        return end


register("dept", DePTConfig, DePT)
