"""Bind each attention layer of a model to its prefix and gates.

``PrefixCache`` is a key/value cache that represents a prefix. It counts the prefix's tokens but does not hold them. A
model that gets one computes the same positions and masks as with a cache that holds the prefix, expanded to the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ....methods import Composition, PrefixMethod
from ..models.attention import (
    Binding,
    CarriedBindings,
    GivenPrefix,
    Prefix,
    WatchHandle,
    carry_through_checkpoints,
    carrying,
    find_attended_tokens,
    find_binding,
    get_carried_bindings,
    make_window_bias,
    refuse_lost_bindings,
    runs_again,
)
from ..models.discovery import Layer, find_backbone, find_embedding, find_first_tensor
from ..models.hooks import (
    CallState,
    Cut,
    Forward,
    Interception,
    PartHook,
    asks_for,
    check_mask_length,
    check_parameter_names,
    checkpoints_reentrantly,
    count_past,
    count_tokens,
    expand_one_row_mask,
    find_cache,
    find_cache_parameter,
    name_arguments,
    read_state,
    refuse_names,
    refuse_one_row_masks,
    refuse_replicas,
)
from ..models.positions import Positions, PositionShift, refuse_packed
from ..models.switching import Implementation, runs_on_text
from ..models.tuners import refuse_different_rows
from ..sharding.fully_sharded import run_gathered
from ..sharding.tensor_parallel import TensorParallelHeads
from .gates import CallGates


class PrefixCache(DynamicCache):
    """The keys and values of the tokens after a prefix, and the prefix itself for the calls that use this cache.

    Prefixes are stored by the names of their attention modules, since names survive ``copy.deepcopy`` and ``pickle``.
    """

    def __init__(self, layers: int, length: int, prefixes: Mapping[str, GivenPrefix] | None = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [PrefixCacheLayer(length) for _ in range(layers)]
        self.prefixes = dict(prefixes or {})
        self.length = length

    def make_bindings(self, modules: Mapping[str, nn.Module], tokens: int) -> dict[nn.Module, Binding]:
        """Return the prefix of each attention module in the next call, given the modules by name."""
        past = int(self.get_seq_length()) - self.length
        return {modules[name]: replace(prefix, past=past, tokens=tokens) for name, prefix in self.prefixes.items()}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a layer's tokens, unless gradient checkpointing recomputes the layer.

        Raises:
            RuntimeError: if the call does not pass the prefix to the attention, which would ignore it.
        """
        if self.prefixes:
            refuse_lost_bindings()
            carried = get_carried_bindings()
            bindings = () if carried is None else carried.bindings.values()
            given = next((each for each in bindings if isinstance(each, GivenPrefix)), None)
            if given is None:
                raise RuntimeError(
                    "`past_key_values` was filled by an accelerated PEFT model (fastprefix.accelerate), and can only "
                    "be used with an accelerated model. Pass a new cache."
                )
            if runs_again():
                return self._prefix_layers()[layer_idx].rerun(key_states, value_states, given.past)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens. If too few are left, remove the last tokens of the prefix too.

        ``tokens_to_remove`` is negative. Older ``transformers`` pass a positive length to keep instead.
        """
        total = int(self.get_seq_length())
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(total - tokens_to_remove, 0)
        tokens = total - self.length
        for layer in self._prefix_layers():
            layer.remove_tokens(min(removed, tokens))
        if removed > tokens:
            self._set_length(max(total - removed, 0))

    def reset(self) -> None:
        """Remove all tokens and the prefix."""
        super().reset()  # type: ignore[no-untyped-call]
        self._set_length(0)

    def _prefix_layers(self) -> list[PrefixCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, PrefixCacheLayer)]

    def _set_length(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the prefix."""
        self.length = length
        for layer in self._prefix_layers():
            layer.prefix_length = length
        shorter = (
            (name, replace(prefix, key=prefix.key[:, :length], value=prefix.value[:, :length]))
            for name, prefix in self.prefixes.items()
        )
        self.prefixes = dict(shorter) if length else {}


