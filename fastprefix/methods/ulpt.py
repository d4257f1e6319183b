"""ULPT, ultra-low-dimensional prompt tuning (arXiv 2502.04501, EACL 2026)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import check_count, check_positive, register
from .budget import find_largest, read_embedding_width
from .computed_prompt import ComputedPrompt, ComputedPromptConfig


@dataclass(kw_only=True)
class ULPTConfig(ComputedPromptConfig):
    """A prompt with few parameters, ``s * (Z R) + b``, where ``R [r, d]`` is random and frozen.

    The trained parameters are ``Z [m, r]``, ``s [d]`` and ``b [d]``. They start at normal(0, 1), 1 and 0. ``R`` is
    drawn uniformly from +-sqrt(6 / (r + d)). An adapter saves the seed instead of ``R``.

    Args:
        rank: rank ``r``. The paper uses 2 to 64.
        seed: random seed of ``R``.
    """

    rank: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rank", self.rank)
        check_count("seed", self.seed)

    @classmethod
    def for_budget(cls, model: nn.Module, *, trainable: int, num_virtual_tokens: int, **options: Any) -> "ULPTConfig":
        """Return the configuration with the largest rank ``r`` for which ``m r + 2 d <= trainable``."""
        d = read_embedding_width(model)
        rank = find_largest("trainable", trainable, fixed=2 * d, each=num_virtual_tokens)
        return cls(num_virtual_tokens, rank=rank, **options)


class ULPT(ComputedPrompt):
    """A low-dimensional prompt, a frozen projection, and a scale and shift of its result."""

    config: ULPTConfig
    projection: Tensor

    def __init__(self, config: ULPTConfig, shape: Any) -> None:
        super().__init__(config, shape)
        self.low_dimensional = nn.Parameter(torch.empty(config.num_virtual_tokens, config.rank))
        self.scale = nn.Parameter(torch.empty(shape.width))
        self.shift = nn.Parameter(torch.empty(shape.width))
        self.register_buffer("projection", draw_projection(config.seed, config.rank, shape.width), persistent=False)

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Draw ``Z`` from normal(0, 1), and set ``s = 1`` and ``b = 0``."""
        nn.init.normal_(self.low_dimensional)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)

    def _apply(self, fn: Any, recurse: bool = True) -> "ULPT":
        """Convert or move the module. Draw ``R`` again, since a conversion back from 16 bits cannot restore it."""
        former = self.projection
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch declares no types for it
        if self.projection is not former:
            self.projection = draw_projection(self.config.seed, *former.shape).to(self.projection)
        return self

    def compute_prompt(self) -> Tensor:
        """Compute ``s * (Z R) + b``."""
        return self.scale * (self.low_dimensional @ self.projection) + self.shift


def draw_projection(seed: int, rank: int, width: int) -> Tensor:
    """Draw ``R [r, d]`` uniformly from +-sqrt(6 / (r + d)).

    This runs on the CPU in float64, so that a seed gives the same numbers on every device.
    """
    uniform = torch.rand(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return ((2.0 * uniform - 1.0) * math.sqrt(6.0 / (rank + width))).float()


register("ulpt", ULPTConfig, ULPT)
