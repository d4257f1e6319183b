"""Run PEFT's prefix tuning and cartridges on their keys and values, instead of on a cache expanded to the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)

from ..transformers.mixed_batches.mixing import check_names
from ..transformers.mixed_batches.span_store import KeyedPrefix
from ..transformers.models.attention import (
    BINDING,
    Binding,
    CarriedBindings,
    GivenPrefix,
    WatchHandle,
    carry_through_checkpoints,
    carrying,
    get_carried_bindings,
    is_ours,
    make_two_adapters_error,
    restore_checkpoints,
)
from ..transformers.models.discovery import Layer, find_backbone
from ..transformers.models.hooks import (
    Forward,
    Interception,
    MethodReplacement,
    asks_for,
    check_parameter_names,
    checkpoints_reentrantly,
    expand_one_row_mask,
    find_cache,
    find_cache_parameter,
    name_arguments,
    read_parameter_names,
    refuse_one_row_masks,
    refuse_replicas,
)
from ..transformers.models.switching import Implementation, runs_with_adapter
from ..transformers.prefixes.prefix import PrefixCache
from ..transformers.sharding.tensor_parallel import TensorParallelHeads
from .mixing import PeftMixture


class CachedPrefix:
    """The hooks of a model whose attention gets its prefix from the ``PrefixCache`` that a call passes, if any.

    ``attentions`` are the modules that a prefix reaches. Each call carries their bindings. Gradient checkpointing
    recomputes a layer with the bindings of its first run.
    """

    def __init__(
        self, model: PreTrainedModel, attentions: Iterable[nn.Module], backbone: nn.Module | None = None
    ) -> None:
        self.backbone: Any = find_backbone(model) if backbone is None else backbone
        self.names = check_parameter_names(self.backbone)
        self.cache_name = find_cache_parameter(self.names) or "past_key_values"
        half = "decoder_" if model.config.is_encoder_decoder else ""
        self.inputs = (f"{half}input_ids", f"{half}inputs_embeds")
        names = {module: name for name, module in model.named_modules()}
        self.modules = {names[module]: module for module in attentions}
        self.implementation = Implementation(model, {})
        self.own_attention = _find_registered(self.implementation.list_former_attentions())
        self.handles: list[RemovableHandle | Interception | WatchHandle | MethodReplacement] = [
            self.backbone.register_forward_pre_hook(_refuse_replica),
            Interception(self.backbone, self.run),
            WatchHandle(self.modules.values()),
        ]

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone. The call carries its prefix to the attention."""
        self.implementation.check()
        arguments = name_arguments(self.names, args, kwargs)
        if asks_for(arguments, self.backbone, "output_attentions"):
            raise ValueError(
                "`output_attentions` must be False on an accelerated model, whose kernels do not return attention "
                "weights. Call fastprefix.decelerate first."
            )
        carried = self.find_carried(arguments)
        if carried is None:
            return forward(**arguments)
        if carried.own_attention is None:
            if self.backbone.config.is_encoder_decoder:
                refuse_one_row_masks(arguments)
            else:
                arguments = expand_one_row_mask(arguments)
        carry_through_checkpoints(self.backbone)
        with carrying(carried):
            return forward(**arguments)

    def find_carried(self, arguments: dict[str, Any]) -> CarriedBindings | None:
        """Return the bindings of a call: the prefix in its cache, or the model's own attention without a prefix.

        None keeps the bindings of the modules, which an adapter of this package beside PEFT's has set.
        """
        cache: Any = find_cache(arguments)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if isinstance(cache, PrefixCache):
            if runs_with_adapter(self.backbone):
                raise make_two_adapters_error()
            given = [arguments.get(name) for name in self.inputs]
            tokens = next((int(each.shape[1]) for each in given if isinstance(each, Tensor)), 0)
            return CarriedBindings(cache.make_bindings(self.modules, tokens))
        return self.carry_without_prefix()

    def carry_without_prefix(self) -> CarriedBindings | None:
        """Return the bindings of a call without a prefix."""
        former = get_carried_bindings()
        if former is not None or any(hasattr(module, BINDING) for module in self.modules.values()):
            return former
        return CarriedBindings({}, self.own_attention)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in reversed(self.handles):
            handle.remove()
        restore_checkpoints(self.backbone)
        self.implementation.restore()


