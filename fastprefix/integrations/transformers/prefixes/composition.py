"""Combine several prefixes into one adapter, and replace the contents of a prefix without recompilation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

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
from .initial import PrefixSource, PrefixState
from .prefix import PrefixHooks


def compose(model: Model, names: Sequence[str], *, name: str, trainable: Sequence[str] | None = None) -> Model:
    """Attach an adapter that concatenates several prefixes, and make it the adapter in use.

    The composed adapter shares the parameters of its parts. Training it trains the parts, and ``swap_prefix`` on a part
    also changes the composed adapter. Each part keeps its frozen tokens. The result equals that of the parts' key/value
    caches, concatenated in this order. With ``prefix_position="shift"`` the positions of the tokens follow those of all
    parts.

    Args:
        model: a model with the adapters attached.
        names: the names of the adapters, in order. Each adapter must be prefix tuning, a cartridge, another prefix
            whose gates do not depend on the input, or a composition of these.
        name: the name of the composed adapter.
        trainable: the names of the parts to train. The other parts are frozen while the composed adapter is in use, and
            gradients of frozen parts at the start are not computed. None trains all parts that are not merged.

    Returns:
        The same model.

    Raises:
        ValueError: if an adapter does not exist, cannot be a part or does not fit the other parts, if two adapters
            share a prefix, or if ``name`` is already in use.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    chosen = list(dict.fromkeys(names))
    if isinstance(names, str) or not chosen or len(chosen) != len(names):
        raise ValueError(f"`names` must be a list of one or more different adapter names, got {names!r}")
    check_name_free(model, name)
    if unknown := sorted(set(trainable or ()) - set(chosen)):
        raise ValueError(f"`trainable` must contain only names from {chosen}, got {unknown}.")
    parts: list[tuple[PrefixTuning, bool]] = []
    owners: dict[PrefixTuning, str] = {}
    for each in chosen:
        adapter = attachment.adapters[attachment.check_known(each)]
        _check_part(each, adapter)
        trains = not adapter.merged if trainable is None else each in trainable
        for part, own in _list_parts(adapter):
            if (owner := owners.setdefault(part, each)) != each:
                raise ValueError(f"`names` must contain each prefix once, but {owner!r} and {each!r} share a prefix.")
            parts.append((part, trains and own))
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
        reason = 'it has softmax="own", which other prefixes cannot share'
    if reason is not None:
        raise ValueError(f"`names` must name adapters that consist of a prefix alone, but {name!r} does not: {reason}.")


def _list_parts(adapter: Adapter) -> list[tuple[PrefixTuning, bool]]:
    """Return the prefixes of an adapter, each with a flag that tells whether it is trained."""
    if isinstance(adapter.method, Composition):
        return list(zip(adapter.method.parts, adapter.method.config.trainable, strict=True))  # type: ignore[arg-type]
    assert isinstance(adapter.method, PrefixTuning)
    return [(adapter.method, True)]


