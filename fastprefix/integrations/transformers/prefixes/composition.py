"""Prefixes one behind the other as one adapter, and prefixes that take the place of others without recompiling."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ....methods import Composition, CompositionConfig, MethodConfig, PrefixTuning
from ....methods.prefix_tuning import FreePrefix
from ..adapter import Adapter
from ..attachment import Model, check_name_free, get_attachment, install, refuse_partitioned, use_adapter
from ..files.saving import fill, read_prefix
from ..models.discovery import find_method_layers
from ..models.tuners import find_base_model
from ..sharding.fully_sharded import is_fully_sharded, reshard
from ..sharding.partitioned import gathering_modules
from ..sharding.tensor_parallel import TensorParallelHeads, write_whole
from .initial import PrefixState
from .prefix import PrefixHooks

Source = str | os.PathLike[str] | PrefixState
"""A file or directory of a prefix, or a prefix in memory."""


def compose(model: Model, names: Sequence[str], *, name: str, trainable: Sequence[str] | None = None) -> Model:
    """Put prefixes one behind the other as one adapter, and use it.

    The composed adapter has the parameters of its parts, not copies: what is trained in it is trained in them, and
    ``swap_prefix`` of a part is seen in it. Each part keeps its frozen tokens. It computes what the parts would as
    key/value caches that are concatenated in this order; with ``prefix_position="shift"`` the tokens stand behind all
    of them.

    Args:
        model: a model with the adapters attached.
        names: of the adapters, in order. Each must be prefix tuning, a cartridge or another prefix whose gates do not
            depend on the input, or composed of such.
        name: of the composed adapter.
        trainable: the names of the parts that are trained. None: all. The others are frozen while the composed adapter
            is in use, and no work is done for the gradients of those that stand first.

    Returns:
        The same model.

    Raises:
        ValueError: an adapter that is not there, that cannot be a part, or that does not fit the others, or a name that
            is taken.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    chosen = list(dict.fromkeys(names))
    if isinstance(names, str) or not chosen or len(chosen) != len(names):
        raise ValueError(f"`names` must be a list of different adapters, got {names!r}")
    check_name_free(model, name)
    if unknown := sorted(set(trainable or ()) - set(chosen)):
        raise ValueError(f"`trainable` must name some of {chosen}, got {unknown}")
    parts: list[tuple[PrefixTuning, bool]] = []
    for each in chosen:
        adapter = attachment.adapters[attachment.check_known(each)]
        _check_part(each, adapter)
        trains = not adapter.merged if trainable is None else each in trainable
        parts += [(part, trains and own) for part, own in _list_parts(adapter)]
    lengths = [part.config.num_virtual_tokens for part, _ in parts]
    config = CompositionConfig(
        sum(lengths),
        modules_to_save=[],
        parts=[part.config.to_dict() for part, _ in parts],
        trainable=[trains for _, trains in parts],
    )
    with use_adapter(base, None), gathering_modules(base):
        layers = find_method_layers(base, config)
    method = Composition(config, [layer.whole_shape for layer in layers], [part for part, _ in parts])
    return install(model, Adapter(base, config, method, PrefixHooks(base, method, layers)), name)


def _check_part(name: str, adapter: Adapter) -> None:
    method = adapter.method
    reason = None
    if adapter.outside is not None:
        reason = adapter.outside
    elif adapter.saved_modules:
        reason = f"it trains {', '.join(adapter.saved_modules)}"
    elif not isinstance(method, PrefixTuning | Composition):
        reason = f"it is a {type(method).__name__}"
    elif method.needs_hidden():
        reason = f"the gates of {type(method).__name__} depend on the input"
    elif method.output_gate(0) is not None:
        reason = 'it has softmax="own", which other prefixes have no part in'
    if reason is not None:
        raise ValueError(f"`names` must be adapters that are prefixes and nothing more, but of {name!r} {reason}")


def _list_parts(adapter: Adapter) -> list[tuple[PrefixTuning, bool]]:
    """Return the prefixes of an adapter, and whether each is trained."""
    if isinstance(adapter.method, Composition):
        return list(zip(adapter.method.parts, adapter.method.config.trainable, strict=True))  # type: ignore[arg-type]
    assert isinstance(adapter.method, PrefixTuning)
    return [(adapter.method, True)]


