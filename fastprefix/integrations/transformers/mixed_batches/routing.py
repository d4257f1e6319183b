"""Choose the adapter of each row in a call: the adapter in use, or the adapters that the call names."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ....methods import LlamaAdapter, PrefixMethod, PromptMethod, VisualMethod
from ..adapter import Adapter, Attachment
from ..models.discovery import Layer, find_layers
from ..models.hooks import (
    Forward,
    Interception,
    MethodReplacement,
    count_past,
    find_cache,
    name_arguments,
    read_parameter_names,
    read_state,
)
from ..models.switching import evaluating, find_device
from ..models.tuners import has_tuner_layers, read_tuner_state
from ..prefixes.prefix import PrefixHooks
from ..prompts.shared_prompt import SharedPromptHooks
from ..prompts.task_prompts import TaskPromptHooks
from ..sharding.fully_sharded import gathering_around, is_fully_sharded, outside_forward
from ..sharding.tensor_parallel import agree_on_any, is_sharded
from .mixed_call import BASE, MixedRows, Part, compute_prefixes
from .mixing import MixtureHooks, check_names, check_rows, get_held_names
from .span_store import KeyedPrefix, SpanStore

_ARGUMENT = "adapter_names"


class NamesInterception(Interception):
    """An interception of the calls of a model that may name adapters."""

    keyword = _ARGUMENT


class Routing:
    """Route the calls of a model to its adapters.

    A call without names runs with the adapter in use. A call with names replaces that adapter's hooks by hooks that
    give each row its own adapter. These stay installed until the next call without names.
    """

    def __init__(self, model: PreTrainedModel, attachment: Attachment) -> None:
        self.model: Any = model
        self.attachment = attachment
        self.store = SpanStore()
        self.stored: dict[str, Part] = {}
        """The adapters that are only in the store, by name."""
        self.serves = False  # the model has an AdapterStore, which needs no attached adapter
        self.lock = threading.RLock()
        self.hooks: MixtureHooks | None = None
        self.mixes = False  # hooks for named adapters replace those of the adapter in use
        self.used = False  # a call has named adapters, and later calls may continue its cache
        self.generating: tuple[str, ...] | None = None  # the names of a generation in progress
        self.parts: dict[Adapter, Part] = {}
        self.written: dict[Adapter, tuple[object, torch.Tensor]] = {}  # sources of the prompts in the store
        self.parameter_names = read_parameter_names(model)
        self.interception: NamesInterception | None = None
        self.replacement: MethodReplacement | None = None  # of ``generate``

    def install(self) -> None:
        """Intercept the model's ``forward`` outside of all other hooks, and its ``generate``."""
        if self.interception is not None:
            self.interception.remove()
        self.interception = NamesInterception(self.model, self.run)
        if self.replacement is None and hasattr(self.model, "generate"):
            self.replacement = MethodReplacement(self.model, "generate", self.generate)

    def remove(self) -> None:
        """Remove the interceptions."""
        self.leave()
        if self.interception is not None:
            self.interception.remove()
            self.interception = None
        if self.replacement is not None:
            self.replacement.remove()
            self.replacement = None

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model with the adapter in use, or with the adapters that the call names."""
        if not self.used and _ARGUMENT not in kwargs and get_held_names(find_cache(kwargs)) is None:
            return forward(*args, **kwargs)
        with self.lock:
            kwargs = dict(kwargs)
            names = check_names(kwargs.pop(_ARGUMENT, None))
            arguments = name_arguments(self.parameter_names, args, kwargs)
            names = self._choose_names(names, arguments)
            if names is None:
                self.leave()
                return self._get_forward()(*args, **kwargs)
            with self._select(names, count_past(arguments)):
                return self._get_forward()(*args, **kwargs)

    def generate(self, former: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Generate, with the adapter of each row if names are given."""
        names = check_names(kwargs.pop(_ARGUMENT, None))
        if names is None:
            names = get_held_names(find_cache(kwargs))
        if names is None:
            return former(*args, **kwargs)
        check_rows(names, {**kwargs, **({"input_ids": args[0]} if args else {})})
        with torch.no_grad(), self._select(names, count_past(kwargs)):
            outer, self.generating = self.generating, names
            try:
                return former(*args, **kwargs)
            finally:
                self.generating = outer

    def _get_forward(self) -> Forward:
        """Return the model's forward inside this interception, with the hooks that are installed now."""
        assert self.interception is not None
        return self.interception.forward

    def _choose_names(self, names: tuple[str, ...] | None, arguments: dict[str, Any]) -> tuple[str, ...] | None:
        """Return the names of a call's rows: those given, those of the generation in progress, or those of the cache.

        Raises:
            ValueError: if the number of names differs from the number of rows, or the names from those of the cache.
        """
        cache, generating = find_cache(arguments), names is None and self.generating is not None
        names = self.generating if generating else names
        past = count_past(arguments)
        held = get_held_names(cache)
        if held is None:
            if past > 0 and names is not None:
                raise ValueError(
                    "`past_key_values` must be a cache that was filled with `adapter_names`, or be empty. Its tokens "
                    "were not computed with the adapters in `adapter_names`."
                )
            if names is not None and not generating:
                check_rows(names, arguments)
            return names
        if names is None:
            return held
        if len(held) % len(names) or tuple(name for name in names for _ in range(len(held) // len(names))) != held:
            raise ValueError(
                f"`adapter_names` must be the names of `past_key_values`, {list(held)}, but are {list(names)}. Omit "
                "`adapter_names` when you continue a cache."
            )
        return held

    @contextmanager
    def _select(self, names: tuple[str, ...], past: int) -> Iterator[None]:
        """Run the calls in this context with these adapters."""
        with self.lock:
            parts = self.find_parts(names)
            with outside_forward(self.model):
                if past == 0:
                    self._prepare(names)
                self.enter()
                if not torch.is_grad_enabled():
                    self._write(self._list_gathered() if is_fully_sharded(self.model) else parts, past)
            assert self.hooks is not None
            call = self.hooks.make_call(MixedRows(names, parts, find_device(self.model)))
            former, self.hooks.call = self.hooks.call, call
            try:
                yield
            finally:
                self.hooks.call = former

    def _prepare(self, names: Sequence[str]) -> None:
        """Move the named adapters to the model's device and mode at the start of a sequence."""
        if torch.is_grad_enabled() and is_fully_sharded(self.model):
            raise ValueError(
                "`adapter_names` must be used without gradients on a model that FSDP2 has sharded, since ranks with "
                "different adapters would reduce different gradients. Train one adapter at a time."
            )
        known = {BASE, self.attachment.active, *self.attachment.together}
        lost = [name for name in self.attachment.adapters if name in names and name not in known]
        if lost and torch.is_grad_enabled() and DistributedDataParallel._active_ddp_module is not None:
            raise ValueError(
                f"`adapter_names` must name adapters that DistributedDataParallel reduces the gradients of, but has "
                f"{lost}. Pass all names to fastprefix.parameter_groups before you wrap the model."
            )
        device, training = find_device(self.model), self.model.training
        for name in dict.fromkeys(names):
            if name in self.attachment.adapters:
                method = self.attachment.adapters[name].method
                stays = is_sharded(method) or is_fully_sharded(method)  # FSDP2 would shard it again, on this rank only
                (method if stays else method.to(device)).train(training)

    def _list_gathered(self) -> list[Part]:
        """Return all attached adapters that rows may name. All ranks gather all of them, in the same order."""
        return [self._find_part(name) for name in self._list_usable()]

    def enter(self) -> None:
        """Replace the hooks of the adapter in use by the hooks for named adapters."""
        if self.mixes:
            return
        self.used = True
        active = None if self.attachment.active is None else self.attachment.adapter
        if active is not None and active.saved_modules:
            raise ValueError(
                f"`adapter_names` must not be given while the adapter in use trains modules of the base model "
                f"({', '.join(active.saved_modules)}), which all rows would share. Select another adapter with "
                "fastprefix.set_adapter, or attach it with modules_to_save=[]."
            )
        if active is not None:
            active.hooks.remove()
        try:
            self.make_hooks()
            assert self.hooks is not None
            parts = [*self.stored.values(), *(self._find_part(name) for name in self._list_usable())]
            self.hooks.keys = {part: adapter for adapter, part in self.parts.items()}
            self.hooks.install(parts)
        except BaseException:
            if active is not None:
                active.hooks.install(self.model)
            raise
        self.mixes = True
        self.install()

    def make_hooks(self) -> MixtureHooks:
        """Return the hooks for named adapters, created once. Other adapters' hooks must not be on the model."""
        if self.hooks is None:
            self.hooks = MixtureHooks(self.model, find_layers(self.model), self.store)
            self.hooks.leave = self.leave
        return self.hooks

    @property
    def shifts(self) -> bool:
        """Return whether the positions of the model's tokens can be shifted."""
        assert self.hooks is not None
        return self.hooks.text and self.hooks.encoder is None

    def list_layers(self) -> list[Layer]:
        """Return the attention layers of the model."""
        assert self.hooks is not None
        return list(self.hooks.layers.values())

    def leave(self) -> None:
        """Restore the hooks of the adapter in use."""
        if not self.mixes:
            return
        assert self.hooks is not None
        self.hooks.remove()
        self.mixes = False
        if self.attachment.active is not None:
            self.attachment.adapter.hooks.install(self.model)
        self.install()

    def forget(self, adapter: Adapter) -> None:
        """Drop the stored state of an adapter that is being detached."""
        self.parts.pop(adapter, None)
        self.written.pop(adapter, None)
        if adapter in self.store.spans:
            self.store.drop(adapter)

    def find_parts(self, names: Sequence[str]) -> list[Part]:
        """Return the part of each named adapter once, without the base model.

        Raises:
            ValueError: if no adapter has a name, or if the adapters cannot be in one batch.
        """
        parts = [self._find_part(name) for name in dict.fromkeys(names) if name != BASE]
        check_together(parts)
        return parts

    def _find_part(self, name: str) -> Part:
        if name in self.stored:
            return self.stored[name]
        adapter = self.attachment.adapters.get(name)
        if adapter is None:
            known = [*self.attachment.adapters, *self.stored, BASE]
            raise ValueError(f"`adapter_names` must only contain names of adapters, {known}, but has {name!r}.")
        if (reason := find_reason_against(adapter)) is not None:
            raise ValueError(f"`adapter_names` must not name {name!r}: {reason}.")
        part = self.parts.get(adapter)
        if part is None or part.method is not adapter.method or part.name != name:
            part = self.parts[adapter] = make_part(name, adapter)
            if self.hooks is not None:
                self.hooks.keys[part] = adapter
        return part

    def _list_usable(self) -> list[str]:
        return [name for name, each in self.attachment.adapters.items() if find_reason_against(each) is None]

    def _write(self, parts: Sequence[Part], past: int) -> None:
        """Write the keys and values of attached adapters into the store. Calls that continue a sequence keep them."""
        assert self.hooks is not None
        of_adapter = {part: adapter for adapter, part in self.parts.items()}
        fresh = [part for part in parts if part in of_adapter]
        if past > 0:
            fresh = [part for part in fresh if of_adapter[part] not in self.store.spans]
        if not fresh:
            return
        with gathering_around(self.model, [of_adapter[part].method for part in fresh]):
            self._write_prompts({part: of_adapter[part] for part in fresh if part.is_prompt})
            for part in fresh:
                if not (part.is_prompt or part.is_projected):
                    self.write(of_adapter[part], compute_prefixes(part))

    def _write_prompts(self, prompts: Mapping[Part, Adapter]) -> None:
        """Run the prompts whose stored keys and values may not match their parameters, and store the results."""
        if not prompts:
            return
        assert self.hooks is not None
        shared = self._read_backbone()
        states = {part: (shared, read_state(adapter.method)) for part, adapter in prompts.items()}
        flags = [self._is_changed(adapter, states[part]) for part, adapter in prompts.items()]
        flags = agree_on_any(self.model, flags, find_device(self.model))
        changed = [part for part, flag in zip(prompts, flags, strict=True) if flag]
        with evaluating(self.model):
            computed = self.hooks.run_prompts([part.method for part in changed])
        for part, prefixes in zip(changed, computed, strict=True):
            adapter = prompts[part]
            assert isinstance(adapter.method, PromptMethod)
            self.write(adapter, prefixes)
            self.written[adapter] = (states[part], adapter.method.prompt.detach().clone())

    def write(self, key: Any, prefixes: Mapping[nn.Module, KeyedPrefix]) -> None:
        """Write the keys and values of a prefix, given by attention module, into the store."""
        assert self.hooks is not None
        index = {module: i for i, module in enumerate(self.hooks.layers)}
        self.store.convert(self.model.dtype)  # before, since the values would be rounded to the former dtype
        self.store.write(key, {index[module]: prefix for module, prefix in prefixes.items()}, self.model.dtype)

    def _is_changed(self, adapter: Adapter, state: tuple[object, object]) -> bool:
        """Return whether a stored prompt was computed from another state, or whether a state is unknown."""
        if None in state or adapter not in self.written or adapter not in self.store.spans:
            return True
        former, prompt = self.written[adapter]
        assert isinstance(adapter.method, PromptMethod)
        return former != state or not torch.equal(prompt, adapter.method.prompt)

    def _read_backbone(self) -> object:
        """Return the state of the model that the prompts' keys and values depend on, or None if it is unknown."""
        assert self.hooks is not None
        backbone = self.hooks.backbone
        states = read_state(backbone), read_tuner_state(backbone)
        offloaded = any(parameter.is_meta for parameter in backbone.parameters())
        return None if offloaded or None in states else states

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, which cannot be copied."""
        return {**self.__dict__, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state with a new lock."""
        self.__dict__.update(state, lock=threading.RLock())


def find_reason_against(adapter: Adapter) -> str | None:
    """Return the reason why an adapter cannot be in one batch with others, or None."""
    if adapter.saved_modules:
        return f"it trains modules of the base model ({', '.join(adapter.saved_modules)}), which all rows share"
    if adapter.outside is not None:
        return f"it was merged, and {adapter.outside}"
    hooks = adapter.hooks
    if isinstance(hooks, PrefixHooks) and type(hooks) is not PrefixHooks and has_tuner_layers(hooks.backbone):
        return "it was merged, and PEFT's layers may change the model that it was merged from"
    if isinstance(adapter.hooks, TaskPromptHooks):
        return "it has a prompt for each of several tasks"
    if isinstance(adapter.hooks, PrefixHooks | SharedPromptHooks):
        return None
    if isinstance(adapter.method, VisualMethod):
        return "its rows are inserted among those of images"
    path = getattr(adapter.method, "prompt_path", None)
    return f"its prompt runs in every row ({str(path).removeprefix('textbook: ')})"


def make_part(name: str, adapter: Adapter) -> Part:
    """Return the data of an attached adapter that a mixed batch needs."""
    method, hooks = adapter.method, adapter.hooks
    assert isinstance(hooks, PrefixHooks | SharedPromptHooks)
    length = method.config.num_virtual_tokens
    indices = {module: index for index, module in enumerate(hooks.bindings)}
    if isinstance(method, PromptMethod):
        return Part(name, length, length, indices, method, is_prompt=True, identity=adapter.identity)
    assert isinstance(hooks, PrefixHooks)
    assert isinstance(method, PrefixMethod)
    projections = {module: binding.projection for module, binding in hooks.bindings.items() if binding.projection}
    shift, own = method.position_shift(), method.output_gate(0) is not None
    return Part(name, length, shift, indices, method, projections, own, heads=hooks.heads, identity=adapter.identity)


def check_together(parts: Sequence[Part]) -> None:
    """Refuse adapters that cannot be in one batch.

    Raises:
        ValueError: if two of the adapters cannot be combined.
    """
    groups: dict[Any, dict[Any, str]] = {"softmax": {}, "positions": {}, "states": {}}
    for part in parts:
        groups["softmax"].setdefault(part.has_own_softmax, part.name)
        groups["positions"].setdefault(part.shift > 0, part.name)
        groups["states"].setdefault(isinstance(part.method, LlamaAdapter), part.name)
        poolings: Any = getattr(part.gates, "poolings", None)
        for module, index in part.indices.items() if poolings is not None else ():
            groups.setdefault(("pooling", module), {}).setdefault(poolings[index] == "query", part.name)
    reasons = {
        "states": "LLaMA-Adapter can only be in a batch with other adapters of that method",
        "softmax": "only one of them has a separate softmax",
        "positions": 'one moves the positions of the tokens ("shift") and the other does not ("none")',
    }
    of_gates = "one has a gate per query and the other has a gate per sequence"
    for kind, group in groups.items():
        if len(group) > 1:
            first, second = list(group.values())[:2]
            reason = reasons.get(kind, of_gates)
            raise ValueError(f"`adapter_names` must not name both {first!r} and {second!r}: {reason}.")