class PeftCall:
    """A call of a PEFT model in progress."""

    def __init__(self, owner: PromptLearning) -> None:
        self.owner = owner
        self.prompt: Tensor | None = None  # [1, m, d], until the backbone is called
        self.states: SplitStates | None = None  # the output of the backbone


class SplitStates:
    """Hidden states ``[B, m + N, d]`` and their two parts: prompt ``[1, m, d]`` and tokens ``[B, N, d]``."""

    def __init__(self, prompt: Tensor, tokens: Tensor) -> None:
        self.prompt = prompt
        self.tokens = tokens
        self.whole = repeat_before(prompt, tokens)

    def is_whole(self, states: Tensor) -> bool:
        """Return whether a tensor is a view of all the states, such as a slice over all positions."""
        whole = self.whole
        same = states.shape == whole.shape and states.stride() == whole.stride() and states.dtype == whole.dtype
        return same and states.data_ptr() == whole.data_ptr()


def repeat_before(prompt: Tensor, tokens: Tensor) -> Tensor:
    """Put a prompt ``[1, m, d]`` before every row of tokens ``[B, N, d]``."""
    return torch.cat([prompt.expand(tokens.shape[0], -1, -1), tokens], dim=1)


class _PeftCalls(threading.local):
    """The call in progress in each thread."""

    current: PeftCall | None = None


_CALLS = _PeftCalls()


