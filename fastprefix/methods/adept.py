"""ADePT (Tang, Hu, Liu, "ADePT: adaptive decomposed prompt tuning", ICLR 2025)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.checks import check_probability
from .base import LearningRates, check_positive, register
from .budget import find_largest, read_embedding_width
from .prompt_tuning import PromptTuning, PromptTuningConfig


@dataclass(kw_only=True)
class ADePTConfig(PromptTuningConfig):
    """A short prompt, and a small network that is applied to every token: ``e + relu(e w1 + b1) w2 + b2``.

    The published learning rates are 0.3 to 0.4 for the prompt and 1e-4 for the network. The published setting at
    d = 768 is m = 60, r = 19.

    Args:
        bottleneck_dim: width ``r`` of the network's hidden layer.
        dropout: dropout probability of the hidden layer in training, applied before the ReLU. The paper's formula has
            no dropout. The authors' code uses 0.1.
    """

    learning_rates: ClassVar[LearningRates] = LearningRates(rest=1e-4)

    bottleneck_dim: int = 19
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("bottleneck_dim", self.bottleneck_dim)
        check_probability("dropout", self.dropout)

    @classmethod
    def for_budget(cls, model: nn.Module, *, trainable: int, num_virtual_tokens: int, **options: Any) -> "ADePTConfig":
        """Return the configuration with the largest ``r`` for which ``m d + 2 d r + r + d <= trainable``."""
        d = read_embedding_width(model)
        r = find_largest("trainable", trainable, fixed=(num_virtual_tokens + 1) * d, each=2 * d + 1)
        return cls(num_virtual_tokens, bottleneck_dim=r, **options)


class ADePT(PromptTuning):
    """A prompt and a network. ``w2`` and both biases start at 0, so the offset starts at 0."""

    config: ADePTConfig
    changes_tokens = True

    def __init__(self, config: ADePTConfig, shape: Any) -> None:
        super().__init__(config, shape)
        d, r = shape.width, config.bottleneck_dim
        self.w1 = nn.Parameter(torch.empty(d, r))
        self.b1 = nn.Parameter(torch.empty(r))
        self.w2 = nn.Parameter(torch.empty(r, d))
        self.b2 = nn.Parameter(torch.empty(d))

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Draw ``w1 ~ U(-1/sqrt(r), 1/sqrt(r))`` as in the authors' code, and set the rest of the network to 0."""
        super().reset_parameters(table, init_ids)
        bound = 1.0 / math.sqrt(self.config.bottleneck_dim)
        nn.init.uniform_(self.w1, -bound, bound)
        for parameter in (self.b1, self.w2, self.b2):
            nn.init.zeros_(parameter)

    def offset(self, tokens: int, first_position: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the network as arguments of ``prompt_embedding``. It does not depend on the position."""
        ffn = tuple(parameter.to(dtype) for parameter in (self.w1, self.b1, self.w2, self.b2))
        return {"ffn": ffn, "dropout_p": self.config.dropout if self.training else 0.0}


register("adept", ADePTConfig, ADePT)
