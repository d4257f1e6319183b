"""VPT, visual prompt tuning (Jia et al., "Visual prompt tuning", ECCV 2022, arXiv 2203.12119)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..ops.checks import check_probability
from .base import MethodConfig, VisualMethod, check_choice, register
from .shapes import VisionShape


@dataclass(kw_only=True)
class VisualPromptConfig(MethodConfig):
    """Learned prompt tokens ``[m, d]`` between the class token and the patches of a vision transformer.

    They start uniformly distributed in +-sqrt(6 / (c + d)), where ``c`` is the number of values in a patch, as in the
    authors' code.

    Args:
        depth: "shallow" inserts prompt tokens before the first layer, and they pass through all layers with the image.
            "deep" replaces them with new prompt tokens before each layer.
        dropout: dropout probability of the prompt tokens in training. Each image gets a different dropout mask.
    """

    kind: ClassVar[str] = "visual"
    init_text: ClassVar[None] = None

    depth: Literal["shallow", "deep"] = "shallow"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("depth", self.depth, ("shallow", "deep"))
        check_probability("dropout", self.dropout)


class VisualPrompt(VisualMethod):
    """The prompt tokens of the first layer, or of each layer."""

    config: VisualPromptConfig

    def __init__(self, config: VisualPromptConfig, shape: VisionShape) -> None:
        super().__init__(config, shape)
        count = shape.layers if config.depth == "deep" else 1
        self.prompts = nn.Parameter(torch.empty(count, config.num_virtual_tokens, shape.width))

    def reset_parameters(self) -> None:
        """Draw the prompt tokens uniformly from +-sqrt(6 / (c + d))."""
        bound = math.sqrt(6.0 / (self.shape.patch + self.shape.width))
        nn.init.uniform_(self.prompts, -bound, bound)

    def sees_tokens(self, training: bool) -> str | None:
        """Return the reason why prompt tokens differ between images, or None.

        With ``depth="deep"``, each layer starts from its own parameters, so only dropout makes them differ.
        """
        if self.config.depth == "shallow":
            return "its prompt tokens depend on the image"
        if self.config.dropout > 0.0 and training:
            return "dropout of its prompt tokens differs between images"
        return None

    def make_rows(self, layer: int, former: Tensor | None, batch: int) -> Tensor:
        """Return the prompt tokens ``[B, m, d]`` of a layer: new ones, or those that the layer before returned."""
        if former is not None and self.config.depth == "shallow":
            return former
        rows = self.prompts[layer].expand(batch, -1, -1)
        return nn.functional.dropout(rows, self.config.dropout, self.training)


register("visual_prompt", VisualPromptConfig, VisualPrompt)