class PrefixCacheLayer(DynamicLayer):
    """The tokens of one layer after a prefix of ``prefix_length`` tokens."""

    def __init__(self, prefix_length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix_length = prefix_length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return those of all tokens. The first ones are stored without a copy."""
        if self.is_initialized:
            keys, values = super().update(key_states, value_states)
            return keys, values
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def rerun(self, key_states: Tensor, value_states: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Return what ``update`` returned after ``past`` tokens, without adding anything."""
        if past == 0 or self.keys is None or self.values is None:
            return key_states, value_states
        keys = torch.cat([self.keys[..., :past, :], key_states], dim=-2)
        return keys, torch.cat([self.values[..., :past, :], value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, including the prefix."""
        return self.prefix_length + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys, and the position of the first one, which comes after the prefix."""
        return int(super().get_seq_length()) + query_length, self.prefix_length

    def remove_tokens(self, count: int) -> None:
        """Remove the last ``count`` tokens. The layer must have at least that many."""
        if count > 0 and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the rows. A layer that never ran, such as one beyond the model's last layer, has no rows."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows in ``indices``."""
        if self.is_initialized:
            super().batch_select_indices(indices)


def compute_prefixes(method: PrefixMethod, heads: TensorParallelHeads | None) -> list[Prefix]:
    """Return the prefixes of all layers. On a tensor-parallel model they have this rank's heads only."""
    prefixes = method.prefixes()
    return prefixes if heads is None else heads.take_prefixes(prefixes)


class PrefixCall:
    """The prefixes and gates of one call of a model.

    Gradient checkpointing recomputes a layer with those of its own call, whatever has been called since.
    """

    def __init__(
        self,
        method: PrefixMethod,
        heads: TensorParallelHeads | None,
        prefixes: list[Prefix] | None = None,
        gates: CallGates | None = None,
        casts: dict[tuple[int, torch.dtype, torch.device], Prefix] | None = None,
    ) -> None:
        self.method = method
        self.heads = heads
        self.prefixes = prefixes  # None: each layer computes them, since it is called outside its model
        self.gates = gates or CallGates()
        self.casts = casts  # casts of the prefixes, if later calls use the same ones
        self.cut: Cut | None = None  # with reentrant gradient checkpointing

    def get_prefix(self, index: int) -> Prefix:
        """Return the prefix of a layer."""
        if self.cut is not None and torch.is_grad_enabled():
            return self.cut.get_prefix(index)
        prefixes = compute_prefixes(self.method, self.heads) if self.prefixes is None else self.prefixes
        return prefixes[index]

    def cast_prefix(self, index: int, prefix: Prefix, query: Tensor) -> Prefix:
        """Return a layer's prefix on the query's device and in its dtype. Kept prefixes are cast only once."""
        if self.casts is None or not self.prefixes or self.prefixes[index][0] is not prefix[0]:
            return prefix[0].to(query), prefix[1].to(query)
        place = index, query.dtype, query.device
        if place not in self.casts:
            self.casts[place] = prefix[0].to(query), prefix[1].to(query)
        return self.casts[place]


class LayerBinding(Binding):
    """The binding of an attention module to its prefix and its gates in a call."""

    def __init__(self, call: PrefixCall, index: int, layer: Layer, shifts: bool) -> None:
        self.call = call
        self.heads = call.heads
        self.index = index
        self.window = layer.window if shifts else None  # the sliding window that cuts the prefix
        self.layer = layer
        self.projection = layer.projection  # set if the layer projects the method's states
        self.hidden: Tensor | None = None  # the layer's input, until its attention is done

    def hook_layer(self) -> list[RemovableHandle]:
        """Set the hooks that keep the layer's input if the gates need it."""
        if not self.call.method.needs_hidden():
            return []
        assert self.layer.entry is not None  # checked before anything was changed
        return HiddenWatch(self.layer.module).install(self.layer.entry)

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """Return the prefix in the query's dtype."""
        states = self.call.method.projected_states(self.index)
        if states is None or self.projection is None:
            pk, pv = self.call.get_prefix(self.index)
        else:
            pk, pv = self.projection(states.to(query), self)
        return self.call.cast_prefix(self.index, (pk, pv), query)

    def get_gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the prefix gate and the output gate."""
        prefix_gate, output_gate = self._prefix_gate(query, mask), self.call.method.output_gate(self.index)
        heads = self.heads
        if heads is not None:
            prefix_gate = None if prefix_gate is None else heads.take_gate(prefix_gate, self.index)
            if output_gate is not None:
                output_gate = heads.take_heads(output_gate, heads.splits[self.index].queries)
        return prefix_gate, None if output_gate is None else output_gate.to(query)

    def get_bias(self, query: Tensor) -> Tensor | None:
        """Return the bias that applies a sliding window to a prefix with positions before the tokens."""
        length = self.call.method.config.num_virtual_tokens
        return make_window_bias(query, self.window, length, self.call.gates.past, self.call.gates.tokens)

    def get_key_bias(self, query: Tensor) -> Tensor | None:
        """Return the biases of the prefix keys in the dtype of the query."""
        bias, heads = self.call.method.key_bias(self.index), self.heads
        if bias is not None and heads is not None:
            bias = heads.take_heads(bias, heads.splits[self.index].keys)
        return None if bias is None else bias.to(query)

    def count_frozen(self) -> int:
        """Return the number of leading prefix tokens that need no gradient."""
        return self.call.method.frozen_tokens()

    def _prefix_gate(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        method, gates = self.call.method, self.call.gates
        if not method.needs_hidden():
            gate = method.prefix_gate(self.index, None, None)
            return None if gate is None else gate.to(query)
        causal, held = method.shapes[self.index].causal, gates.held
        if causal and held.begun is None and self.index in held.gates:
            return held.gates[self.index].to(query)
        attended = find_attended_tokens(mask, query.shape[2], gates.past if causal else 0)
        sequences = gates.sequences if causal else None
        packed = {} if sequences is None else {"sequences": sequences}
        gate = method.prefix_gate(self.index, self.hidden, attended, **packed)
        assert gate is not None
        if causal and gate.ndim == 3:  # pooled from a sequence's first tokens, and used for all later ones
            gate = gates.hold(self.index, gate, attended)
        return gate.to(query)


class HiddenWatch:
    """The hooks that keep a layer's input for the gates of the call in progress, until its attention is done."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def install(self, entry: nn.Module) -> list[RemovableHandle]:
        """Register the hooks. ``entry`` is the module that receives the layer's input."""
        return [
            entry.register_forward_pre_hook(self.enter_layer, with_kwargs=True),
            self.attention.register_forward_hook(self.leave_attention, always_call=True),
        ]

    def enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the layer's input (a forward pre-hook of the module that receives it)."""
        self._keep(find_first_tensor(args, kwargs))

    def leave_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Drop the layer's input once its attention is done (a forward hook of the attention)."""
        self._keep(None)

    def _keep(self, hidden: Tensor | None) -> None:
        binding = find_binding(self.attention)
        if isinstance(binding, LayerBinding):
            binding.hidden = hidden


class KeptPrefixes(NamedTuple):
    """The prefixes of all layers for one state of the parameters, and their casts to other dtypes and devices."""

    state: object
    prefixes: list[Prefix]
    casts: dict[tuple[int, torch.dtype, torch.device], Prefix]


class _PrefixState(CallState):
    def __init__(self) -> None:
        self.call: PrefixCall | None = None


def refuse_reentrant(encoder: nn.Module) -> None:
    """Refuse a direct call of an encoder that would differentiate the prefixes once per layer."""
    if torch.is_grad_enabled() and checkpoints_reentrantly(encoder):
        raise RuntimeError(
            f"`use_reentrant` must be False for gradient checkpointing of a direct call of {type(encoder).__name__}."
        )


class PrefixHooks:
    """A prefix method on a model, whose attention is "fastprefix" from ``install`` to ``remove``."""

    def __init__(self, model: PreTrainedModel, method: PrefixMethod, layers: list[Layer]) -> None:
        self.model = model
        self.method = method
        text = runs_on_text(model)
        self.backbone = find_backbone(model) if text else model
        self.names = check_parameter_names(self.backbone)
        shifts = method.config.prefix_position == "shift"
        self.shift = PositionShift(self.backbone, Positions.find(self.backbone)) if shifts else None
        self.longest: int | None = None  # longest row for which a merged prompt's keys are rotated
        self.kept: KeptPrefixes | None = None  # reused while a sequence is generated
        self.state = _PrefixState()
        self.windows = any(layer.window is not None for layer in layers)
        self.projects = any(layer.projection is not None for layer in layers)
        halves = model.config.is_encoder_decoder
        self.encoder: Any = model.get_encoder() if halves else None  # generation calls it directly
        self.embedding = find_embedding(model) if text else None
        self.tie_handle: RemovableHandle | None = None
        self.heads = TensorParallelHeads.find(model, layers)
        self.layers = layers
        self.bindings = self._make_bindings(PrefixCall(method, self.heads))  # of layers that are called by themselves
        self.handles: list[RemovableHandle | Interception | WatchHandle] = []
        self.implementation: Implementation | None = None

    def install(self, model: PreTrainedModel) -> None:
        """Switch the model's attention and set the hooks."""
        if isinstance(self.method, Composition):
            self.method.freeze_parts()
        if self.implementation is None:
            self.implementation = Implementation(model, {**self.bindings})
        else:
            self.implementation.resume()
        self.handles = [Interception(self.backbone, self.run), WatchHandle(self.bindings)]
        if self.shift is not None:
            self.handles += self.shift.install()
        self._hook_embedding()
        if self.encoder is not None:
            self.handles.append(Interception(self.encoder, self.run_encoder))
        self.handles += [handle for binding in self.bindings.values() for handle in binding.hook_layer()]

    def _hook_embedding(self) -> None:
        """Set the hook that ties the prefixes to the embedding, which may have been replaced."""
        if self.embedding is None:
            return
        if self.tie_handle is not None:
            self.tie_handle.remove()
        self.embedding = find_embedding(self.model) or self.embedding
        hook = PartHook(self.embedding, self.tie, (self.model, self.backbone))
        self.tie_handle = self.embedding.register_forward_hook(hook)

    def _make_bindings(self, call: PrefixCall) -> dict[nn.Module, LayerBinding]:
        """Return the bindings of all layers to a call."""
        shifts = self.shift is not None
        return {layer.module: LayerBinding(call, index, layer, shifts) for index, layer in enumerate(self.layers)}

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone with its prefixes."""
        refuse_names(kwargs, self.backbone)
        return run_gathered(self.backbone, self.method, lambda: self._run(forward, args, kwargs))

    def _run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            arguments, call = self.begin(name_arguments(self.names, args, kwargs))
            carry_through_checkpoints(self.backbone)
            with carrying(CarriedBindings(self._make_bindings(call))):
                output = forward(**arguments)
        finally:
            self.state.call = None
            if self.shift is not None:
                self.shift.end()
        self.end(call, output)
        return output

    def begin(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], PrefixCall]:
        """Compute the prefixes once for all layers, and return the arguments with shifted positions."""
        assert self.implementation is not None
        self.implementation.check()
        refuse_replicas(self.backbone)
        if asks_for(arguments, self.backbone, "output_attentions"):
            raise ValueError(
                "`output_attentions` must be False with a prefix method, whose kernels do not return attention weights."
            )
        if self.projects and not torch.compiler.is_compiling():
            refuse_different_rows(self.backbone, type(self.method).__name__)
        gates = CallGates(arguments)
        if self.method.needs_hidden():
            gates.load_gates(arguments, self.backbone, getattr(self.method, "poolings", ()))
        call = self.state.call = self._make_call(gates)
        if torch.is_grad_enabled() and checkpoints_reentrantly(self.backbone):
            self._check_embedding()
            assert call.prefixes is not None
            call.cut = Cut(call.prefixes)
        if self.embedding is None:
            refuse_one_row_masks(arguments)
        else:
            self._check_mask(arguments)
            arguments = expand_one_row_mask(arguments)
        if self.embedding is not None and arguments.get("inputs_embeds") is not None:
            arguments["inputs_embeds"] = self.tie(self.embedding, (), arguments["inputs_embeds"])
        if self.shift is not None:
            if self.windows:
                refuse_packed(arguments, self.backbone)
            self._shift(arguments, self.shift, gates.past)
        return arguments, call

    def _make_call(self, gates: CallGates) -> PrefixCall:
        """Return a call with the prefixes of all layers. Without gradients, later calls of a sequence reuse them."""
        method, heads = self.method, self.heads
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not list(method.parameters()):
            self.kept = None
            return PrefixCall(method, heads, compute_prefixes(method, heads), gates)
        state, kept = read_state(method), self.kept
        if gates.past == 0 or kept is None or state is None or kept.state != state:
            kept = self.kept = KeptPrefixes(state, compute_prefixes(method, heads), {})
        return PrefixCall(method, heads, kept.prefixes, gates, kept.casts)

    def _check_mask(self, arguments: dict[str, Any]) -> None:
        if not getattr(find_cache(arguments), "is_compileable", False):
            tokens = count_past(arguments) + count_tokens(arguments)
            check_mask_length(arguments.get("attention_mask"), tokens, self.method.config.num_virtual_tokens)

    def _check_embedding(self) -> None:
        if self.embedding is None:
            raise RuntimeError(
                f"`use_reentrant` must be False for gradient checkpointing of {type(self.backbone).__name__}, since it "
                "is not an encoder or decoder of text and gradients would not reach the prefixes."
            )
        if self.embedding is not find_embedding(self.model):
            self._hook_embedding()

    def run_encoder(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an encoder. If it is called outside the model, compute new prefixes instead of reusing former ones."""
        if self.state.call is not None:
            return forward(*args, **kwargs)
        refuse_reentrant(self.encoder)

        def run() -> Any:
            call = PrefixCall(self.method, self.heads, compute_prefixes(self.method, self.heads))
            carry_through_checkpoints(self.encoder)
            with carrying(CarriedBindings(self._make_bindings(call))):
                return forward(*args, **kwargs)

        return run_gathered(self.encoder, self.method, run)

    def _shift(self, arguments: dict[str, Any], shift: PositionShift, past: int) -> None:
        """Shift positions as a key/value cache of the prefix's length would, or by the method's own number."""
        length, ids = self.method.position_shift(), arguments.get("input_ids")
        encoder = not any(shape.causal for shape in self.method.shapes)
        name = find_cache_parameter(self.names)
        if encoder and ids is not None and arguments.get("position_ids") is None and name is not None:
            # Encoders count ids in different ways (RoBERTa skips padding), but all start after their cache.
            rows, positions = length + ids.shape[1], shift.positions
            if positions.limit is not None and rows > positions.limit and positions.by_ids is not None:
                rows = length + int((ids != positions.by_ids).sum(1).max())
            positions.check(None, rows, length)
            shift.begin(arguments, 0)
            arguments[name] = PrefixCache(len(self.method.shapes), length)
            return
        if self.longest is not None and past == 0:
            ends = int(shift.positions.move_ids(arguments, length).max()) + 1
            if ends > self.longest:
                raise ValueError(
                    f"`input_ids` ends at position {ends} with the merged prompt in front, but the prompt's keys are "
                    f"rotated for rows of up to {self.longest} tokens. In longer rows this model rotates all keys "
                    "differently. Detach the adapter and attach it without merging."
                )
        shift.begin(arguments, length)

    def tie(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Connect the first layer's input to the detached prefixes in autograd (a forward hook of the embedding)."""
        cut = None if self.state.call is None else self.state.call.cut
        return output if cut is None or cut.tied else cut.tie(output)

    def end(self, call: PrefixCall, output: Any) -> None:
        """Store the gates on the cache, and check that gradients will reach the prefixes."""
        call.gates.store_gates(find_cache(output))
        if call.cut is not None and not call.cut.tied:
            raise RuntimeError(
                f"`use_reentrant` must be False for gradient checkpointing of {type(self.backbone).__name__}, since it "
                "does not call its input embeddings and gradients would not reach the prefixes."
            )

    def remove(self) -> None:
        """Remove all hooks and restore the model's attention."""
        for handle in self.handles:
            handle.remove()
        if self.tie_handle is not None:
            self.tie_handle.remove()
            self.tie_handle = None
        if self.implementation is not None:
            self.implementation.restore()
        if isinstance(self.method, Composition):
            self.method.release_parts()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out state that exists only while a model runs."""
        return {**self.__dict__, "kept": None}