def swap_prefix(model: nn.Module, sources: PrefixSource | Sequence[PrefixSource], *, name: str | None = None) -> None:
    """Replace the keys and values of a prefix in place, without attaching, checking or compiling anything again.

    Use it to change a prefix between calls, such as the document that is served or the distractors in front of a prefix
    in training (Cartridges at Scale, arXiv 2606.04557).

    Args:
        model: a model with the prefix attached.
        sources: the new contents: a prefix, or a list of prefixes that are concatenated. Each is a file or directory as
            for ``load_adapter``, or a prefix in memory (``read_prefix``, ``PrefixState``). Together they must have
            the number of virtual tokens of the prefix.
        name: the name of the adapter, which must have free keys and values. None selects the adapter in use.

    Raises:
        ValueError: if the adapter does not have free keys and values with ``softmax="joint"``, or if the sources do not
            fit it. The adapter is unchanged.
    """
    attachment = get_attachment(model)
    adapter = attachment.adapter if name is None else attachment.adapters[attachment.check_known(name)]
    method = adapter.method
    prefix = getattr(method, "prefix", None)
    if not isinstance(method, PrefixTuning) or not isinstance(prefix, FreePrefix):
        raise ValueError(f"`name` must be an adapter with free keys and values, but it has {type(method).__name__}.")
    if method.config.softmax != "joint":
        raise ValueError('`name` must be an adapter with softmax="joint", since its gates belong to its keys.')
    refuse_partitioned(base := find_base_model(model))
    given: Sequence[PrefixSource] = [sources] if isinstance(sources, str | os.PathLike | PrefixState) else sources
    states = [each if isinstance(each, PrefixState) else read_prefix(model, each) for each in given]
    _check_sources(method, states)
    states = [_copy_shared(state, method) for state in states]
    if is_fully_sharded(base):
        reshard(base)
        _write_sharded(method, prefix, states)
    else:
        heads = adapter.hooks.heads if isinstance(adapter.hooks, PrefixHooks) else None
        _write(method, prefix, states, heads)
    for each in attachment.adapters.values():
        if isinstance(each.hooks, PrefixHooks):
            each.hooks.kept = None  # FSDP2 does not update the version counter of gathered parameters


def _copy_shared(state: PrefixState, method: PrefixTuning) -> PrefixState:
    """Return a state without tensors that are views of a method's parameters, which are overwritten."""
    parameters = (each.to_local() if isinstance(each, DTensor) else each for each in method.parameters())
    own = {each.untyped_storage().data_ptr() for each in parameters}

    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in own else tensor

    biases = None if state.biases is None else [copy(bias) for bias in state.biases]
    return replace(state, pairs=[(copy(key), copy(value)) for key, value in state.pairs], biases=biases)


@torch.no_grad()
def _write(
    method: PrefixTuning, prefix: FreePrefix, states: Sequence[PrefixState], heads: TensorParallelHeads | None
) -> None:
    """Copy prefixes into another prefix, consecutively. Each state keeps its device."""
    start = 0
    for state in states:
        prefix.write(state.pairs if heads is None else heads.take_prefixes(state.pairs), start)
        if method.config.key_bias:
            _write_biases(method, state, start, heads)
        start += state.length


@torch.no_grad()
def _write_sharded(method: PrefixTuning, prefix: FreePrefix, states: Sequence[PrefixState]) -> None:
    """Copy prefixes into a prefix that FSDP2 has sharded, possibly along its tokens."""
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
    """Return the biases ``[Hkv, m]`` of a layer's keys, zeros for a prefix without biases."""
    key = state.pairs[layer][0]
    return key.new_zeros(key.shape[:2]) if state.biases is None else state.biases[layer]


def _check_sources(method: PrefixTuning, states: Sequence[PrefixState]) -> None:
    """Check that the given prefixes have the length, the shapes and the options of the prefix they replace."""
    for state in states:
        state.check_shapes("sources", method.shapes)
    config: MethodConfig = method.config
    lengths = [state.length for state in states]
    if sum(lengths) != config.num_virtual_tokens:
        raise ValueError(
            f"`sources` must have {config.num_virtual_tokens} tokens in total, as the prefix does, but have {lengths}."
        )
    for state in states:
        if state.prefix_position not in (None, method.config.prefix_position):
            raise ValueError(
                f"`sources` must have prefix_position={method.config.prefix_position!r}, as the prefix does, but have "
                f"{state.prefix_position!r}."
            )
        if state.biases is not None and not method.config.key_bias:
            raise ValueError("`sources` must have no key biases for a prefix with key_bias=False.")
    shifts, expected = [state.shift for state in states], method.position_shift()
    if all(state.prefix_position is not None for state in states) and sum(shifts) != expected:
        raise ValueError(
            f"`sources` must move the tokens by {expected} positions in total, as the prefix does, but move them by "
            f"{shifts}. Attach a prefix with this `position_shift`."
        )
