"""Prefixes one behind the other, as one prefix (composition of cartridges, arXiv 2506.06266 and 2606.04557)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import METHODS, MethodConfig, PrefixMethod, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig
from .shapes import AttentionShape


@dataclass(kw_only=True)
class CompositionConfig(MethodConfig):
    """The configurations of prefixes that stand one behind the other. ``fastprefix.compose`` makes it.

    Args:
        parts: the configurations of the prefixes, each as ``to_dict`` describes it.
        trainable: which of the parts are trained.
    """

    kind: ClassVar[str] = "prefix"
    init_text: ClassVar[None] = None
    init: ClassVar[str] = "normal"

    parts: list[dict[str, Any]]
    trainable: list[bool]

    def __post_init__(self) -> None:
        super().__post_init__()
        configs = self.make_configs()
        if len(configs) != len(self.trainable):
            raise ValueError(
                f"`trainable` must have an entry for each of {len(configs)} parts, got {len(self.trainable)}"
            )
        if unknown := [type(each).__name__ for each in configs if not isinstance(each, PrefixTuningConfig)]:
            raise ValueError(f"`parts` must be prefixes of prefix tuning or a method built on it, got {unknown[0]}")
        if any(config.softmax != "joint" for config in configs):
            raise ValueError('`parts` must be prefixes with softmax="joint": a softmax of its own has no other part')
        if self.num_virtual_tokens != sum(config.num_virtual_tokens for config in configs):
            raise ValueError(f"`num_virtual_tokens` must be the length of all parts, got {self.num_virtual_tokens}")
        for name in ("prefix_position", "attentions"):
            values = [getattr(config, name) for config in configs]
            if any(value != values[0] for value in values):
                raise ValueError(f"`{name}` must be the same in all parts, got {values}")

    def make_configs(self) -> list[Any]:
        """Return the configurations of the parts."""
        return [MethodConfig.from_dict(part) for part in self.parts]

    @property
    def prefix_position(self) -> str:
        """Return the position of all parts."""
        return str(self.make_configs()[0].prefix_position)


class Composition(PrefixMethod):
    """Keys and values of several prefixes, concatenated. Parts that are not trained come without a gradient.

    The parts may be those of other adapters, which then share their parameters with this one.
    """

    config: CompositionConfig

    def __init__(
        self, config: CompositionConfig, shapes: Sequence[AttentionShape], parts: Sequence[PrefixTuning] = ()
    ) -> None:
        super().__init__(config, shapes)
        made: Sequence[Any] = parts
        if not parts:
            classes: list[Any] = [METHODS[each["method"]][1] for each in config.parts]
            made = [each(of, shapes) for each, of in zip(classes, config.make_configs(), strict=True)]
        self.parts = nn.ModuleList(made)
        self.former: list[tuple[nn.Parameter, bool]] = []  # what of frozen parts was trained before they were frozen

    @classmethod
    def chosen_layers(cls, config: CompositionConfig, shapes: Sequence[AttentionShape]) -> Sequence[int]:
        """Return the layers of the first part. All parts have the same."""
        return PrefixTuning.chosen_layers(config.make_configs()[0], shapes)

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Leave the parts as they are: they come from adapters or from files."""

    def freeze_parts(self) -> None:
        """Freeze the parts that are not trained, until ``release_parts``."""
        frozen = [part for part, trained in self._pair_parts() if not trained]
        self.former = [(parameter, parameter.requires_grad) for part in frozen for parameter in part.parameters()]
        for parameter, _ in self.former:
            parameter.requires_grad_(False)

    def release_parts(self) -> None:
        """Let the parts be trained as before ``freeze_parts``, for adapters of which they are parts too."""
        for parameter, trained in self.former:
            parameter.requires_grad_(trained)
        self.former = []

    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, with constant gates multiplied in."""
        parts = [_compute_pairs(part, trained) for part, trained in self._pair_parts()]
        return [
            (torch.cat([key for key, _ in pairs], dim=1), torch.cat([value for _, value in pairs], dim=1))
            for pairs in zip(*parts, strict=True)
        ]

    def key_bias(self, layer: int) -> Tensor | None:
        """``[Hkv, m]``, with 0 for parts that have none, or None if no part has biases."""
        biases = [part.key_bias(layer) for part, _ in self._pair_parts()]
        given = next((bias for bias in biases if bias is not None), None)
        if given is None:
            return None
        lengths = [part.config.num_virtual_tokens for part, _ in self._pair_parts()]
        pieces = [
            given.new_zeros(given.shape[0], length) if bias is None else bias
            for bias, length in zip(biases, lengths, strict=True)
        ]
        return torch.cat(pieces, dim=1)

    def head_parameters(self) -> dict[str, Literal["keys", "queries"]]:
        """Those of the parts."""
        parts = enumerate(part.head_parameters() for part, _ in self._pair_parts())
        return {f"parts.{number}.{name}": kind for number, names in parts for name, kind in names.items()}

    def frozen_tokens(self) -> int:
        """Count the first tokens, of leading frozen parts and the first trained one.

        Constant gates that are trained get their gradient through the keys, and none of their tokens counts.
        """
        count = 0
        for part, trained in self._pair_parts():
            if trained:
                return count + (part.frozen_tokens() if part.constant_gate(0) is None else 0)
            count += part.config.num_virtual_tokens
        return count

    def position_shift(self) -> int:
        """Return the sum over the parts, as caches one behind the other would move the tokens."""
        return sum(part.position_shift() for part, _ in self._pair_parts())

    def baked(self) -> PrefixTuning:
        """Return one free prefix."""
        length, shift = self.config.num_virtual_tokens, self.position_shift()
        config = PrefixTuningConfig(
            length,
            modules_to_save=self.config.modules_to_save,
            prefix_position="shift" if shift else "none",
            position_shift=None if shift in (0, length) else shift,
            attentions=self.config.make_configs()[0].attentions,
            num_frozen_tokens=self.frozen_tokens(),
            key_bias=self.key_bias(0) is not None,
        )
        baked = PrefixTuning(config, self.shapes)
        baked.set_prefixes(self.prefixes())
        if config.key_bias:
            biases = [self.key_bias(layer) for layer in range(len(self.shapes))]
            baked.key_biases = nn.ParameterList(bias.detach().clone() for bias in biases if bias is not None)
        return baked

    def _pair_parts(self) -> Iterator[tuple[Any, bool]]:
        return zip(self.parts, self.config.trainable, strict=True)


def _compute_pairs(part: PrefixTuning, trained: bool) -> list[tuple[Tensor, Tensor]]:
    pairs = part.gated_prefixes()
    return pairs if trained else [(key.detach(), value.detach()) for key, value in pairs]


register("composition", CompositionConfig, Composition)
