"""Store the adapters of many users for one model, and load and drop them as batches need them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ....methods import METHODS, PrefixMethod, PrefixTuning, PrefixTuningConfig
from ....methods.base import check_count, check_positive
from ..attachment import (
    check_method_fits,
    check_name_free,
    detach,
    find_attachment,
    get_active_name,
    get_attachment,
    prepare,
    set_adapter,
    use_adapter,
)
from ..files.saving import SavedAdapter, attach_saved, fill, locate_adapter, read_adapter
from ..models.attention import Prefix
from ..models.switching import evaluating, find_device
from ..models.tuners import find_base_model
from ..prefixes.initial import PrefixSource, PrefixState
from ..prompts.shared_prompt import SharedPromptHooks
from ..sharding.fully_sharded import gathering_around, is_fully_sharded
from ..sharding.tensor_parallel import TensorParallelHeads, gather_full_tensor
from .mixed_call import BASE, Part, compute_prefixes
from .routing import Routing, find_reason_against, make_part
from .span_store import KeyedPrefix

_LOADING = "__loading__"


class AdapterStore:
    """Adapters of one model that are used by name, ``model(..., adapter_names=[...])``, and are not trained.

    The adapters need memory for their keys and values, plus less than 5 % for growth. One tensor per layer holds the
    keys of all adapters, and another one the values. You can load, rename and drop adapters between calls without
    compiling or attaching anything. Freed memory is reused. If no gap is large enough for an adapter, all adapters move
    into new tensors.

    A model has one store. It can also have attached adapters, and a batch can use both.

    On a sharded model all ranks must load and drop the same adapters. Under tensor parallelism each rank stores the
    keys and values of its own heads. Under FSDP2 each rank stores all heads.

    Args:
        model: a ``transformers`` model. It is frozen, as by ``attach``. ``detach`` drops the store.
        tokens: the number of virtual tokens to reserve memory for, so that the tensors do not have to grow up to it.

    Raises:
        TypeError: if ``model`` is not a ``transformers`` model.
        ValueError: if the layers of the model do not support prefixes.
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
        """Return the names of the adapters in the order in which they were loaded."""
        return list(self.routing.stored)

    @property
    def tokens(self) -> int:
        """Return the total number of virtual tokens of all adapters."""
        return sum(part.length for part in self.routing.stored.values())

    @property
    def nbytes(self) -> int:
        """Return the memory of all keys and values in bytes, including gaps and slack."""
        return self.routing.store.nbytes

    def __contains__(self, name: object) -> bool:
        return name in self.routing.stored

    def __len__(self) -> int:
        return len(self.routing.stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        return f"AdapterStore({len(self)} adapters, {self.tokens:,} tokens, {self.nbytes / 2**20:,.1f} MiB)"

    def load(self, name: str, source: PrefixSource) -> None:
        """Load an adapter, or replace the stored adapter of that name.

        Key/value caches can be continued when the same adapter is loaded again, but not with another one.

        Args:
            name: the name of the adapter.
            source: a file or directory as for ``load_adapter``, or a prefix in memory (``read_prefix``,
                ``PrefixState``) for all attention layers of the model. A prefix in memory without a position is loaded
                with ``prefix_position="none"``. A prompt runs once, and its keys and values are stored.

        Raises:
            FileNotFoundError: if ``source`` has no adapter.
            TypeError: if ``name`` is not a string.
            ValueError: if an attached adapter has that name, or if the adapter does not fit the model or cannot be in a
                batch with others. The store is unchanged.
        """
        self.load_after(name, source, lambda length: None)

    def load_after(self, name: str, source: PrefixSource, make_room: Callable[[int], None]) -> None:
        """Load an adapter after calling ``make_room`` with its number of tokens."""
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string, but is {type(name).__name__}.")
        with self._changing():
            if name not in self:
                check_name_free(self.model, name)
            part, prefixes = self._read(name, source)
            part.identity = _identify(part, prefixes)
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
        """Rename an adapter. Caches that were filled with it keep the former name.

        Raises:
            ValueError: if no stored adapter is called ``name``, or if an adapter is already called ``new``.
        """
        with self._changing():
            self._check_known(name)
            if new in self:
                raise ValueError(f"`new` must be an unused name, but the store already has an adapter {new!r}.")
            check_name_free(self.model, new)
            part = self.routing.stored[name]
            part.name = new
            self.routing.stored = {new if each == name else each: part for each, part in self.routing.stored.items()}
            if name in self.routing.store.spans:
                self.routing.store.rename(name, new)

    def drop(self, name: str) -> None:
        """Drop an adapter. Its memory is reused for other adapters.

        Raises:
            ValueError: if no stored adapter has that name.
        """
        with self._changing():
            self._check_known(name)
            del self.routing.stored[name]
            if name in self.routing.store.spans:
                self.routing.store.drop(name)

    def compact(self) -> None:
        """Move all adapters together, and free the memory of gaps and slack."""
        with self._changing():
            self.routing.store.compact()

    def _check_known(self, name: str) -> None:
        if name not in self:
            raise ValueError(f"`name` must be the name of an adapter in the store, {self.names}, but is {name!r}.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the store in this context while no call of the model is in progress."""
        with self.routing.lock:
            if getattr(find_attachment(self.model), "routing", None) is not self.routing:
                raise ValueError("`model` was detached, which dropped this store. Create a new AdapterStore.")
            yield

    def _read(self, name: str, source: PrefixSource) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return an adapter, and its keys and values by attention module."""
        if isinstance(source, PrefixState):
            return self._read_state(name, source)
        saved = read_adapter(self.model, locate_adapter(source), name)
        if isinstance(saved.config, PrefixTuningConfig) and not saved.is_of_peft:
            return self._make_prefix(name, saved.config, saved.tensors)
        return self._attach_for_a_moment(name, saved)

    def _make_prefix(
        self, name: str, config: PrefixTuningConfig, tensors: dict[str, Tensor]
    ) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return a prefix from this package's files, without attaching it."""
        method_class = METHODS[config.method_name()][1]
        assert issubclass(method_class, PrefixMethod)
        layers = self.routing.list_layers()
        layers = [layers[i] for i in method_class.chosen_layers(config, [layer.whole_shape for layer in layers])]
        method = method_class(config, [layer.whole_shape for layer in layers])
        check_method_fits(method, layers)
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

    def _attach_for_a_moment(self, name: str, saved: SavedAdapter) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return an adapter by attaching it temporarily, to compare PEFT's prefixes and to run prompts."""
        former = get_active_name(self.model)
        attach_saved(self.model, saved, _LOADING)
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
        """Return the keys and values of a prefix, and its part without the data that is no longer needed."""
        with torch.no_grad():
            prefixes = compute_prefixes(part)
        if part.gates is None and not part.has_own_softmax:
            return replace(part, method=None), prefixes
        if isinstance(part.method, PrefixTuning):
            del part.method.prefix  # only its gates are needed; keys and values are in the store
        return part, prefixes

    def _read_state(self, name: str, state: PrefixState) -> tuple[Part, Mapping[nn.Module, KeyedPrefix]]:
        """Return the part, and the keys and values, of a prefix in memory."""
        layers = self.routing.list_layers()
        state.check_shapes("source", [layer.whole_shape for layer in layers])
        length = state.length
        if state.shift and not self.routing.shifts:
            raise ValueError(
                f'`source` must have prefix_position="none" for {type(self.model).__name__}, whose positions cannot be '
                f"shifted, but has {state.prefix_position!r}."
            )
        indices = {layer.module: index for index, layer in enumerate(layers)}
        pairs: list[Prefix] = state.pairs
        biases: list[Tensor | None] = [None] * len(layers) if state.biases is None else [*state.biases]
        heads = TensorParallelHeads.find(self.model, layers)
        if heads is not None:
            pairs, biases = heads.take_prefixes(pairs), heads.take_biases(biases)
        prefixes = {
            layer.module: KeyedPrefix(*pair, bias) for layer, pair, bias in zip(layers, pairs, biases, strict=True)
        }
        return Part(name, length, state.shift, indices), prefixes


def _identify(part: Part, prefixes: Mapping[nn.Module, KeyedPrefix]) -> str:
    """Return a hash of an adapter that is the same when the adapter is loaded again.

    It depends on the keys, values and biases of the last token, and on the parameters of gates, offsets and states.
    """
    given = [tensor[:, -1:] for prefix in prefixes.values() for tensor in prefix if tensor is not None]
    given += [] if part.method is None else list(part.method.parameters())
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in given]  # of this rank
    last = [tensor.detach().float().flatten() for tensor in own]
    joined = torch.cat([tensor.to(last[0].device) for tensor in last]) if last else torch.empty(0)
    return hashlib.sha256(joined.cpu().numpy().tobytes()).hexdigest()  # a single copy from the device


def _copy_gathered(method: Any, heads: TensorParallelHeads | None) -> Any:
    """Return a copy of a method that FSDP2 has sharded and gathered. FSDP2 does not manage the copy."""
    shape: Any = method.shapes if isinstance(method, PrefixMethod) else method.shape
    copied = METHODS[method.config.method_name()][1](method.config, shape)
    parameters = dict(method.named_parameters())
    copied.to(next(iter(parameters.values())))
    fill(dict(copied.named_parameters()), {key: gather_full_tensor(each.detach()) for key, each in parameters.items()})
    if heads is not None and isinstance(copied, PrefixMethod):
        heads.distribute(copied)
    return copied.eval().requires_grad_(False)


class ResidentAdapters:
    """Adapters that are loaded into a store when a batch needs them, and dropped when others need the memory.

    Adapters that the caller loads into the store count towards the limit, but are never dropped.

    Args:
        store: the store of the model.
        read: a mapping from names to sources as for ``AdapterStore.load``, or a function that returns the source of a
            name. A prefix in memory (``read_prefix``) loads in little more than the time of a copy.
        tokens: the maximum number of virtual tokens in the store.

    Raises:
        TypeError: if ``tokens`` is not a whole number.
        ValueError: if ``tokens`` is less than 1.
    """

    def __init__(
        self, store: AdapterStore, read: Callable[[str], PrefixSource] | Mapping[str, PrefixSource], tokens: int
    ) -> None:
        check_positive("tokens", tokens)
        self.store = store
        self.read = read
        self.tokens = tokens
        self._used: OrderedDict[str, None] = OrderedDict()  # the least recently used first

    def fetch(self, names: Iterable[str]) -> None:
        """Load the named adapters that are not in the store, and drop the least recently used ones to make room.

        Call it with the names of a batch before you run the model. Names of attached adapters and of the base model
        are ignored.

        Raises:
            KeyError: if ``read`` is a mapping without one of the names.
            ValueError: if the adapters of the batch have more tokens in total than the store may hold.
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
                own = [each for each in self.store if each not in self._used and each not in wanted]
                hint = f" Or drop the adapters that were loaded or renamed without `fetch`: {own}." if own else ""
                raise ValueError(
                    f"`names` must be of adapters with at most {self.tokens:,} tokens in total, the limit of the "
                    f"store. Use a smaller batch, or a larger `tokens`.{hint}"
                )
            del self._used[old]
            self.store.drop(old)
