"""Register this package's attention and masks with ``transformers``.

The shape of a mask identifies its kind, so this module relies neither on a keyword nor on a module's ``is_causal``:

- One bool row ``[B, 1, 1, K]`` for more than one query means causal attention. The row is the key padding.
- None means that every query attends to all keys (bidirectional attention, or a single last query). A mask
  ``[B, 1, N, K]`` expanded from one row means the same with key padding.
- Any other ``[B, 1, N, K]`` is the complete mask.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from ....ops.prefix_attention import prefix_attention

if TYPE_CHECKING:
    from ..sharding.tensor_parallel import TensorParallelHeads


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Make a mask for the attention mask interface. It always keeps padding, and is written out only if needed."""
    padding: Tensor | None = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, None, None, kv_offset : kv_offset + kv_length]
    if mask_function is bidirectional_mask_function:
        return None if padding is None else padding.expand(batch_size, 1, q_length, kv_length)
    causal = mask_function is causal_mask_function and allow_is_causal_skip and not isinstance(q_offset, Tensor)
    if causal and q_length == 1 and q_offset + 1 == kv_offset + kv_length:  # a generated token attends to all keys
        return None if padding is None else padding.expand(batch_size, 1, 1, kv_length)
    if causal and q_length == kv_length and q_offset == kv_offset:
        if padding is None:
            padding = torch.ones((), dtype=torch.bool, device=device)
        return padding.expand(batch_size, 1, 1, kv_length)
    return make_full_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )


def make_full_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Make a mask that is always written out in full, bool ``[B, 1, N, K]``."""
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, **skips})
    assert mask is not None
    return mask


class Masking(NamedTuple):
    """The mask arguments of ``prefix_attention``."""

    attn_mask: Tensor | None
    is_causal: bool


def read_mask(mask: Tensor | None, query: Tensor) -> Masking:
    """Convert a mask for queries ``[B, H, N, D]`` to the mask arguments of ``prefix_attention``."""
    if mask is None:
        return Masking(None, False)
    if mask.is_floating_point():  # the model's own or the caller's mask, which is complete
        return Masking(mask.to(query.dtype), False)
    if mask.shape[2] != 1 or query.shape[2] == 1:
        return Masking(mask, False)
    everything = mask.stride(3) == 0 and mask.shape[3] > 1
    return Masking(None if everything else mask, True)


def make_additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return an additive mask for eager attention. Hidden scores get the smallest value of the dtype."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def add_bias(masking: Masking, position_bias: Tensor | None, key: Tensor) -> Masking:
    """Add a position bias ``[1 | B, H, N, K]``, such as T5's, to a mask, and write the result out in full.

    Hidden scores get the smallest value of the dtype, like in the eager masks of ``transformers``.
    """
    if position_bias is None:
        return masking
    bias, mask = position_bias.to(key.dtype), masking.attn_mask
    least = torch.finfo(bias.dtype).min
    if mask is not None:
        bias = bias.masked_fill(~mask, least) if mask.dtype is torch.bool else (bias + mask).clamp(min=least)
    if masking.is_causal:
        later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
        bias = bias.masked_fill(later, least)
    return Masking(bias, False)


def split_bias(position_bias: Tensor | None, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Split a bias ``[..., m + K]`` on scores into the prefix's and the K tokens' columns.

    The first result is None if the bias has no columns for the prefix.
    """
    if position_bias is None or position_bias.shape[-1] <= key.shape[2]:
        return None, position_bias
    return position_bias[..., : -key.shape[2]], position_bias[..., -key.shape[2] :]


def sees_all_of_window(mask_function: Callable[..., Any], window: int, device: torch.device | str) -> bool:
    """Return whether the mask of a local attention is a sliding window, rather than separate chunks."""
    zero, query = torch.zeros(2, dtype=torch.long, device=device), 2 * window
    keys = torch.tensor([query, query - window + 1], device=device)
    try:
        return bool(mask_function(zero, zero, torch.full_like(keys, query), keys).all())
    except IndexError:  # it indexes the batch, for example to let images attend in both directions
        return False