def swap_prefix(model: nn.Module, sources: Source | Sequence[Source], *, name: str | None = None) -> None:
    """Write other keys and values into a prefix, in place: nothing is attached, checked or compiled anew.

    That changes a prefix between calls, such as the document that is served, or the distractors in front of a prefix
    that is trained (Cartridges at Scale, arXiv 2606.04557).

    Args:
        model: a model with the prefix attached.
        sources: prefixes whose tokens fill it, one behind the other: files or directories as for ``load_adapter``, or
            prefixes in memory (``read_prefix``, ``PrefixState``). One alone need not be in a list.
        name: of the adapter, which must have free keys and values; None: the one in use.

    Raises:
        ValueError: the adapter is none of that kind, or the sources do not fit it. It is left as it was.
    """
    attachment = get_attachment(model)
    adapter = attachment.adapter if name is None else attachment.adapters[attachment.check_known(name)]
    method = adapter.method
    prefix = getattr(method, "prefix", None)
    if not isinstance(method, PrefixTuning) or not isinstance(prefix, FreePrefix):
        raise ValueError(f"`name` must be an adapter with free keys and values, but it has {type(method).__name__}.")
    if method.config.softmax != "joint":
        raise ValueError('`name` must be an adapter with softmax="joint": trained gates are for the keys that it has.')
    refuse_partitioned(base := find_base_model(model))
    given: Sequence[Source] = [sources] if isinstance(sources, str | os.PathLike | PrefixState) else sources
    states = [each if isinstance(each, PrefixState) else read_prefix(model, each) for each in given]
    _check_sources(method, states)
    if is_fully_sharded(base):
        reshard(base)
        _write_sharded(method, prefix, states)
    else:
        heads = adapter.hooks.heads if isinstance(adapter.hooks, PrefixHooks) else None
        _write(method, prefix, states, heads)
    for each in attachment.adapters.values():
        if isinstance(each.hooks, PrefixHooks):
            each.hooks.kept = None  # FSDP2 does not count the changes of what it gathers


@torch.no_grad()
def _write(
    method: PrefixTuning, prefix: FreePrefix, states: Sequence[PrefixState], heads: TensorParallelHeads | None
) -> None:
    """Write prefixes over one, each from where it lies."""
    start = 0
    for state in states:
        prefix.write(state.pairs if heads is None else heads.take_prefixes(state.pairs), start)
        if method.config.key_bias:
            _write_biases(method, state, start, heads)
        start += state.length


@torch.no_grad()
def _write_sharded(method: PrefixTuning, prefix: FreePrefix, states: Sequence[PrefixState]) -> None:
    """Write prefixes over one that FSDP2 has cut, perhaps between its tokens."""
    layers = zip(*(state.pairs for state in states), strict=True)
    pairs = [tuple(torch.cat(tensors, dim=1) for tensors in zip(*layer, strict=True)) for layer in layers]
    whole = FreePrefix(method.config.num_virtual_tokens, method.shapes, prefix.frozen)
    whole.set([(key, value) for key, value in pairs])
    fill(dict(prefix.named_parameters()), {name: each.detach() for name, each in whole.named_parameters()})
    if method.config.key_bias:
        for layer, parameter in enumerate(method.key_biases):
            write_whole(parameter, torch.cat([_get_bias(state, layer) for state in states], dim=1))


def _write_biases(method: PrefixTuning, state: PrefixState, start: int, heads: TensorParallelHeads | None) -> None:
    for layer, parameter in enumerate(method.key_biases):
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        bias = _get_bias(state, layer)
        bias = bias if heads is None else heads.take_heads(bias, heads.splits[layer].keys)
        own[:, start : start + state.length].copy_(bias)


def _get_bias(state: PrefixState, layer: int) -> Tensor:
    """Return the biases ``[Hkv, m]`` of a layer's keys, 0 for a prefix without them."""
    key = state.pairs[layer][0]
    return key.new_zeros(key.shape[:2]) if state.biases is None else state.biases[layer]


def _check_sources(method: PrefixTuning, states: Sequence[PrefixState]) -> None:
    """Check that prefixes fill another one."""
    config: MethodConfig = method.config
    lengths = [state.length for state in states]
    if sum(lengths) != config.num_virtual_tokens:
        raise ValueError(
            f"`sources` must have the {config.num_virtual_tokens} tokens of the prefix together, but have {lengths}."
        )
    for state in states:
        state.check_shapes("sources", method.shapes)
        if state.prefix_position not in (None, method.config.prefix_position):
            raise ValueError(
                f"`sources` must have prefix_position={method.config.prefix_position!r} as the prefix has, but have "
                f"{state.prefix_position!r}."
            )
        if state.biases is not None and not method.config.key_bias:
            raise ValueError("`sources` must have no biases of keys for a prefix with key_bias=False.")
