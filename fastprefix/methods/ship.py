"""SHIP, semantic hierarchical prompts for vision transformers (arXiv 2412.16956, ICASSP 2025)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import MethodConfig, VisualMethod, check_choice, check_count, check_finite, check_positive, register
from .shapes import VisionShape


@dataclass(kw_only=True)
class SHIPConfig(MethodConfig):
    """Prompt tokens in selected layers of a vision transformer, with a separate softmax.

    Each entered layer gets K new prompt tokens (``num_virtual_tokens``). The last two entered layers also get attribute
    tokens. Prompt tokens pass through the following layers until the next entered layer replaces them. Shared tokens
    are one tensor that is inserted again into every layer.

    In all layers but the last, the attention output of the image tokens is ``1 - s`` times a softmax over the image
    tokens plus ``s`` times a softmax over the prompt tokens. The prompt tokens do not attend to other tokens there.
    All prompt tokens start uniformly distributed in +-sqrt(6 / (c + d)), where ``c`` is the number of values in a
    patch, as in VPT.

    Args:
        layers: indices of the entered layers. The first one must be 0. None enters all layers. ``find_entered_layers``
            chooses them from images.
        num_shared: number of shared tokens.
        num_attribute: number of attribute tokens.
        strength: weight ``s`` of the softmax over the prompt tokens.
        bank: frozen prototypes ``[C, d]`` of the features of training images (see ``compute_bank``). An attribute token
            is then ``0.1 pattern + 0.9 learned``. Its pattern is ``softmax(cos(x, bank)) bank``, where x is one of the
            patches with the largest attention of the class token in the layer before. With None, attribute tokens are
            only learned. The configuration holds the number C as ``bank`` and the values as ``prototypes``. That of a
            saved adapter has only the number, for which ``check=False`` of ``attach`` draws random values.
        matching_loss: True stores a loss in ``model.fastprefix.matching_loss`` in each call. Add it to the loss of the
            task. It is ``0.5 mean_i min_j (1 - cos(p_i, v_j))`` over the prompt tokens ``p_i`` and the 10 patches
            ``v_j`` with the largest attention of the class token, at the input of the last layer.
        prototypes: the values of the bank. Pass them as ``bank``.
    """

    kind: ClassVar[str] = "visual"
    init_text: ClassVar[None] = None

    layers: list[int] | None = None
    num_shared: int = 10
    num_attribute: int = 10
    strength: float = 0.1
    bank: Any = None
    matching_loss: bool = False
    prototypes: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_shared", self.num_shared)
        check_count("num_attribute", self.num_attribute)
        check_finite("strength", self.strength)
        check_choice("matching_loss", self.matching_loss, (False, True))
        if not 0.0 < self.strength < 1.0:
            raise ValueError(f"`strength` must be between 0 and 1, got {self.strength!r}")
        if isinstance(self.bank, Tensor):
            if self.bank.ndim != 2 or not self.bank.is_floating_point():
                raise ValueError(
                    f"`bank` must be a floating-point tensor [C, d], got {self.bank.dtype} {list(self.bank.shape)}"
                )
            self.prototypes, self.bank = self.bank.detach(), len(self.bank)
        if self.bank is not None:
            check_positive("bank", self.bank)
        if self.prototypes is not None and len(self.prototypes) != self.bank:  # a copy with another bank
            self.prototypes = None
        self._check_layers()

    def _check_layers(self) -> None:
        layers = self.layers
        if layers is None:
            return
        if not isinstance(layers, Sequence) or not all(type(layer) is int for layer in layers):
            raise TypeError(f"`layers` must be None or a list of whole numbers, got {layers!r}")
        if not layers or layers[0] != 0 or sorted(set(layers)) != list(layers):
            raise ValueError(f"`layers` must be different numbers in ascending order from 0 on, got {layers!r}")
        self.layers = list(layers)


class SHIP(VisualMethod):
    """The prompt tokens of entered layers, attribute tokens, and shared tokens."""

    config: SHIPConfig

    def __init__(self, config: SHIPConfig, shape: VisionShape) -> None:
        super().__init__(config, shape)
        self.entered = list(range(shape.layers)) if config.layers is None else config.layers
        if self.entered[-1] >= shape.layers:
            raise ValueError(
                f"`layers` must be below {shape.layers}, the number of layers of the model, got {config.layers}"
            )
        if config.prototypes is not None and config.prototypes.shape[1] != shape.width:
            raise ValueError(
                f"`bank` must have {shape.width} columns, the width of the model, got {config.prototypes.shape[1]}"
            )
        self.attributed = self.entered[-2:] if config.num_attribute else []
        d = shape.width
        self.prompts = nn.Parameter(torch.empty(len(self.entered), config.num_virtual_tokens, d))
        # Parameters without values would never get a gradient, for which DistributedDataParallel waits.
        self.attributes = nn.Parameter(
            torch.empty(len(self.attributed), config.num_attribute, d), requires_grad=config.num_attribute > 0
        )
        self.shared = nn.Parameter(torch.empty(config.num_shared, d), requires_grad=config.num_shared > 0)
        if config.bank is not None:
            self.bank = nn.Parameter(torch.empty(config.bank, d), requires_grad=False)
        self.matching_loss: Tensor | None = None

    def reset_parameters(self) -> None:
        """Draw parameters uniformly from +-sqrt(6 / (c + d)), and copy the bank or draw a random one."""
        bound = math.sqrt(6.0 / (self.shape.patch + self.shape.width))
        for parameter in (self.prompts, self.attributes, self.shared):
            nn.init.uniform_(parameter, -bound, bound)
        if self.config.bank is None:
            return
        with torch.no_grad():
            given = self.config.prototypes
            _ = nn.init.normal_(self.bank) if given is None else self.bank.copy_(given)

    def strength(self, layer: int) -> float | None:
        """Return ``s``, or None for the last layer."""
        return self.config.strength if layer + 1 < self.shape.layers else None

    def make_rows(self, layer: int, former: Tensor | None, batch: int) -> Tensor:
        """Return the prompt tokens of a layer that are the same for every image."""
        shared = self.shared.expand(batch, -1, -1)
        if layer not in self.entered:
            assert former is not None
            return torch.cat([former[:, : former.shape[1] - self.config.num_shared], shared], dim=1)
        parts = [self.prompts[self.entered.index(layer)].expand(batch, -1, -1)]
        if layer in self.attributed and not self.reads_tokens(layer):
            parts.append(self.attributes[self.attributed.index(layer)].expand(batch, -1, -1))
        return torch.cat([*parts, shared], dim=1)

    def reads_tokens(self, layer: int) -> bool:
        """Return True if a layer gets attribute tokens that depend on the image. The first layer never does."""
        return self.config.bank is not None and layer in self.attributed and layer > 0

    def make_image_rows(self, layer: int, given: Tensor | None) -> Tensor | None:
        """Return the prompt tokens ``[B, A, d]`` of a layer that depend on the image, or None.

        If ``reads_tokens`` is True, ``given [B, A, d]`` are the patches with the largest attention of the class token
        in the layer before. Otherwise, ``given`` are the image-dependent prompt tokens that the layer before returned.
        """
        if not self.reads_tokens(layer):
            return None if layer in self.entered else given
        assert given is not None
        similarity = F.normalize(given, dim=-1) @ F.normalize(self.bank.to(given), dim=-1).mT
        pattern = similarity.softmax(-1) @ self.bank.to(given)
        return 0.1 * pattern + 0.9 * self.attributes[self.attributed.index(layer)].to(given)

    def compute_matching_loss(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Compute ``0.5 mean_i min_j (1 - cos(p_i, v_j))``.

        ``p`` are the prompt tokens ``rows [B, P, d]`` and ``v`` are the patches ``tokens [B, T, d]``.
        """
        similarity = F.normalize(rows, dim=-1) @ F.normalize(tokens, dim=-1).mT
        return 0.5 * (1.0 - similarity.amax(-1)).mean()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the loss of the last call, so that copies do not keep its graph."""
        return {**self.__dict__, "matching_loss": None}


register("ship", SHIPConfig, SHIP)
