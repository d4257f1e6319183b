"""Keep the adapters of many users ready for one model, and choose which of them are in its memory."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....methods import METHODS, PrefixMethod, PrefixTuning, PrefixTuningConfig
from ....methods.base import check_count, check_positive
from ..attachment import (
    DEFAULT,
    check_name_free,
    detach,
    find_attachment,
    get_active_name,
    get_attachment,
    prepare,
    set_adapter,
    use_adapter,
)
from ..files.saving import fill, load_adapter, locate_adapter, read_adapter
from ..models.attention import Prefix
from ..models.switching import evaluating, find_device
from ..models.tuners import find_base_model
from ..prefixes.initial import PrefixState
from ..prompts.shared_prompt import SharedPromptHooks
from ..sharding.fully_sharded import gathering_around, is_fully_sharded
from ..sharding.tensor_parallel import TensorParallelHeads, gather_full_tensor
from .mixed_call import BASE, Part, compute_prefixes
from .routing import Routing, find_reason_against, make_part
from .span_store import KeyedPrefix

Source = str | os.PathLike[str] | PrefixState
"""A file or directory of an adapter, or a prefix in memory."""

_LOADING = "__loading__"


class AdapterStore:
    """Adapters of one model that are used by name, ``model(..., adapter_names=[...])``, and not trained.

    On a sharded model all ranks load and drop the same adapters. Under tensor parallelism each rank has the keys and
    values of its own heads, and under FSDP2 all of them.

    They take no more memory than their keys and values, and less than 5 % for growth: one tensor a layer holds the keys
    of all of them. They are loaded, renamed and dropped between calls, while nothing is compiled or attached anew.
    Room that is freed is used again; where no gap is large enough, all move together into new tensors.

    The model has one store. It may have adapters attached too, and a batch may have both.

    Args:
        model: a ``transformers`` model. It is frozen, as by ``attach``; ``detach`` drops the store.
        tokens: the number of tokens to make room for at once, so that the tensors need not grow up to it.

    Raises:
        TypeError: not a ``transformers`` model.
        ValueError: its layers cannot have prefixes.
    """

    def __init__(self, model: PreTrainedModel, tokens: int = 0) -> None:
        model = find_base_model(model)
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"`model` must be a transformers model, but is {type(model).__name__}.")
        check_count("tokens", tokens)
        self.model = model
        attachment = prepare(model)
        self.routing: Routing = attachment.routing
        try:
            with use_adapter(model, None):
                self.routing.make_hooks()
        except ValueError:
            if not attachment.adapters:
                detach(model)
            raise
        self.routing.serves = True
        self.routing.install()
        self.routing.store.reserve(tokens)

    @property
    def names(self) -> list[str]:
        """Return the names of the adapters, in the order in which they were loaded."""
        return list(self.routing.stored)

    @property
    def tokens(self) -> int:
        """Return how many virtual tokens all adapters have together."""
        return self.routing.store.tokens

    @property
    def nbytes(self) -> int:
        """Return the memory of all keys and values, with gaps and slack, in bytes."""
        return self.routing.store.nbytes

    def __contains__(self, name: object) -> bool:
        return name in self.routing.stored

    def __len__(self) -> int:
        return len(self.routing.stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        return f"AdapterStore({len(self)} adapters, {self.tokens:,} tokens, {self.nbytes / 2**20:,.1f} MiB)"

    def load(self, name: str, source: Source) -> None:
        """Load an adapter, or put another in the place of the one that has the name.

        Args:
            name: of the adapter.
            source: a file or directory as for ``load_adapter``, or a prefix in memory (``read_prefix``,
                ``PrefixState``) for all attention layers of the model, which is one with ``prefix_position="none"`` if
                it does not say. A prompt is run once, and its keys and values are kept.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: a name that an attached adapter has, or an adapter that does not fit the model or cannot be in
                a batch with others. The store is left as it was.
        """
        self.load_after(name, source, lambda length: None)

    def load_after(self, name: str, source: Source, make_room: Callable[[int], None]) -> None:
        """Load an adapter after a call of ``make_room`` with the number of its tokens."""
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string, but is {type(name).__name__}.")
        with self._changing():
            if name not in self:
                check_name_free(self.model, name)
            part, prefixes = self._read(name, source)
            make_room(part.length)
            self._put(part, prefixes)

    def _put(self, part: Part, prefixes: Mapping[nn.Module, KeyedPrefix]) -> None:
        if part.method is not None or part.shift:
            self.routing.leave()  # the next call sets the hooks that the adapter needs
        if prefixes:
            self.routing.write(part.name, prefixes)
        elif part.name in self.routing.store.spans:
            self.routing.store.drop(part.name)
        self.routing.stored[part.name] = part

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name. Caches that it was used with keep the former one.

        Raises:
            ValueError: there is no adapter of that name, or one has the other name.
        """
        with self._changing():
            self._check_known(name)
            if new in self:
                raise ValueError(f"`new` must be a name that no adapter has, but is {new!r}.")
            check_name_free(self.model, new)
            part = self.routing.stored[name]
            part.name = new
            self.routing.stored = {new if each == name else each: part for each, part in self.routing.stored.items()}
            if name in self.routing.store.spans:
                self.routing.store.rename(name, new)

    def drop(self, name: str) -> None:
        """Drop an adapter. Its room is used for others.

        Raises:
            ValueError: there is no adapter of that name.
        """
        with self._changing():
            self._check_known(name)
            del self.routing.stored[name]
            if name in self.routing.store.spans:
                self.routing.store.drop(name)

    def compact(self) -> None:
        """Move all adapters together, and give the memory of gaps and slack back."""
        with self._changing():
            self.routing.store.compact()

    def _check_known(self, name: str) -> None:
        if name not in self:
            raise ValueError(f"`name` must be one of the adapters in the store, {self.names}, but is {name!r}.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the store in this context, while no call of the model is in progress."""
        with self.routing.lock:
            if getattr(find_attachment(self.model), "routing", None) is not self.routing:
                raise ValueError("`model` was detached, which dropped this store: make a new AdapterStore.")
            yield

    def _read(self, name: str, source: Source) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return an adapter, and its keys and values by attention module."""
        if isinstance(source, PrefixState):
            return self._read_state(name, source)
        config, tensors, is_of_peft = read_adapter(self.model, locate_adapter(source), DEFAULT)
        if isinstance(config, PrefixTuningConfig) and not is_of_peft:
            return self._make_prefix(name, config, tensors)
        return self._attach_for_a_moment(name, source)

    def _make_prefix(
        self, name: str, config: PrefixTuningConfig, tensors: dict[str, Tensor]
    ) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return a prefix of this package's files, which is not attached for that."""
        method_class = METHODS[config.method_name()][1]
        assert issubclass(method_class, PrefixMethod)
        layers = self.routing.list_layers()
        layers = [layers[i] for i in method_class.chosen_layers(config, [layer.whole_shape for layer in layers])]
        method = method_class(config, [layer.whole_shape for layer in layers])
        method.to(device=find_device(self.model), dtype=torch.promote_types(self.model.dtype, torch.float32))
        if any(key.startswith("modules_to_save.") for key in tensors):
            raise ValueError("`source` must be an adapter that trains no modules of the model, which all rows share.")
        fill(dict(method.named_parameters()), tensors)
        indices = {layer.module: index for index, layer in enumerate(layers)}
        own = method.output_gate(0) is not None
        heads = TensorParallelHeads.find(self.model, layers)
        part = Part(
            name, config.num_virtual_tokens, method.position_shift(), indices, method.eval(), {}, own, heads=heads
        )
        return self._finish(part)

    def _attach_for_a_moment(self, name: str, source: Source) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return an adapter that has to be attached to be known: PEFT's are compared, and prompts run."""
        assert not isinstance(source, PrefixState)
        former = get_active_name(self.model)
        load_adapter(self.model, source, name=_LOADING)
        try:
            adapter = get_attachment(self.model).adapter
            if (reason := find_reason_against(adapter)) is not None:
                raise ValueError(f"`source` must be an adapter that can be in a batch with others, but {reason}.")
            part = make_part(name, adapter)
            with gathering_around(self.model, [adapter.method]):
                if is_fully_sharded(self.model):
                    part.method = _copy_gathered(adapter.method, part.heads)
                if not isinstance(adapter.hooks, SharedPromptHooks):
                    return self._finish(part)
                with torch.no_grad(), evaluating(self.model):
                    pairs = adapter.hooks.run_prompt()
            prefixes = {module: KeyedPrefix(*pairs[index]) for module, index in part.indices.items()}
            return replace(part, method=part.method if part.has_offset else None), prefixes
        finally:
            detach(self.model, _LOADING)
            if former is not None:
                set_adapter(self.model, former)

    def _finish(self, part: Part) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return the keys and values of a prefix, and the prefix without what is not needed beside them."""
        with torch.no_grad():
            prefixes = compute_prefixes(part)
        if part.gates is None and not part.has_own_softmax:
            return replace(part, method=None), prefixes
        if isinstance(part.method, PrefixTuning):
            del part.method.prefix  # its gates are needed, its keys and values are in the store
        return part, prefixes

    def _read_state(self, name: str, state: PrefixState) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return a prefix in memory."""
        layers = self.routing.list_layers()
        state.check_shapes("source", [layer.whole_shape for layer in layers])
        length = state.length
        shift = length if state.prefix_position == "shift" else 0
        indices = {layer.module: index for index, layer in enumerate(layers)}
        pairs: list[Prefix] = state.pairs
        biases: list[Tensor | None] = [None] * len(layers) if state.biases is None else [*state.biases]
        heads = TensorParallelHeads.find(self.model, layers)
        if heads is not None:
            pairs, biases = heads.take_prefixes(pairs), heads.take_biases(biases)
        prefixes = {
            layer.module: KeyedPrefix(*pair, bias) for layer, pair, bias in zip(layers, pairs, biases, strict=True)
        }
        return Part(name, length, shift, indices), prefixes


def _copy_gathered(method: Any, heads: TensorParallelHeads | None) -> Any:
    """Return a copy of a method that FSDP2 has sharded and gathered, which does not belong to FSDP2."""
    shape: Any = method.shapes if isinstance(method, PrefixMethod) else method.shape
    copied = METHODS[method.config.method_name()][1](method.config, shape)
    parameters = dict(method.named_parameters())
    copied.to(next(iter(parameters.values())))
    fill(dict(copied.named_parameters()), {key: gather_full_tensor(each.detach()) for key, each in parameters.items()})
    if heads is not None and isinstance(copied, PrefixMethod):
        heads.distribute(copied)
    return copied.eval().requires_grad_(False)


class ResidentAdapters:
    """Adapters that are loaded into a store when a batch needs them, and dropped when others need the room.

    Args:
        store: of the model.
        read: returns the source of the adapter with a name, or a mapping from names to sources, as for
            ``AdapterStore.load``. An adapter in memory (``read_prefix``) is loaded at the speed of a copy.
        tokens: how many virtual tokens the adapters in the store may have together.
    """

    def __init__(self, store: AdapterStore, read: Callable[[str], Source] | Mapping[str, Source], tokens: int) -> None:
        check_positive("tokens", tokens)
        self.store = store
        self.read = read
        self.tokens = tokens
        self._used: OrderedDict[str, None] = OrderedDict()  # the least recently used first

    def fetch(self, names: Iterable[str]) -> None:
        """Load the adapters with these names that are not there, and drop those that were not used for longest.

        Call it with the names of a batch before the model. Those of attached adapters and of the base are left out.

        Raises:
            ValueError: the adapters have more tokens together than may be in the store.
        """
        attached = get_attachment(self.store.model).adapters
        wanted = [name for name in dict.fromkeys(names) if name != BASE and name not in attached]
        for name in wanted:
            if name in self.store:
                self._used[name] = None
                self._used.move_to_end(name)
        for name in wanted:
            if name not in self.store:
                self._load(name, wanted)

    def _load(self, name: str, wanted: Sequence[str]) -> None:
        source = self.read[name] if isinstance(self.read, Mapping) else self.read(name)
        self.store.load_after(name, source, lambda length: self._make_room(length, wanted))
        self._used[name] = None

    def _make_room(self, length: int, wanted: Sequence[str]) -> None:
        while self.store.tokens + length > self.tokens:
            old = next((each for each in self._used if each not in wanted and each in self.store), None)
            if old is None:
                raise ValueError(
                    f"`names` must be of adapters with at most {self.tokens:,} tokens together, the limit of the "
                    "store: make the batch smaller, or the limit larger."
                )
            del self._used[old]
            self.store.drop(old)
