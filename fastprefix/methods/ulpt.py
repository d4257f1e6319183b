"""ULPT, ultra-low-dimensional prompt tuning (arXiv 2502.04501, EACL 2026)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import check_count, check_positive, register
from .budget import embedding_width, largest_within
from .computed_prompt import ComputedPrompt, ComputedPromptConfig


@dataclass(kw_only=True)
class ULPTConfig(ComputedPromptConfig):
    """A prompt of very few parameters, ``s * (Z R) + b`` with a frozen random ``R [r, d]``.

    Trained are ``Z [m, r]``, which starts at normal(0, 1), ``s [d]``, at 1, and ``b [d]``, at 0. ``R`` is uniform in
    +-sqrt(6 / (r + d)) and is not saved: the seed is.

    Args:
        rank: ``r``, in the paper from 2 to 64.
        seed: that ``R`` is drawn from.
    """

    rank: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rank", self.rank)
        check_count("seed", self.seed)

    @classmethod
    def for_budget(cls, model: nn.Module, *, trainable: int, num_virtual_tokens: int, **options: Any) -> "ULPTConfig":
        """Use the largest rank whose parameters, ``m r + 2 d``, stay within ``trainable``."""
        d = embedding_width(model)
        rank = largest_within("trainable", trainable, fixed=2 * d, each=num_virtual_tokens)
        return cls(num_virtual_tokens, rank=rank, **options)


class ULPT(ComputedPrompt):
    """The low-dimensional prompt, the frozen projection and the scale and shift behind it."""

    config: ULPTConfig
    projection: Tensor

    def __init__(self, config: ULPTConfig, shape: Any) -> None:
        super().__init__(config, shape)
        self.low_dimensional = nn.Parameter(torch.empty(config.num_virtual_tokens, config.rank))
        self.scale = nn.Parameter(torch.empty(shape.width))
        self.shift = nn.Parameter(torch.empty(shape.width))
        self.register_buffer("projection", draw_projection(config.seed, config.rank, shape.width), persistent=False)

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """``Z ~ normal(0, 1)``, ``s = 1``, ``b = 0``."""
        nn.init.normal_(self.low_dimensional)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)

    def compute_prompt(self) -> Tensor:
        """``s * (Z R) + b``."""
        return self.scale * (self.low_dimensional @ self.projection) + self.shift


def draw_projection(seed: int, rank: int, width: int) -> Tensor:
    """Draw ``R [r, d]``, uniform in +-sqrt(6 / (r + d)), on the CPU: the same from the same seed everywhere."""
    uniform = torch.rand(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return ((2.0 * uniform - 1.0) * math.sqrt(6.0 / (rank + width))).float()


register("ulpt", ULPTConfig, ULPT)
