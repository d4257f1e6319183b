"""VPT, visual prompt tuning (Jia et al., "Visual prompt tuning", ECCV 2022, arXiv 2203.12119)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import MethodConfig, VisualMethod, check_choice, register
from .shapes import VisionShape


@dataclass(kw_only=True)
class VisualPromptConfig(MethodConfig):
    """Learned rows ``[m, d]`` between the class token and the patches of a vision transformer.

    Rows start uniform in +-sqrt(6 / (c + d)), where ``c`` is the count of numbers in a patch, as in the authors' code.

    Args:
        depth: "shallow", rows in front of the first layer, which go through all layers with the image; "deep", each
            layer has new rows in their place.
        dropout: on the rows, while training. It draws anew for every image.
    """

    kind: ClassVar[str] = "visual"
    init_text: ClassVar[None] = None

    depth: Literal["shallow", "deep"] = "shallow"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("depth", self.depth, ("shallow", "deep"))
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"`dropout` must be a probability from 0 to 1, got {self.dropout!r}")


class VisualPrompt(VisualMethod):
    """The rows of the first layer, or of each layer."""

    config: VisualPromptConfig

    def __init__(self, config: VisualPromptConfig, shape: VisionShape) -> None:
        super().__init__(config, shape)
        count = shape.layers if config.depth == "deep" else 1
        self.prompts = nn.Parameter(torch.empty(count, config.num_virtual_tokens, shape.width))

    def reset_parameters(self) -> None:
        """Uniform in +-sqrt(6 / (c + d))."""
        bound = math.sqrt(6.0 / (self.shape.patch + self.shape.width))
        nn.init.uniform_(self.prompts, -bound, bound)

    def sees_tokens(self, training: bool) -> str | None:
        """Return the reason for which rows differ by image. In the deep form no layer reads those of another."""
        if self.config.depth == "shallow":
            return "its rows see the image"
        if self.config.dropout > 0.0 and training:
            return "dropout on its rows draws anew for every image"
        return None

    def make_rows(self, layer: int, former: Tensor | None, batch: int) -> Tensor:
        """Return the rows of a layer: new ones ``[B, m, d]``, or what the layer before made of its rows."""
        if former is not None and self.config.depth == "shallow":
            return former
        rows = self.prompts[layer].expand(batch, -1, -1)
        return nn.functional.dropout(rows, self.config.dropout, self.training)


register("visual_prompt", VisualPromptConfig, VisualPrompt)