def make_window_bias(query: Tensor, window: int | None, length: int, past: int, tokens: int = 0) -> Tensor | None:
    """Return the bias ``[N, m]`` that hides the prefix from queries ``[B, H, N, D]`` outside a sliding window.

    The prefix is at the positions before all tokens. ``past`` tokens are in a cache. Windows count padding too. The
    call has ``tokens`` tokens, or as many as queries if 0, since some layers get only the last queries. Return None if
    the window covers the whole prefix for all queries.
    """
    end = length + past + max(tokens, query.shape[2])
    if window is None or end <= window:
        return None
    positions = torch.arange(end - query.shape[2], end, device=query.device)[:, None]
    hidden = torch.arange(length, device=query.device) <= positions - window
    return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, -torch.inf)


def make_span_bias(
    query: Tensor, window: int | None, lengths: Tensor, longest: int, past: int, tokens: int = 0
) -> Tensor | None:
    """Return the bias ``[B, 1, N, longest]`` of ``make_window_bias`` for one prefix per row, of ``lengths`` ``[B]``."""
    if window is None or longest + past + max(tokens, query.shape[2]) <= window:
        return None
    end = past + max(tokens, query.shape[2])
    positions = torch.arange(end - query.shape[2], end, device=query.device)[None, :, None] + lengths[:, None, None]
    hidden = (torch.arange(longest, device=query.device) <= positions - window)[:, None]
    return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, -torch.inf)


def find_own_keys(mask: Tensor, tokens: int, past: int) -> tuple[Tensor, int]:
    """Return a mask as bool ``[B, N, K]``, and the first column of the keys of the call's own ``tokens``.

    ``past`` tokens are in the cache. Static caches have more columns after those of the call. Sliding caches have
    dropped some columns.
    """
    row = mask[:, 0]
    visible = row if row.dtype is torch.bool else row > torch.finfo(row.dtype).min / 2
    return visible, min(past, mask.shape[3] - tokens)


def find_attended_tokens(mask: Tensor | None, tokens: int, past: int) -> Tensor | None:
    """Return a bool mask ``[B, tokens]`` of the call's own tokens that are not padding, or None if no token is padding.

    Every token that is not padding attends to itself, even with a window or a causal mask.
    """
    if mask is None or (mask.shape[2] == 1 and mask.shape[3] > 1 and mask.stride(3) == 0):
        return None
    visible, start = find_own_keys(mask, tokens, past)
    if visible.shape[1] == 1:  # the padding of all keys
        return visible[:, 0, start : start + tokens]
    return visible.diagonal(start, 1, 2)[:, :tokens]


def check_one_sequence(mask: Tensor, tokens: int, past: int) -> None:
    """Refuse a caller's 4-D mask that leaves the padding unknown, or that separates sequences within a row."""
    visible, start = find_own_keys(mask, tokens, past)
    visible = visible.expand(-1, tokens, -1)
    own = visible.diagonal(start, 1, 2)[:, :tokens]
    seen = visible[:, :, start : start + tokens].any(dim=1)
    first = own & (own.cumsum(dim=1) == 1)
    alone = own & ~first & ~visible.tril(start - 1).any(dim=2)
    if past == 0 and bool(alone.any()):
        raise ValueError(
            "`attention_mask` separates several sequences in a row, but a pooled gate belongs to one sequence. Pass "
            'position_ids that restart with each sequence, without mask and cache, or use pooling="query".'
        )
    if bool((seen & ~own).any()):
        raise ValueError(
            "`attention_mask` hides a token from itself but not from other tokens, so a pooled gate cannot know "
            'whether it is padding. Pass a mask [B, N], or use pooling="query".'
        )


NAME = "fastprefix"
FULL_MASKS = "fastprefix_full_masks"
"""The name of the same attention with full masks, for models that change the masks that they receive."""

MASKS: dict[str, Any] = {NAME: make_mask, FULL_MASKS: make_full_mask}
"""The mask function of each attention name."""

BINDING = "_fastprefix_binding"
"""The attribute of an attention module that holds its ``Binding`` outside of a call that carries one."""

WATCHED = "_fastprefix_watched"
"""The attribute of an attention module that counts the adapters and PEFT models whose calls carry its prefix."""