class PromptLearning(CachedPrefix):
    """The hooks of a model whose PEFT model calls ``get_prompt`` for its prefix or prompt, and then the model.

    In PEFT's own calls ``get_prompt`` returns the result of ``make_prompt``. Other callers get PEFT's result.
    """

    def __init__(self, peft_model: Any, attentions: Iterable[nn.Module], backbone: nn.Module | None = None) -> None:
        super().__init__(peft_model.base_model, attentions, backbone)
        self.peft_model = peft_model
        self.mixture: PeftMixture | None = None  # created in the first call that names adapters
        self.handles += [
            peft_model.register_forward_pre_hook(_refuse_replica),
            Interception(peft_model, self.call),
        ]
        self.replacement = MethodReplacement(peft_model, "get_prompt", self.get_prompt)
        self.handles.append(self.replacement)
        if hasattr(peft_model, "generate"):
            self.handles.append(MethodReplacement(peft_model, "generate", self.generate))

    def get_prompt(self, former: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return PEFT's prompt, or in PEFT's own calls the replacement that ``make_prompt`` returns."""
        call = self.call_in_progress()
        if call is None:
            return former(*args, **kwargs)
        return self.make_prompt(call, *_choose_arguments(*args, **kwargs))

    def make_prompt(self, call: PeftCall, batch_size: int, task_ids: Tensor | None) -> Any:
        """Return the replacement for the prompt in one of PEFT's calls."""
        raise NotImplementedError

    def make_mixture(self) -> PeftMixture:
        """Return the hooks of a batch whose rows have different adapters."""
        raise NotImplementedError

    def generate(self, former: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run PEFT's ``generate``, or with adapter names that of the base model with one adapter per row.

        In PEFT's ``disable_adapter``, names have no effect, as in PEFT's layers.
        """
        names = check_names(kwargs.pop("adapter_names", None))
        if names is not None and not self.peft_model._adapters_disabled:
            with torch.no_grad():
                arguments = name_arguments(("input_ids", "generation_config"), args, kwargs)
                return self._run_mixed(names, self.peft_model.base_model.generate, arguments)
        return self.call(former, args, kwargs)

    def _run_mixed(self, names: tuple[str, ...], function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run a function of the base model with one adapter per row. Its results contain the tokens alone."""
        if self.mixture is None:
            self.mixture = self.make_mixture()
        return self.mixture.run_with(names, function, arguments)

    def call(self, method: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method of the PEFT model that calls ``get_prompt``."""
        if (names := check_names(kwargs.pop("adapter_names", None))) is not None:
            arguments = name_arguments(("input_ids", "attention_mask", "inputs_embeds", "labels"), args, kwargs)
            return self._run_mixed(names, self.peft_model.base_model, arguments)
        with self._track_call() as call:
            result = method(*args, **kwargs)
        if call.prompt is not None:
            raise RuntimeError(f"{type(self.peft_model.base_model).__name__} did not call its decoder with the prompt.")
        return result

    def call_in_progress(self) -> PeftCall | None:
        """Return the PEFT model's call in progress in this thread, or None."""
        call = _CALLS.current
        return call if call is not None and call.owner is self else None

    @contextmanager
    def _track_call(self) -> Iterator[PeftCall]:
        former, call = _CALLS.current, PeftCall(self)
        _CALLS.current = call
        try:
            yield call
        finally:
            _CALLS.current = former


class PrefixAcceleration(PromptLearning):
    """The acceleration of prefixes: PEFT's ``get_prompt`` returns a cache that does not hold the prefixes.

    ``layers`` are the attention layers by ``layer_idx``, which is their index in PEFT's cache. In an encoder-decoder
    they are the decoder's self-attention layers.
    """

    def __init__(self, peft_model: Any, layers: dict[int, Layer]) -> None:
        self.layers = layers
        self.sources = _find_sources(layers)
        self.heads = TensorParallelHeads.find(peft_model.base_model, list(layers.values()))
        super().__init__(peft_model, [layer.module for layer in layers.values()])  # last, since it changes the model
        self.layer_names = {module: name for name, module in self.modules.items()}
        self.handles += [
            layer.module.register_forward_pre_hook(_bias_prefix, with_kwargs=True)
            for layer in layers.values()
            if getattr(layer.module, "has_relative_attention_bias", False)
            and "position_bias" in read_parameter_names(layer.module)
        ]

    def make_prompt(
        self, call: PeftCall, batch_size: int, task_ids: Tensor | None
    ) -> PrefixCache | EncoderDecoderCache:
        """Return a cache with the active adapter's prefix for any batch size. The prefix is computed once per call."""
        prefixes = {self.layer_names[module]: prefix for module, prefix in self.read_prefixes().items()}
        length = self.peft_model.active_peft_config.num_virtual_tokens
        cache = PrefixCache(len(self.layers), length, prefixes)
        return EncoderDecoderCache(cache, DynamicCache()) if self.backbone.config.is_encoder_decoder else cache

    def read_prefixes(self) -> dict[nn.Module, GivenPrefix]:
        """Return the prefix of the active adapter for each attention module."""
        peft_model = self.peft_model
        config = peft_model.active_peft_config
        encoder = peft_model.prompt_encoder[peft_model.active_adapter]
        length, heads, layers = config.num_virtual_tokens, config.num_attention_heads, config.num_layers
        frozen = getattr(config, "num_frozen_tokens", 0)
        rows = self._make_rows(encoder, config).to(peft_model.base_model.dtype)
        keys_values = rows.view(length, 2 * layers, heads, -1).permute(1, 2, 0, 3).unbind(0)
        two_halves = self.backbone.config.is_encoder_decoder
        prefixes: dict[nn.Module, GivenPrefix] = {}
        for number, (index, layer) in enumerate(self.layers.items()):
            source = self.sources[index]
            # PEFT repeats the rows and gives each layer four of them. Cross-attention ignores its two.
            first = (4 * source) % (2 * layers) if two_halves else 2 * source
            key, value = (_fit(tensor, layer) for tensor in keys_values[first : first + 2])
            if key is not None and value is not None:
                if self.heads is not None:
                    split = self.heads.splits[number].keys
                    key, value = self.heads.take_heads(key, split), self.heads.take_heads(value, split)
                prefixes[layer.module] = GivenPrefix(key, value, window=layer.window, frozen=frozen)
        return prefixes

    def read_keyed(self) -> dict[nn.Module, KeyedPrefix]:
        """Return the prefixes for a batch with different adapters. Frozen tokens are detached from the parameters."""
        return {
            module: KeyedPrefix(*(_freeze(tensor, prefix.frozen) for tensor in (prefix.key, prefix.value)))
            for module, prefix in self.read_prefixes().items()
        }

    def make_mixture(self) -> PeftMixture:
        """Return the hooks of a batch with different adapters."""
        if self.backbone.config.is_encoder_decoder:
            raise ValueError("`adapter_names` must not be given to an encoder-decoder of PEFT.")
        return PeftMixture(self.peft_model, list(self.layers.values()), self.read_keyed)

    def _make_rows(self, encoder: Any, config: Any) -> Tensor:
        """Return the keys and values ``[m, 2 L H D]`` of all layers, as PEFT's encoder computes them."""
        if not (config.inference_mode or checkpoints_reentrantly(self.backbone)):
            tokens = torch.arange(config.num_virtual_tokens, device=next(encoder.parameters()).device)
            rows: Tensor = encoder(tokens[None])[0]
            return rows
        # Each reentrantly checkpointed layer runs backward to the parameters, which only views allow more than once.
        if getattr(encoder, "prefix_projection", False) and not config.inference_mode:
            raise ValueError(
                "`use_reentrant` must be False for gradient checkpointing with prefix_projection=True, but is True."
            )
        weight: Tensor = encoder.embedding.weight
        return weight


def _choose_arguments(batch_size: int, task_ids: Tensor | None = None, *_: Any, **__: Any) -> tuple[int, Any]:
    """Return the arguments of PEFT's ``get_prompt`` that a replacement needs."""
    return batch_size, task_ids


def _freeze(tensor: Tensor, count: int) -> Tensor:
    """Return keys or values ``[H, m, D]`` without gradients for the first ``count`` tokens."""
    return torch.cat([tensor[:, :count].detach(), tensor[:, count:]], dim=1) if count else tensor


def _fit(prefix: Tensor, layer: Layer) -> Tensor | None:
    """Cut keys or values ``[H, m, D]`` to a layer's heads and head dimension, as PEFT does, or return None."""
    heads, size = layer.whole_shape.kv_heads, layer.shape.key_size
    if heads > prefix.shape[0] or size > prefix.shape[2]:
        return None
    return prefix[:heads, :, :size]


def _find_sources(layers: dict[int, Layer]) -> dict[int, int]:
    """Map each layer to the layer whose keys it attends to, which is another one if layers share keys and values."""
    first: dict[tuple[Any, ...], int] = {}
    identities = {index: (layer.key.data_ptr(), layer.key.shape) for index, layer in sorted(layers.items())}
    return {index: first.setdefault(identity, index) for index, identity in identities.items()}


def _find_registered(names: set[str | None]) -> str | None:
    """Return the attention implementation of a model's configurations if it is unique and registered, or None."""
    name = next(iter(names)) if len(names) == 1 else None
    known = name in AttentionInterface() and name in AttentionMaskInterface()
    return name if known and not is_ours(name) else None


def _refuse_replica(module: nn.Module, args: tuple[Any, ...]) -> None:
    refuse_replicas(module)


def _bias_prefix(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the prefix T5's first relative biases, since it comes before all tokens (a forward pre-hook).

    T5 derives the number of positions from its keys, which do not include the prefix.
    """
    carried = get_carried_bindings()
    binding: Binding | None = None if carried is None else carried.bindings.get(module)
    if isinstance(binding, GivenPrefix) and kwargs.get("position_bias") is None:
        hidden = args[0] if args else kwargs["hidden_states"]
        queries, seen = hidden.shape[1], binding.key.shape[1] + binding.past
        bias = module.compute_bias(queries, seen + queries, device=hidden.device, past_seen_tokens=seen)
        kwargs["position_bias"] = bias
    return args, kwargs
