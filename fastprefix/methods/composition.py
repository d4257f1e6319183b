"""Several prefixes, concatenated into one (composition of cartridges, arXiv 2506.06266 and 2606.04557)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import METHODS, LearningRates, MethodConfig, PrefixMethod, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig
from .shapes import AttentionShape


@dataclass(kw_only=True)
class CompositionConfig(MethodConfig):
    """The configurations of several concatenated prefixes. ``fastprefix.compose`` creates it.

    Args:
        parts: the configurations of the prefixes, each as returned by ``to_dict``.
        trainable: for each part, True if it is trained.
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
            raise ValueError(
                '`parts` must be prefixes with softmax="joint", because one with softmax="own" shares its softmax with '
                "no other prefix"
            )
        if self.num_virtual_tokens != sum(config.num_virtual_tokens for config in configs):
            raise ValueError(
                f"`num_virtual_tokens` must be the total length of all parts, got {self.num_virtual_tokens}"
            )
        for name in ("prefix_position", "attentions"):
            values = [getattr(config, name) for config in configs]
            if any(value != values[0] for value in values):
                raise ValueError(f"`{name}` must be the same in all parts, got {values}")

    def make_configs(self) -> list[Any]:
        """Return the configurations of the parts."""
        return [MethodConfig.from_dict(part) for part in self.parts]

    @property
    # A property in place of the class's attribute, since each composition has its own parts.
    def learning_rates(self) -> LearningRates:  # type: ignore[override]
        """Return the lowest rates of the trained parts, or of all parts if none is trained."""
        configs = self.make_configs()
        rates = [config.learning_rates for config, trained in zip(configs, self.trainable, strict=True) if trained]
        rates = rates or [config.learning_rates for config in configs]
        gates = [each.gates for each in rates if each.gates is not None]
        return LearningRates(rest=min(each.rest for each in rates), gates=min(gates, default=None))

    @property
    def prefix_position(self) -> str:
        """Return the ``prefix_position`` that all parts share."""
        return str(self.make_configs()[0].prefix_position)


class Composition(PrefixMethod):
    """The concatenated keys and values of several prefixes. Parts that are not trained get no gradient.

    The parts may belong to other adapters, which then share their parameters with this one.
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
        self.former: list[tuple[nn.Parameter, bool]] = []  # of frozen parts, and their former ``requires_grad``

    @classmethod
    def chosen_layers(cls, config: CompositionConfig, shapes: Sequence[AttentionShape]) -> Sequence[int]:
        """Return the layers of the first part. All parts have the same layers."""
        return PrefixTuning.chosen_layers(config.make_configs()[0], shapes)

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Do nothing. The parts come from adapters or files, which initialize them."""

    def list_frozen(self) -> list[nn.Parameter]:
        """Return the parameters of the parts that are not trained."""
        return [parameter for part, trained in self._pair_parts() if not trained for parameter in part.parameters()]

    def freeze_parts(self) -> None:
        """Freeze the parts that are not trained, until ``release_parts``."""
        self.former = [(parameter, parameter.requires_grad) for parameter in self.list_frozen()]
        for parameter, _ in self.former:
            parameter.requires_grad_(False)

    def release_parts(self) -> None:
        """Restore ``requires_grad`` from before ``freeze_parts``, for other adapters with the same parts."""
        for parameter, trained in self.former:
            parameter.requires_grad_(trained)
        self.former = []

    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of every layer, multiplied by gates that do not depend on the input."""
        parts = [_compute_pairs(part, trained) for part, trained in self._pair_parts()]
        return [
            (torch.cat([key for key, _ in pairs], dim=1), torch.cat([value for _, value in pairs], dim=1))
            for pairs in zip(*parts, strict=True)
        ]

    def key_bias(self, layer: int) -> Tensor | None:
        """Return biases ``[Hkv, m]``, which are 0 for parts without biases, or None if no part has any."""
        biases = [_compute_bias(part, trained, layer) for part, trained in self._pair_parts()]
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
        """Return the parameters of all parts that have a dimension of heads."""
        parts = enumerate(part.head_parameters() for part, _ in self._pair_parts())
        return {f"parts.{number}.{name}": kind for number, names in parts for name, kind in names.items()}

    def frozen_tokens(self) -> int:
        """Return the number of frozen tokens in the leading frozen parts and at the start of the first trained part.

        If the first trained part has a constant gate, none of its tokens is counted, because the gate gets its
        gradient through the keys and values.
        """
        count = 0
        for part, trained in self._pair_parts():
            if trained:
                return count + (part.frozen_tokens() if part.constant_gate(0) is None else 0)
            count += part.config.num_virtual_tokens
        return count

    def position_shift(self) -> int:
        """Return the sum over the parts, which is the shift of concatenated key/value caches."""
        return sum(part.position_shift() for part, _ in self._pair_parts())

    def baked(self) -> PrefixTuning:
        """Return one free prefix with the keys and values of all parts."""
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


def _compute_bias(part: PrefixTuning, trained: bool, layer: int) -> Tensor | None:
    bias = part.key_bias(layer)
    return bias if trained or bias is None else bias.detach()


register("composition", CompositionConfig, Composition)
