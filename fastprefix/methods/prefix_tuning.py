"""Prefix tuning (Li & Liang, ACL 2021; as P-tuning v2, Liu et al., ACL 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import MethodConfig, PrefixMethod, check_choice, check_count, check_positive, register
from .shapes import AttentionShape, Role


@dataclass(kw_only=True)
class PrefixTuningConfig(MethodConfig):
    """Learned keys and values ``[Hkv, m, D]`` before those of the tokens, in every attention layer.

    Args:
        reparameterization: None, the keys and values are parameters; "mlp", they are computed, once a step, as
            ``W2 tanh(W1 E + b1) + b2`` from an embedding ``E [m, d]``.
        hidden_dim: width of the MLP's hidden layer.
        init: of free keys and values: "normal", normal(0, 0.02) as in P-tuning v2; "zero"; "text", what the frozen
            model itself computes for a text, repeated to m tokens.
        init_text: the text, for ``init="text"``.
        prefix_position: "none", tokens keep their positions; "shift", they are moved up by m, as when a prefix is
            passed as a key/value cache (PEFT, P-tuning v2).
        attentions: which attention layers get a prefix: "encoder" and "decoder", the self-attention of each, "cross",
            the attention of a decoder to its encoder. None: all.
        num_frozen_tokens: how many of the first tokens keep the keys and values that they start with, as in a
            cartridge. No gradient, optimizer step or weight decay changes them.
    """

    kind: ClassVar[str] = "prefix"

    reparameterization: Literal["mlp"] | None = None
    hidden_dim: int = 512
    init: Literal["normal", "zero", "text"] = "normal"
    init_text: str | None = None
    prefix_position: Literal["none", "shift"] = "none"
    attentions: tuple[Role, ...] | None = None
    num_frozen_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reparameterization", self.reparameterization, (None, "mlp"))
        check_positive("hidden_dim", self.hidden_dim)
        check_choice("init", self.init, ("normal", "zero", "text"))
        check_choice("prefix_position", self.prefix_position, ("none", "shift"))
        self._check_attentions()
        self._check_frozen()
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError(f'init_text goes with init="text", got init={self.init!r}, init_text={self.init_text!r}')
        if self.reparameterization is not None and self.init != "normal":
            raise ValueError(
                f"init={self.init!r} is for free keys and values, got reparameterization={self.reparameterization!r}"
            )

    def _check_frozen(self) -> None:
        """Check that there are as many tokens to freeze, and that each has keys and values of its own."""
        check_count("num_frozen_tokens", self.num_frozen_tokens)
        if self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                f"`num_frozen_tokens` must be at most `num_virtual_tokens`, which is {self.num_virtual_tokens}, got "
                f"{self.num_frozen_tokens}"
            )
        if self.num_frozen_tokens and self.reparameterization is not None:
            raise ValueError(
                f"`num_frozen_tokens` must be 0 with a reparameterization, which computes all tokens from shared "
                f"weights, got {self.num_frozen_tokens}: use reparameterization=None"
            )

    def _check_attentions(self) -> None:
        """One or more roles, as a tuple: files have lists."""
        if self.attentions is None:
            return
        if not isinstance(self.attentions, tuple | list) or not self.attentions:
            raise ValueError(f'attentions takes None or some of "encoder", "decoder", "cross", got {self.attentions!r}')
        for role in self.attentions:
            check_choice("attentions", role, ("encoder", "decoder", "cross"))
        self.attentions = tuple(self.attentions)


class FreePrefix(nn.Module):
    """Keys and values as parameters: those of the first ``frozen`` tokens apart from the others, without a gradient."""

    def __init__(self, length: int, shapes: Sequence[AttentionShape], frozen: int = 0) -> None:
        super().__init__()
        self.frozen = frozen
        self.set(
            [
                (torch.empty(s.kv_heads, length, s.key_size), torch.empty(s.kv_heads, length, s.value_size))
                for s in shapes
            ]
        )

    def set(self, prefixes: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the parameters copies of these keys and values of all tokens."""
        keys, values = zip(*prefixes, strict=True)
        self.keys, self.values = self._parameters_of(keys), self._parameters_of(values)
        if self.frozen:
            self.frozen_keys, self.frozen_values = self._frozen_of(keys), self._frozen_of(values)

    def _parameters_of(self, tensors: Sequence[Tensor]) -> nn.ParameterList:
        return nn.ParameterList(tensor[:, self.frozen :].detach().clone() for tensor in tensors)

    def _frozen_of(self, tensors: Sequence[Tensor]) -> nn.ParameterList:
        frozen = nn.ParameterList(tensor[:, : self.frozen].detach().clone() for tensor in tensors)
        return frozen.requires_grad_(False)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        keys, values = list(self.keys), list(self.values)
        if self.frozen:
            keys = [torch.cat(pair, dim=1) for pair in zip(self.frozen_keys, keys, strict=True)]
            values = [torch.cat(pair, dim=1) for pair in zip(self.frozen_values, values, strict=True)]
        return list(zip(keys, values, strict=True))


