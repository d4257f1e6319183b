"""Run the rows of one batch with different adapters.

In each layer, one tensor concatenates the keys and values of all adapters of a call, and each row attends to its own
span of it. Prompts are converted to keys and values first, which are the same in every row of a decoder. Offsets on the
tokens come from banks with an entry for each adapter.

With gradients, the tensors are concatenated from the adapters' parameters, and each adapter gets the gradient of its
rows. Without gradients, they are the tensors of the model's ``SpanStore``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..models.attention import (
    CarriedBindings,
    Prefix,
    WatchHandle,
    carry_through_checkpoints,
    carrying,
    get_carried_bindings,
)
from ..models.discovery import Layer, find_backbone
from ..models.hooks import (
    Forward,
    Interception,
    asks_for,
    check_mask_length,
    check_parameter_names,
    checkpoints_reentrantly,
    count_past,
    count_tokens,
    expand_one_row_mask,
    find_cache,
    name_arguments,
    refuse_one_row_masks,
    refuse_replicas,
)
from ..models.positions import Positions, PositionShift, RowShift, refuse_packed
from ..models.switching import Implementation, runs_on_text
from ..prefixes.gates import drop_by_row, hold_by_row
from ..prefixes.prefix import HiddenWatch, refuse_reentrant
from ..prompts.prompt import OffsetHooks, needs_ids
from ..prompts.shared_prompt import Randomness, capturing, find_reason_against_mask
from ..sharding.fully_sharded import is_fully_sharded, run_gathered
from ..sharding.tensor_parallel import TensorParallelHeads
from .mixed_call import MixedCall, MixedOffsets, MixedRows, Part, compute_prefixes
from .span_store import KeyedPrefix, SpanStore


class MixtureHooks:
    """The hooks of a model whose rows have different adapters, from ``install`` to ``remove``."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer], store: SpanStore) -> None:
        self.model = model
        self.store = store
        self.layers = {layer.module: layer for layer in layers}
        self.text = runs_on_text(model)
        self.backbone: Any = find_backbone(model) if self.text else model
        self.names = check_parameter_names(self.backbone)
        self.windows = any(layer.window is not None for layer in layers)
        self.encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else None
        self.call: MixedCall | None = None  # the call that is about to run
        self.keys: dict[Part, Any] = {}  # the key of each part in the store
        self.shift: PositionShift | None = None
        self.offsets: OffsetHooks | None = None
        self.implementation: Implementation | None = None
        self.handles: list[Any] = []
        self.leave: Any = None  # restores the adapter in use, for a call without names
        self.randomness = Randomness(self.backbone)
        self.heads = TensorParallelHeads.find(model, layers)

    def find_key(self, part: Part) -> Any:
        """Return the key of a part in the store."""
        return self.keys.get(part, part.name)

    def make_call(self, rows: MixedRows) -> MixedCall:
        """Return a call. Without gradients, its keys and values are those in the store."""
        call = MixedCall(self.layers, rows, self.heads)
        if not torch.is_grad_enabled():
            self.store.convert(self.model.dtype)
            call.set_spans(self.store, [self.store.spans.get(self.find_key(part)) for part in rows.parts])
        return call

    def install(self, parts: Sequence[Part]) -> None:
        """Switch the model's attention and set the hooks that these parts need."""
        if self.implementation is None:
            self.implementation = Implementation(self.model, {})
        else:
            self.implementation.resume()
        self.handles.append(WatchHandle(self.layers))
        try:
            self._set_hooks(parts)
        except BaseException:
            self.remove()
            raise

    def _set_hooks(self, parts: Sequence[Part]) -> None:
        if any(part.is_prompt for part in parts):
            self.offsets = OffsetHooks(self.model, MixedOffsets())  # type: ignore[arg-type]
            self.handles.append(self.offsets)
            self.offsets.install(self.model)
        self.handles.append(Interception(self.backbone, self.run))
        if self.shift is None and any(part.shift for part in parts):
            self.shift = PositionShift(self.backbone, Positions.find(self.backbone))
        if self.shift is not None:
            self.handles += self.shift.install()
        if self.encoder is not None:
            self.handles.append(Interception(self.encoder, self.run_encoder))
        if any(part.gates is not None for part in parts):
            for layer in self.layers.values():
                if layer.entry is not None:
                    self.handles += HiddenWatch(layer.module).install(layer.entry)

    def remove(self) -> None:
        """Remove all hooks and restore the model's attention."""
        for handle in reversed(self.handles):
            handle.remove()
        self.handles, self.offsets = [], None
        assert self.implementation is not None
        self.implementation.restore()

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone with the adapter of each row."""
        call = self.call
        if call is None:  # the backbone was called directly, without names
            self.leave()
            return self.backbone.forward(*args, **kwargs)
        return self._run_gathered(self.backbone, lambda: self._run(call, forward, args, kwargs))

    def _run_gathered(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Run a call while FSDP2 gathers all attached adapters. All ranks gather the same ones in the same order."""
        if not is_fully_sharded(self.model):
            return call()
        methods = [part.method for part in sorted(self.keys, key=lambda part: part.name) if part.method is not None]
        return run_gathered(module, nn.ModuleList(methods), call)

    def _run(self, call: MixedCall, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.implementation is not None
        self.implementation.check()
        refuse_replicas(self.backbone)
        arguments = name_arguments(self.names, args, kwargs)
        self._check(arguments, call.rows)
        check_held(find_cache(arguments), call.rows.parts)
        call.begin(arguments, self.backbone)
        if torch.is_grad_enabled():
            call.set_prefixes(self.compute_prefixes(call.rows.parts))
        carry_through_checkpoints(self.backbone)
        try:
            arguments = self._arrange(arguments, call)
            if self.offsets is not None:
                self.offsets.method.rows = call.rows  # type: ignore[assignment]
            with carrying(CarriedBindings(call.bindings)):
                output = forward(**arguments)
        finally:
            if self.shift is not None:
                self.shift.end()
            if self.offsets is not None:
                self.offsets.method.rows = None  # type: ignore[assignment]
        cache = find_cache(output)
        call.gates.store_gates(cache)
        if cache is not None and not torch.compiler.is_compiling():
            hold_names(cache, call.rows, arguments)
        return output

    def run_encoder(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an encoder, which ``generate`` calls directly."""
        call = self.call
        if call is None or get_carried_bindings() is not None:
            return forward(*args, **kwargs)
        refuse_reentrant(self.encoder)
        call.begin({}, self.backbone)
        carry_through_checkpoints(self.encoder)

        def run() -> Any:
            if torch.is_grad_enabled():
                call.set_prefixes(self.compute_prefixes(call.rows.parts))
            with carrying(CarriedBindings(call.bindings)):
                return forward(*args, **kwargs)

        return self._run_gathered(self.encoder, run)

    def _check(self, arguments: dict[str, Any], rows: MixedRows) -> None:
        if asks_for(arguments, self.backbone, "output_attentions"):
            raise ValueError("`output_attentions` must be False with `adapter_names`, whose kernels return no weights.")
        if torch.is_grad_enabled() and checkpoints_reentrantly(self.backbone):
            raise ValueError("`use_reentrant` must be False for gradient checkpointing with `adapter_names`.")
        prompts = [part.name for part in rows.parts if part.is_prompt] if rows.has_prompts else []
        if prompts and self.randomness.acts():
            raise ValueError(
                f"`adapter_names` must not name the prompt {prompts[0]!r} while dropout in the model is drawn "
                "separately in every row. Train the prompt alone, or set the model's dropout to 0."
            )
        if prompts and asks_for(arguments, self.backbone, "output_router_logits"):
            raise ValueError(
                f"`output_router_logits` must be False with the prompt {prompts[0]!r} in `adapter_names`, since the "
                "auxiliary loss counts the prompt's tokens in every row."
            )
        if prompts and (reason := find_reason_against_mask(arguments, self.windows)) is not None:
            raise ValueError(
                f"`attention_mask` cannot be used with the prompt {prompts[0]!r} in `adapter_names`: {reason}. Pass a "
                "mask [B, K], or use the prompt alone."
            )

    def _arrange(self, arguments: dict[str, Any], call: MixedCall) -> dict[str, Any]:
        """Return the arguments with the masks that the attention expects, and with shifted positions."""
        if not self.text:
            refuse_one_row_masks(arguments)
            return arguments
        if not getattr(find_cache(arguments), "is_compileable", False):
            tokens = count_past(arguments) + count_tokens(arguments)
            check_mask_length(arguments.get("attention_mask"), tokens, call.rows.longest)
        arguments = expand_one_row_mask(arguments)
        if self.shift is not None:
            given = arguments.get("input_ids")
            given = arguments["inputs_embeds"] if given is None else given
            shift = call.rows.repeat_shift(given.shape[0])
            if shift != 0 and (self.windows or call.rows.has_offsets):
                refuse_packed(arguments, self.backbone)
            if call.rows.has_prompts:
                self._check_frequencies(arguments, shift)
            self.shift.begin(arguments, shift)
        return arguments

    def _check_frequencies(self, arguments: dict[str, Any], shift: int | RowShift) -> None:
        """Refuse rows so long that their rotary frequencies differ from those that the prompts were run with."""
        assert self.shift is not None
        positions = self.shift.positions
        if positions.by_length is None:
            return
        ends = int(positions.move_ids(arguments, shift).max()) + 1
        if ends > positions.by_length:
            raise ValueError(
                f"`input_ids` ends at position {ends} with the prompts in front, but the keys of prompts are rotated "
                f"for rows of up to {positions.by_length} tokens. In longer rows this model rotates all keys "
                "differently. Use the prompts one at a time, without `adapter_names`."
            )

    def compute_prefixes(self, parts: Sequence[Part]) -> list[dict[nn.Module, KeyedPrefix]]:
        """Return the keys and values of each part by attention module. Stored ones are returned without a copy."""
        prompts = [part for part in parts if part.is_prompt and part not in self._list_stored(parts)]
        of_prompts = dict(zip(prompts, self.run_prompts([part.method for part in prompts]), strict=True))
        computed = []
        for part in parts:
            if part in of_prompts:
                computed.append(of_prompts[part])
            elif part in self._list_stored(parts):
                computed.append(self._read_stored(part))
            else:
                computed.append(compute_prefixes(part))
        return computed

    def _list_stored(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts that are only in the store, not among the model's attached adapters."""
        return [part for part in parts if part not in self.keys and part.name in self.store.spans]

    def _read_stored(self, part: Part) -> dict[nn.Module, KeyedPrefix]:
        prefixes = self.store.read(part.name)
        return {m: prefixes[i] for i, m in enumerate(self.layers) if m in part.indices and i in prefixes}

    def run_prompts(self, methods: Sequence[Any]) -> list[dict[nn.Module, KeyedPrefix]]:
        """Compute the keys and values of prompts in every layer. Prompts of equal length run in one batch."""
        results: dict[int, dict[nn.Module, KeyedPrefix]] = {}
        groups: dict[int, list[int]] = {}
        for which, method in enumerate(methods):
            alone = needs_ids(self.model.config)
            groups.setdefault(-1 - which if alone else len(method.prompt), []).append(which)
        for members in groups.values():
            captured = self._run_batch([methods[which] for which in members])
            for row, which in enumerate(members):
                results[which] = {
                    module: KeyedPrefix(key[row], value[row]) for module, (key, value) in captured.items()
                }
        return [results[which] for which in range(len(methods))]

    def _run_batch(self, methods: Sequence[Any]) -> dict[nn.Module, Prefix]:
        """Run prompts of equal length as a batch, and return the keys and values in each attention module."""
        assert self.offsets is not None
        assert self.shift is not None
        dtype, offsets = self.offsets.precision, self.offsets
        prompts = torch.stack([method.prompt.to(dtype) for method in methods])
        positions = self.shift.positions.first + torch.arange(prompts.shape[1], device=prompts.device)
        self.shift.end()
        with capturing(self.backbone, self.layers.values(), self.heads) as captured:
            if needs_ids(self.model.config):
                former, offsets.method = offsets.method, methods[0]
                try:
                    offsets.run_alone(prompts[0], position_ids=positions[None], use_cache=False)
                finally:
                    offsets.method = former
            else:
                offsets.forward(inputs_embeds=prompts, position_ids=positions[None], use_cache=False)
        return captured


_NAMES = "fastprefix_names"
"""The attribute of a key/value cache that holds the adapter name of each row."""


class HeldNames:
    """The adapter names of the rows of a key/value cache, and the identities of these adapters."""

    def __init__(self, names: tuple[str, ...], identities: Mapping[str, str | None]) -> None:
        self.names = names
        self.identities = identities

    def select_rows(self, name: str, rows: Any) -> HeldNames:
        """Return the names of the rows that the cache method ``name`` selects when it is called with ``rows``."""
        if name == "batch_repeat_interleave":
            return HeldNames(tuple(each for each in self.names for _ in range(int(rows))), self.identities)
        chosen = rows.tolist() if isinstance(rows, Tensor) else rows
        return HeldNames(tuple(self.names[row] for row in chosen), self.identities)


def hold_names(cache: Cache, rows: MixedRows, arguments: Mapping[str, Any]) -> None:
    """Store the adapter names of a call's rows on its cache."""
    count = count_rows(arguments) or len(rows.names)
    hold_by_row(cache, _NAMES, HeldNames(rows.repeat_names(count), {each.name: each.identity for each in rows.parts}))


def check_held(cache: Cache | None, parts: Sequence[Part]) -> None:
    """Check that a cache was filled with these adapters, not with former ones of the same names."""
    if get_held_names(cache) is None:
        return
    held: HeldNames = getattr(cache, _NAMES)
    for part in parts:
        if held.identities.get(part.name, part.identity) != part.identity:
            raise ValueError(
                f"`past_key_values` must be continued with the adapter that filled it, but {part.name!r} is another "
                "adapter now. Start with an empty cache."
            )


def get_held_names(cache: Cache | None) -> tuple[str, ...] | None:
    """Return the adapter names of a cache's rows, or None if the cache is empty or was filled without names."""
    if cache is None or not hasattr(cache, _NAMES):
        return None
    if int(cache.get_seq_length()) == 0:
        drop_by_row(cache, _NAMES)
        return None
    held: HeldNames = getattr(cache, _NAMES)
    return held.names


def count_rows(arguments: Mapping[str, Any]) -> int | None:
    """Return the number of rows of a call, or None if its arguments do not determine it."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "pixel_values"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return math.prod(value.shape[:-1]) if name.endswith("ids") else int(value.shape[0])
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return int(tensors[0].shape[0]) if tensors else None


def check_names(names: Any) -> tuple[str, ...] | None:
    """Return the names that were passed to a call as a tuple, or None without names.

    Raises:
        TypeError: if ``names`` is not a list of strings.
        ValueError: if ``names`` is empty.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise TypeError(f"`adapter_names` must be a list with a string for each row, but is {names!r}.")
    if not names:
        raise ValueError("`adapter_names` must have a name for each row of the batch, but is empty.")
    return tuple(names)


def check_rows(names: tuple[str, ...], arguments: Mapping[str, Any]) -> None:
    """Check that each row of a call has a name. Several choices of an example share one name."""
    count, ids = count_rows(arguments), arguments.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim > 2:
        count = int(ids.shape[0])
    if count is not None and len(names) != count:
        raise ValueError(
            f"`adapter_names` must have a name for each row of the batch, but has {len(names)} names for {count} rows."
        )
