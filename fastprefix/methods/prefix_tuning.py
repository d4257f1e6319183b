"""Prefix tuning (Li & Liang, ACL 2021; as P-tuning v2, Liu et al., ACL 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from .base import MethodConfig, PrefixMethod, check_choice, check_count, check_positive, register
from .shapes import AttentionShape, Role


@dataclass(kw_only=True)
class PrefixTuningConfig(MethodConfig):
    """Learned keys and values ``[Hkv, m, D]`` before those of the tokens, in every attention layer.

    Args:
        reparameterization: None uses the keys and values themselves as parameters. "mlp" computes them in each step as
            ``W2 tanh(W1 E + b1) + b2`` from an embedding ``E [m, d]``.
        hidden_dim: width of the MLP's hidden layer.
        init: initial keys and values without a reparameterization. "normal" draws from normal(0, 0.02), as in P-tuning
            v2. "zero" sets them to 0. "text" uses those that the frozen model computes for the first m tokens of a
            text. A shorter text is repeated. "chunks" uses those of chunks sampled evenly over the text
            (arXiv 2508.17032). "cache" uses those of the ``past_key_values`` passed to ``attach``.
        init_text: the text for ``init="text"`` and ``init="chunks"``.
        chunk_tokens: length of a chunk for ``init="chunks"``.
        add_special_tokens: True lets the tokenizer add special tokens to the text, such as a beginning-of-sequence
            token.
        prefix_position: "none" keeps the positions of the tokens. "shift" increases them by m, as if the prefix were a
            key/value cache (PEFT, P-tuning v2).
        position_shift: number of positions by which "shift" moves the tokens. None means m. A compacted cache needs a
            larger number, because it represents more tokens than it has keys (Attention Matching, arXiv 2602.16284).
        attentions: attention layers that get a prefix. "encoder" and "decoder" select self-attention in each. "cross"
            selects the attention of a decoder to its encoder. None selects all.
        num_frozen_tokens: number of tokens at the start of the prefix that keep their initial keys and values, as in a
            cartridge. No gradient, optimizer step or weight decay changes them.
        train: "both", "values" or "keys" selects what is trained of the tokens that are not frozen. Gradients of the
            rest are not computed. Keys stay near their initial values in training, so values alone can absorb a text
            (arXiv 2508.17032).
        key_bias: True adds a trained bias to the scores of each prefix key, ``[Hkv, m]`` in each layer. Biases start
            at 0. A key with a bias b counts ``e^b`` times in the softmax, as in Attention Matching.
        softmax: "joint" uses one softmax for the prefix and the tokens. "own" uses a separate softmax for the prefix,
            whose output is multiplied by ``tanh(g_h)`` and added. There is one ``g_h`` per query head. It starts at 0,
            so training starts from the frozen model. The motivation is that prefix and input compete in one softmax
            (PrefixMemory-Tuning, arXiv 2506.13674). The gate is an addition of this package.
    """

    kind: ClassVar[str] = "prefix"

    reparameterization: Literal["mlp"] | None = None
    hidden_dim: int = 512
    init: Literal["normal", "zero", "text", "chunks", "cache"] = "normal"
    init_text: str | None = None
    chunk_tokens: int = 64
    add_special_tokens: bool = False
    prefix_position: Literal["none", "shift"] = "none"
    position_shift: int | None = None
    attentions: tuple[Role, ...] | None = None
    num_frozen_tokens: int = 0
    train: Literal["both", "values", "keys"] = "both"
    key_bias: bool = False
    softmax: Literal["joint", "own"] = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reparameterization", self.reparameterization, (None, "mlp"))
        check_positive("hidden_dim", self.hidden_dim)
        check_choice("init", self.init, ("normal", "zero", "text", "chunks", "cache"))
        check_choice("prefix_position", self.prefix_position, ("none", "shift"))
        check_choice("train", self.train, ("both", "values", "keys"))
        check_choice("softmax", self.softmax, ("joint", "own"))
        check_choice("key_bias", self.key_bias, (False, True))
        check_choice("add_special_tokens", self.add_special_tokens, (False, True))
        check_positive("chunk_tokens", self.chunk_tokens)
        self._check_attentions()
        self._check_frozen()
        self._check_shift()
        if (self.init in ("text", "chunks")) != (self.init_text is not None):
            raise ValueError(
                '`init_text` must be given with init="text" or init="chunks" and only then, got '
                f"init={self.init!r} {'without' if self.init_text is None else 'with'} `init_text`"
            )
        if self.reparameterization is not None and (self.init != "normal" or self.train != "both"):
            raise ValueError(
                f"`reparameterization` must be None for init={self.init!r} and train={self.train!r}, which require "
                f"keys and values that are parameters, got {self.reparameterization!r}"
            )

    def _check_shift(self) -> None:
        if self.position_shift is None:
            return
        check_positive("position_shift", self.position_shift)
        if self.prefix_position != "shift":
            raise ValueError(
                f'`position_shift` must be None without prefix_position="shift", got {self.position_shift}'
            )

    def _check_frozen(self) -> None:
        """Check that at most all tokens are frozen, and that their keys and values are parameters."""
        check_count("num_frozen_tokens", self.num_frozen_tokens)
        if self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                f"`num_frozen_tokens` must be at most `num_virtual_tokens`, which is {self.num_virtual_tokens}, got "
                f"{self.num_frozen_tokens}"
            )
        if self.num_frozen_tokens and self.reparameterization is not None:
            raise ValueError(
                f"`num_frozen_tokens` must be 0 with a reparameterization, which computes all tokens from shared "
                f"weights, got {self.num_frozen_tokens}. Use reparameterization=None"
            )

    def _check_attentions(self) -> None:
        """Check that ``attentions`` has one or more roles, and convert the list of a file to a tuple."""
        if self.attentions is None:
            return
        if not isinstance(self.attentions, tuple | list) or not self.attentions:
            raise ValueError(
                '`attentions` must be None or a tuple of some of "encoder", "decoder", "cross", got '
                f"{self.attentions!r}"
            )
        for role in self.attentions:
            check_choice("attentions", role, ("encoder", "decoder", "cross"))
        self.attentions = tuple(self.attentions)


class FreePrefix(nn.Module):
    """Keys and values as parameters. The first ``frozen`` tokens have separate parameters without a gradient.

    Keys of the other tokens have a gradient if ``trains_keys``, and values if ``trains_values``. The two parameters of
    a tensor share one storage, frozen tokens first, so that a view can return all tokens without a copy.
    """

    def __init__(
        self,
        length: int,
        shapes: Sequence[AttentionShape],
        frozen: int = 0,
        trains_keys: bool = True,
        trains_values: bool = True,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.trains_keys, self.trains_values = trains_keys, trains_values
        self.register_state_dict_post_hook(_separate_memory)  # type: ignore[no-untyped-call]
        self.set(
            [
                (torch.empty(s.kv_heads, length, s.key_size), torch.empty(s.kv_heads, length, s.value_size))
                for s in shapes
            ]
        )

    def set(self, prefixes: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set the parameters to copies of these keys and values of all tokens."""
        keys, values = zip(*prefixes, strict=True)
        trained = slice(self.frozen, None)
        self.keys = _copy_as_parameters(keys, trained, self.trains_keys)
        self.values = _copy_as_parameters(values, trained, self.trains_values)
        if self.frozen:
            self.frozen_keys = _copy_as_parameters(keys, slice(self.frozen), False)
            self.frozen_values = _copy_as_parameters(values, slice(self.frozen), False)
            self._share_memory()

    def _list_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return pairs of the parameters of frozen and of other tokens, alternately for keys and for values."""
        frozen = zip(self.frozen_keys, self.frozen_values, strict=True)
        others = zip(self.keys, self.values, strict=True)
        return [pair for layers in zip(frozen, others, strict=True) for pair in zip(*layers, strict=True)]

    def _share_memory(self) -> None:
        """Move the two parameters of each tensor into one storage, except in distributed training.

        FSDP2 cannot shard parameters that share a storage.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return
        for frozen, others in self._list_pairs():
            if _are_plain(frozen, others) and not _share_memory(frozen, others):
                whole = torch.cat([frozen.detach(), others.detach()], dim=1)
                frozen.data, others.data = whole[:, : self.frozen], whole[:, self.frozen :]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FreePrefix:
        """Move or convert the parameters, which separates their storage, and then share it again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frozen:
            self._share_memory()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the storage of a copy's parameters again, since copying separates it."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.frozen:
            self._share_memory()

    @torch.no_grad()
    def write(self, prefixes: Sequence[tuple[Tensor, Tensor]], start: int = 0) -> None:
        """Overwrite the keys and values of the tokens from ``start`` on, in place.

        Under tensor parallelism, ``prefixes`` has only the heads of this rank.
        """
        for layer, pair in enumerate(prefixes):
            for which, tensor in zip(("keys", "values"), pair, strict=True):
                count = tensor.shape[1]
                frozen = min(max(self.frozen - start, 0), count)
                if frozen:
                    own = _get_own_heads(getattr(self, f"frozen_{which}")[layer])
                    own[:, start : start + frozen].copy_(tensor[:, :frozen])
                if frozen < count:
                    trained = slice(start + frozen - self.frozen, start + count - self.frozen)
                    _get_own_heads(getattr(self, which)[layer])[:, trained].copy_(tensor[:, frozen:])

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        if not self.frozen:
            return list(zip(self.keys, self.values, strict=True))
        whole = [_join(frozen, others) for frozen, others in self._list_pairs()]
        return list(zip(whole[::2], whole[1::2], strict=True))


def _get_own_heads(parameter: Tensor) -> Tensor:
    """Return the local heads of a parameter, which is a ``DTensor`` under tensor parallelism."""
    to_local: Callable[[], Tensor] | None = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()


def _copy_as_parameters(tensors: Sequence[Tensor], tokens: slice, trained: bool) -> nn.ParameterList:
    """Return contiguous copies of tensors as parameters. FSDP2 requires contiguous parameters."""
    order = torch.contiguous_format
    parameters = nn.ParameterList(tensor[:, tokens].detach().clone(memory_format=order) for tensor in tensors)
    return parameters.requires_grad_(trained)


def _separate_memory(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give each tensor of a ``state_dict`` its own storage, since safetensors refuses shared ones (a hook).

    The keys and values of a prefix with frozen tokens are copies there, so writing into them changes nothing.
    """
    for name, _ in module.named_parameters():
        tensor = state.get(prefix + name)
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and _are_plain(tensor):
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            state[prefix + name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _are_plain(*tensors: Tensor) -> bool:
    """Return True if all tensors are plain ones whose storage can be inspected, not sharded, fake or on "meta"."""
    if torch._C._are_functorch_transforms_active():
        return False
    return all(type(tensor.data) is Tensor and not tensor.is_meta for tensor in tensors)


def _share_memory(frozen: Tensor, others: Tensor) -> bool:
    """Return True if two parts ``[Hkv, tokens, D]`` of a tensor share its storage, next to each other in each head."""
    if frozen.dtype is not others.dtype or frozen.device != others.device:
        return False
    size = frozen.shape[1] + others.shape[1]
    strides = (size * frozen.shape[2], frozen.shape[2], 1)
    together = frozen.untyped_storage().data_ptr() == others.untyped_storage().data_ptr()
    behind = others.storage_offset() == frozen.storage_offset() + frozen.shape[1] * frozen.shape[2]
    return together and behind and frozen.stride() == others.stride() == strides


def _join(frozen: Tensor, others: Tensor) -> Tensor:
    """Return all tokens of a tensor, as a view if its parts share a storage."""
    if torch.compiler.is_compiling() or not _are_plain(frozen, others) or not _share_memory(frozen, others):
        return torch.cat([frozen, others], dim=1)
    if torch.is_grad_enabled() and others.requires_grad:
        joined: Tensor = _Join.apply(frozen, others)  # type: ignore[no-untyped-call]
        return joined
    return _view_whole(frozen, others)


def _view_whole(frozen: Tensor, others: Tensor) -> Tensor:
    heads, count, size = frozen.shape
    shape = (heads, count + others.shape[1], size)
    return others.detach().as_strided(shape, (shape[1] * size, size, 1), frozen.storage_offset())


class _Join(torch.autograd.Function):
    """Return a view of all tokens, and pass the gradient only to the tokens that are not frozen."""

    @staticmethod
    def forward(ctx: Any, frozen: Tensor, others: Tensor) -> Tensor:
        ctx.count = frozen.shape[1]
        return _view_whole(frozen, others)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient[:, ctx.count :]


class ReparameterizedPrefix(nn.Module):
    """Compute ``W2 tanh(W1 E' + b1) + b2`` and split it into the keys and values of every layer.

    ``E'`` is the embedding ``E``, or ``E + MLP_res(E)`` with a residual network.
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
        """Return the number of columns of the keys and of the values of each layer, in this order."""
        return [s.kv_heads * size for s in self.shapes for size in (s.key_size, s.value_size)]

    def reset_parameters(self) -> None:
        """Draw the embedding from normal(0, 1), and use PyTorch's default initialization for the layers."""
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
    """A prefix whose keys and values are parameters, or are computed by a reparameterization."""

    config: PrefixTuningConfig

    def __init__(self, config: PrefixTuningConfig, shapes: Sequence[AttentionShape]) -> None:
        super().__init__(config, shapes)
        self.prefix = self._make_prefix()
        if config.key_bias:
            self.key_biases = nn.ParameterList([torch.zeros(s.kv_heads, config.num_virtual_tokens) for s in shapes])
        if config.softmax == "own":
            self.output_gates = nn.ParameterList([torch.zeros(s.heads) for s in shapes])

    @classmethod
    def chosen_layers(cls, config: PrefixTuningConfig, shapes: Sequence[AttentionShape]) -> Sequence[int]:
        """Return the indices of the layers whose role is in ``attentions``.

        Raises:
            ValueError: the model has no such layer.
        """
        wanted, found = config.attentions, sorted({shape.role for shape in shapes})
        chosen = [index for index, shape in enumerate(shapes) if wanted is None or shape.role in wanted]
        if not chosen:
            raise ValueError(
                f"`attentions` must name roles of attention layers that the model has ({', '.join(found)}), got "
                f"{wanted!r}"
            )
        return chosen

    def _make_prefix(self) -> FreePrefix | ReparameterizedPrefix:
        length, of = self.config.num_virtual_tokens, self.config
        if of.reparameterization is None:
            return FreePrefix(length, self.shapes, of.num_frozen_tokens, of.train != "values", of.train != "keys")
        return ReparameterizedPrefix(length, self.shapes, self.config.hidden_dim)

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Initialize keys and values as specified by ``init``, and set key biases and output gates to 0."""
        zeros = [*(self.key_biases if self.config.key_bias else ())]
        zeros += self.output_gates if self.config.softmax == "own" else ()
        for parameter in zeros:
            nn.init.zeros_(parameter)
        if isinstance(self.prefix, ReparameterizedPrefix):
            self.prefix.reset_parameters()
            return
        if self.config.init not in ("normal", "zero") and text_keys_values is None:
            raise ValueError(f"`text_keys_values` must be given for init={self.config.init!r}, got None")
        with torch.no_grad():
            former = self.prefixes()
            initial = text_keys_values or [(self._draw(key), self._draw(value)) for key, value in former]
            pairs = zip(initial, former, strict=True)
            self.prefix.set([(new[0].to(old[0]), new[1].to(old[1])) for new, old in pairs])

    def _draw(self, tensor: Tensor) -> Tensor:
        """Return initial values for ``init="zero"`` and ``init="normal"``, in the shape of a tensor."""
        return torch.zeros_like(tensor) if self.config.init == "zero" else nn.init.normal_(tensor.clone(), std=0.02)

    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of every layer."""
        prefixes: list[tuple[Tensor, Tensor]] = self.prefix()
        return prefixes

    def set_prefixes(self, prefixes: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set the keys and values to copies of these. The prefix must not have a reparameterization."""
        assert isinstance(self.prefix, FreePrefix)
        self.prefix.set(prefixes)

    def baked(self) -> PrefixTuning:
        """Return a prefix without a reparameterization, multiplied by gates that do not depend on the input."""
        of = self.config
        config = PrefixTuningConfig(
            of.num_virtual_tokens,
            modules_to_save=of.modules_to_save,
            prefix_position=of.prefix_position,
            position_shift=of.position_shift,
            attentions=of.attentions,
            num_frozen_tokens=of.num_frozen_tokens,
            train=of.train,
            key_bias=of.key_bias,
            softmax=of.softmax,
        )
        return self._fill_baked(PrefixTuning(config, self.shapes))

    def _fill_baked(self, baked: PrefixT) -> PrefixT:
        """Copy keys, values, key biases and output gates to another prefix. Constant gates are multiplied in."""
        baked.set_prefixes(self.gated_prefixes())
        if self.config.key_bias:
            baked.key_biases = nn.ParameterList(bias.detach().clone() for bias in self.key_biases)
        if self.config.softmax == "own":
            baked.output_gates = nn.ParameterList(gate.detach().clone() for gate in self.output_gates)
        return baked

    def set_key_biases(self, biases: Sequence[Tensor]) -> None:
        """Set the key biases of all layers to copies of ``biases``, each ``[Hkv, m]``."""
        with torch.no_grad():
            for own, bias in zip(self.key_biases, biases, strict=True):
                own.copy_(bias)

    def key_bias(self, layer: int) -> Tensor | None:
        """Return the key biases ``[Hkv, m]`` of a layer, or None."""
        return self.key_biases[layer] if self.config.key_bias else None

    def output_gate(self, layer: int) -> Tensor | None:
        """Return ``tanh(g) [Hq]`` for ``softmax="own"``, or None."""
        return torch.tanh(self.output_gates[layer]) if self.config.softmax == "own" else None

    def frozen_tokens(self) -> int:
        """Return ``num_frozen_tokens``."""
        return self.config.num_frozen_tokens

    def head_parameters(self) -> dict[str, Literal["keys", "queries"]]:
        """Return keys and values that are parameters, key biases, and output gates."""
        names = [name for name, _ in self.named_parameters()]
        free = isinstance(self.prefix, FreePrefix)
        of_keys = [n for n in names if n.startswith("key_biases.") or (free and n.startswith("prefix."))]
        of_queries = [n for n in names if n.startswith("output_gates.")]
        return {**dict.fromkeys(of_keys, "keys"), **dict.fromkeys(of_queries, "queries")}

    def gated_prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of every layer, multiplied by gates that do not depend on the input."""
        gates = [self.constant_gate(layer) for layer in range(len(self.shapes))]
        weights = [1.0 if gate is None else gate.unsqueeze(-1) for gate in gates]
        return [(w * key, w * value) for w, (key, value) in zip(weights, self.prefixes(), strict=True)]

    def constant_gate(self, layer: int) -> Tensor | None:
        """Return the part of a layer's gate that does not depend on the input, a scalar or ``[m]``, or None."""
        return self.prefix_gate(layer, None, None)


PrefixT = TypeVar("PrefixT", bound=PrefixTuning)

register("prefix_tuning", PrefixTuningConfig, PrefixTuning)