class ReparameterizedPrefix(nn.Module):
    """``W2 tanh(W1 E' + b1) + b2``, cut into the keys and values of every layer; ``E' = E``, or with a residual network
    ``E + MLP_res(E)``.
    """

    def __init__(
        self, length: int, shapes: Sequence[AttentionShape], hidden_dim: int, residual: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.shapes = tuple(shapes)
        self.embedding = nn.Parameter(torch.empty(length, shapes[0].width))
        self.residual = residual
        self.project_in = nn.Linear(shapes[0].width, hidden_dim)
        self.project_out = nn.Linear(hidden_dim, sum(self._sizes()))

    def _sizes(self) -> list[int]:
        """Columns of keys and values, layer by layer."""
        return [s.kv_heads * size for s in self.shapes for size in (s.key_size, s.value_size)]

    def reset_parameters(self) -> None:
        """Initialize the embedding like a table, and the layers as PyTorch does."""
        nn.init.normal_(self.embedding, std=1.0)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        embedding = self.embedding
        if self.residual is not None:
            embedding = embedding + self.residual(embedding)
        columns = self.project_out(torch.tanh(self.project_in(embedding))).split(self._sizes(), dim=-1)
        heads = [s.kv_heads for s in self.shapes for _ in ("key", "value")]
        blocks = [c.unflatten(-1, (h, -1)).transpose(0, 1) for c, h in zip(columns, heads, strict=True)]
        return list(zip(blocks[::2], blocks[1::2], strict=True))


class PrefixTuning(PrefixMethod):
    """The prefix, free or reparameterised."""

    config: PrefixTuningConfig

    def __init__(self, config: PrefixTuningConfig, shapes: Sequence[AttentionShape]) -> None:
        super().__init__(config, shapes)
        self.prefix = self._make_prefix()

    @classmethod
    def chosen_layers(cls, config: PrefixTuningConfig, shapes: Sequence[AttentionShape]) -> Sequence[int]:
        """Those of the roles in ``attentions``."""
        wanted, found = config.attentions, sorted({shape.role for shape in shapes})
        chosen = [index for index, shape in enumerate(shapes) if wanted is None or shape.role in wanted]
        if not chosen:
            raise ValueError(f"`attentions` must name some of what the model has ({', '.join(found)}), got {wanted!r}")
        return chosen

    def _make_prefix(self) -> FreePrefix | ReparameterizedPrefix:
        length = self.config.num_virtual_tokens
        if self.config.reparameterization is None:
            return FreePrefix(length, self.shapes, self.config.num_frozen_tokens)
        return ReparameterizedPrefix(length, self.shapes, self.config.hidden_dim)

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Initialise as ``init`` says."""
        if isinstance(self.prefix, ReparameterizedPrefix):
            self.prefix.reset_parameters()
            return
        if self.config.init == "text" and text_keys_values is None:
            raise ValueError('init="text" takes the keys and values of the text')
        with torch.no_grad():
            former = self.prefixes()
            initial = text_keys_values or [(self._draw(key), self._draw(value)) for key, value in former]
            pairs = zip(initial, former, strict=True)
            self.prefix.set([(new[0].to(old[0]), new[1].to(old[1])) for new, old in pairs])

    def _draw(self, tensor: Tensor) -> Tensor:
        """Return initial values of a tensor's shape that come from no text."""
        return torch.zeros_like(tensor) if self.config.init == "zero" else nn.init.normal_(tensor.clone(), std=0.02)

    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer."""
        prefixes: list[tuple[Tensor, Tensor]] = self.prefix()
        return prefixes

    def set_prefixes(self, prefixes: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the free keys and values copies of these."""
        assert isinstance(self.prefix, FreePrefix)
        self.prefix.set(prefixes)

    def baked(self) -> PrefixTuning:
        """Return a free prefix: compute a reparameterization, and multiply gates in."""
        config = PrefixTuningConfig(
            self.config.num_virtual_tokens,
            modules_to_save=self.config.modules_to_save,
            prefix_position=self.config.prefix_position,
            attentions=self.config.attentions,
            num_frozen_tokens=self.config.num_frozen_tokens,
        )
        baked = PrefixTuning(config, self.shapes)
        baked.set_prefixes(self._gated_prefixes())
        return baked

    def _gated_prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values times what of their gate does not depend on the input."""
        gates = [self.constant_gate(layer) for layer in range(len(self.shapes))]
        weights = [1.0 if gate is None else gate.unsqueeze(-1) for gate in gates]
        return [(w * key, w * value) for w, (key, value) in zip(weights, self.prefixes(), strict=True)]

    def constant_gate(self, layer: int) -> Tensor | None:
        """Return the part of a layer's gate that does not depend on the input, a scalar or ``[m]``, or None."""
        return self.prefix_gate(layer, None, None)


register("prefix_tuning", PrefixTuningConfig, PrefixTuning)