class WatchHandle:
    """The record that calls carry the prefixes of these attention modules, until ``remove``, like a hook."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        for module in self.modules:
            setattr(module, WATCHED, getattr(module, WATCHED, 0) + 1)

    def remove(self) -> None:
        """Remove the record. A second call does nothing."""
        for module in self.modules:
            setattr(module, WATCHED, getattr(module, WATCHED) - 1)
            if not getattr(module, WATCHED):
                delattr(module, WATCHED)
        self.modules = []


Prefix = tuple[Tensor, Tensor]
"""Keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]``."""


class Binding:
    """The source of an attention module's prefix, gates and biases. By default, it provides no gates and no biases."""

    index: int
    """The index of the layer among the layers of the method."""
    heads: TensorParallelHeads | None = None
    """This rank's heads, on a tensor-parallel model that needs complete gradients of the tokens."""

    def hook_layer(self) -> list[Any]:
        """Set the hooks that the layer runs with in a call that carries this binding, and return their handles."""
        return []

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """Return the prefix, or None."""
        raise NotImplementedError

    def get_gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the prefix gate and the output gate, each of which may be None."""
        return None, None

    def get_bias(self, query: Tensor) -> Tensor | None:
        """Return a bias ``[N, m]`` or ``[B, 1, N, m]`` for the prefix scores, or None. A bias of -inf hides a key."""
        return None

    def get_key_bias(self, query: Tensor) -> Tensor | None:
        """Return the biases ``[Hkv, m]`` of the prefix keys, or None."""
        return None

    def get_spans(self, query: Tensor) -> Tensor | None:
        """Return each row's start and length in the prefix, int ``[B, 2]``, or None if all rows use all of it."""
        return None

    def attend_alone(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Return an output ``[B, N, H, Dv]`` that replaces the attention, or None to run the attention."""
        return None

    def get_output_scale(self) -> float:
        """Return the factor that the output is multiplied with."""
        return 1.0

    def count_frozen(self) -> int:
        """Return the number of leading prefix keys and values that need no gradient."""
        return 0

    def share_tokens(self, key: Tensor, value: Tensor) -> Prefix:
        """Return the tokens' keys and values. Their gradients are summed over the ranks that share them."""
        return (key, value) if self.heads is None else self.heads.share_tokens(key, value, self.index)


@dataclass(frozen=True, eq=False)
class GivenPrefix(Binding):
    """A binding that holds its prefix.

    With an ``output_gate``, the prefix has its own softmax. A sliding ``window`` hides parts of the prefix, which is
    before all tokens. ``past`` tokens are in a cache and ``tokens`` are in the call, or as many as queries if 0, since
    some layers get only the last queries. The first ``frozen`` keys and values need no gradient.
    """

    key: Tensor
    value: Tensor
    output_gate: Tensor | None = None
    window: int | None = None
    past: int = 0
    tokens: int = 0
    frozen: int = 0

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix:
        """Return the prefix on the query's device and in its dtype."""
        return self.key.to(query), self.value.to(query)

    def get_gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[None, Tensor | None]:
        """Return the output gate."""
        return None, None if self.output_gate is None else self.output_gate.to(query)

    def get_bias(self, query: Tensor) -> Tensor | None:
        """Return the bias that hides the prefix from queries whose window does not reach it."""
        return make_window_bias(query, self.window, self.key.shape[1], self.past, self.tokens)

    def count_frozen(self) -> int:
        """Return the number of frozen keys in the prefix. A cropped cache may hold fewer than ``frozen``."""
        return min(self.frozen, self.key.shape[1])


@dataclass(frozen=True, eq=False)
class CarriedBindings:
    """The bindings of one call of a model, by attention module. They replace the bindings on these modules.

    ``own_attention`` names a registered attention that runs instead of this package's. With it, a call without an
    adapter returns exactly the results of the model's own attention.
    """

    bindings: Mapping[nn.Module, Binding]
    own_attention: str | None = None


class _CallInProgress(threading.local):
    """The bindings of the call in progress, per thread. Dynamo can trace this, unlike context variables."""

    def __init__(self) -> None:
        self.carried: CarriedBindings | None = None  # an instance attribute, since Dynamo's guards read it there


_CALL = _CallInProgress()


def get_carried_bindings() -> CarriedBindings | None:
    """Return the bindings that the call in progress carries, or None outside of such a call."""
    return _CALL.carried


def find_binding(module: nn.Module) -> Binding | None:
    """Return an attention module's binding in the call in progress, or its own outside of a call with bindings."""
    return getattr(module, BINDING, None) if _CALL.carried is None else _CALL.carried.bindings.get(module)


@contextmanager
def carrying(carried: CarriedBindings | None) -> Iterator[None]:
    """Carry bindings to every attention module that is called in this context, in this thread."""
    former, _CALL.carried = _CALL.carried, carried
    try:
        yield
    finally:
        _CALL.carried = former


class CarryingCheckpoint:
    """A gradient checkpointing function that recomputes the layers of a module with the state of their first run."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function = function
        self.module = module

    @property
    def keywords(self) -> Mapping[str, Any]:
        """Return the keyword arguments of the function if it is a ``functools.partial``, otherwise no arguments."""
        keywords: Mapping[str, Any] = getattr(self.function, "keywords", {})
        return keywords

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer now, and recompute it in the backward pass with the same state."""
        return self.function(_CarryingRun(run, self.module), *args, **kwargs)


class _CarryingRun:
    """A function that runs a layer, and runs it again in a backward pass with the state of the first run.

    The state consists of the bindings of the call and of the attention that the layer runs on.
    """

    def __init__(self, run: Callable[..., Any], module: nn.Module) -> None:
        self.run = run
        self.module = module
        self.carried = _CALL.carried
        self.attention: str | None = None
        self.trained: list[bool] | None = None
        if not torch.compiler.is_compiling():
            own = None if self.carried is None else self.carried.own_attention
            self.attention = own or _read_attention(module)
            self.trained = [parameter.requires_grad for parameter in module.parameters()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not runs_again():  # also in a compiled graph, whose backward pass is traced
            return self.run(*args, **kwargs)
        carried = self._select_attention()
        handles: list[Any] = []
        if carried is not None:
            inside = set(self.module.modules())
            bindings = (binding for module, binding in carried.bindings.items() if module in inside)
            handles = [handle for binding in bindings for handle in binding.hook_layer()]
        try:
            with carrying(carried):
                return self.run(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _select_attention(self) -> CarriedBindings | None:
        """Return the bindings of the first run, with the attention that the first run used.

        Raises:
            RuntimeError: if the layer runs on another attention now, or if other parameters of it are trained.
        """
        now = _read_attention(self.module)
        if self.attention is not None and now is not None and now != self.attention:
            if not is_ours(self.attention) and is_ours(now):
                return CarriedBindings({} if self.carried is None else self.carried.bindings, self.attention)
            if is_ours(self.attention) and not is_ours(now):
                raise _make_changed_error(f"the attention is {now!r} now")
        if self.trained is not None and self.trained != [each.requires_grad for each in self.module.parameters()]:
            raise _make_changed_error("other parameters of the layers are trained now")
        return self.carried


def _read_attention(module: nn.Module) -> str | None:
    """Return the name of the attention in the first configuration inside a module, or None if it has none."""
    configs = (getattr(each, "config", None) for each in module.modules())
    names = (getattr(config, "_attn_implementation", None) for config in configs)
    return next((str(name) for name in names if name is not None), None)


def is_ours(attention: object) -> bool:
    """Return whether the name of an attention is one of this package's."""
    return str(attention).startswith(NAME)


def _make_changed_error(change: str) -> RuntimeError:
    return RuntimeError(
        "an adapter was switched, disabled or detached before the backward pass of a call, in which gradient "
        f"checkpointing recomputes the layers, and {change}. Call backward before that."
    )


CHECKPOINT_WRAPPER = "checkpoint_fn"
"""The attribute of PyTorch's checkpoint wrapper that holds the gradient checkpointing function."""
_CHECKPOINTS = ("_gradient_checkpointing_func", CHECKPOINT_WRAPPER)
"""The attributes that hold a gradient checkpointing function in ``transformers`` and in PyTorch's wrapper."""


def carry_through_checkpoints(backbone: nn.Module) -> None:
    """Make every gradient checkpointing function recompute layers with the state of their first run."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for module in backbone.modules():
        for name in _CHECKPOINTS:
            function = vars(module).get(name)
            if function is not None and not isinstance(function, CarryingCheckpoint):
                setattr(module, name, CarryingCheckpoint(function, module))


def restore_checkpoints(backbone: nn.Module) -> None:
    """Undo ``carry_through_checkpoints``, unless an accelerated PEFT model still needs it."""
    if any(getattr(module, WATCHED, 0) for module in backbone.modules()):
        return
    for module in backbone.modules():
        for name in _CHECKPOINTS:
            function = vars(module).get(name)
            if isinstance(function, CarryingCheckpoint):
                setattr(module, name, function.function)


def runs_again() -> bool:
    """Return whether a backward pass is in progress in this thread, so that checkpointed layers are recomputed."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_lost_bindings() -> None:
    """Refuse to recompute a layer in a backward pass without the bindings of its first run."""
    if _CALL.carried is None and runs_again():
        raise RuntimeError(
            "a layer of a model with an adapter is recomputed in a backward pass where the prefix of its call is "
            "unknown. Enable gradient checkpointing with `gradient_checkpointing_enable()` instead of another wrapper."
        )


def make_two_adapters_error() -> ValueError:
    """Return the error for a call with an accelerated PEFT adapter on a model with a fastprefix adapter in use."""
    return ValueError(
        "`peft_model` has a base model with an adapter of fastprefix.attach in use, which cannot act in the same call "
        "as an accelerated PEFT adapter. Call the base model directly, or detach its adapter."
    )


def run_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from a module's queries to its tokens and, if the module has a binding, to its prefix.

    The mask already includes a sliding window. If ``position_bias`` has more columns than the keys, its first columns
    are for the prefix. Return ``[B, N, H, Dv]``, and None instead of attention weights.

    Raises:
        ValueError: if the module passes ``indices``.
        RuntimeError: if a layer is recomputed in a backward pass without the bindings of its call.
    """
    if kwargs.get("indices") is not None:
        raise ValueError(
            f"{type(module).__name__} passes `indices` to its attention, which fastprefix does not support."
        )
    carried = _CALL.carried
    if getattr(module, WATCHED, 0):
        refuse_lost_bindings()
    binding = find_binding(module)
    if binding is not None:
        key, value = binding.share_tokens(key, value)
    if carried is not None and attention_mask is not None:
        attention_mask = attention_mask[..., -key.shape[2] :]  # the masks of some encoders include the prefix
    if binding is not None and (alone := binding.attend_alone(query, key, value)) is not None:
        return alone, None
    prefix_bias, position_bias = split_bias(position_bias, key)
    masking = add_bias(read_mask(attention_mask, query), position_bias, key)
    prefix = None if binding is None else binding.get_prefix(query, key, value)
    pk, pv = (key[:, :, :0], value[:, :, :0]) if prefix is None else prefix
    gates = (None, None) if binding is None or prefix is None else binding.get_gates(query, key, attention_mask)
    key_bias, spans, frozen = None, None, 0
    if binding is not None and prefix is not None:
        if (hidden := binding.get_bias(query)) is not None:
            prefix_bias = hidden if prefix_bias is None else hidden + prefix_bias
        key_bias, spans, frozen = binding.get_key_bias(query), binding.get_spans(query), binding.count_frozen()
    output = prefix_attention(
        query,
        key,
        value,
        pk,
        pv,
        prefix_gate=gates[0],
        output_gate=gates[1],
        prefix_bias=None if prefix_bias is None else prefix_bias.to(query.dtype),
        prefix_key_bias=key_bias,
        prefix_spans=spans,
        frozen_prefix=frozen,
        attn_mask=masking.attn_mask,
        is_causal=masking.is_causal,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        scale=scaling,
        dropout_p=dropout,
    )
    scale = 1.0 if binding is None else binding.get_output_scale()
    return (output if scale == 1.0 else output * scale).transpose(1, 2), None


def find_eager_attention(module: nn.Module) -> Any:
    """Return the eager attention function in the file of a module's class, or None if the file has none."""
    homes = (sys.modules.get(each.__module__) for each in type(module).__mro__)
    found = (getattr(home, "eager_attention_forward", None) for home in homes)
    return next((function for function in found if function is not None), None)


def _run_attention_of_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run this package's attention, or the attention that the call in progress selects instead."""
    own = _get_own_attention()
    if own is None:
        return run_attention(module, *args, **kwargs)
    function = find_eager_attention(module) if own == "eager" else AttentionInterface()[own]
    return function(module, *args, **kwargs)


def _make_mask_of_call(mask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a mask for this package's attention, or for the attention that the call in progress selects instead."""
    own = _get_own_attention()
    return mask(*args, **kwargs) if own is None else AttentionMaskInterface()[own](*args, **kwargs)


def _get_own_attention() -> str | None:
    return None if _CALL.carried is None else _CALL.carried.own_attention


# Registered at import, since a model that is loaded with ``torch.load`` calls its attention without any other call of
# this package. Without these masks, padding would be lost.
for _of, _mask in MASKS.items():
    AttentionInterface.register(_of, _run_attention_of_call)
    AttentionMaskInterface.register(_of, functools.partial(_make_mask_of_call, _mask))
