"""Run a prompt once for the whole batch, with exact results.

In a decoder-only model the prompt comes before all tokens and attention is causal, so the prompt's computation is the
same in every row. The prompt runs once, as a batch of one row. The rows then attend to its keys and values as to a
shared prefix. Values and gradients equal those of the textbook, which runs the prompt in every row.

Calls for which sharing is not exact run as in the textbook, and ``prompt_path`` of the method gives the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....methods import PromptMethod
from ..models.attention import (
    Binding,
    CarriedBindings,
    Prefix,
    WatchHandle,
    carry_through_checkpoints,
    carrying,
    make_window_bias,
)
from ..models.discovery import Layer, find_backbone, find_layers, list_ordinary_ids
from ..models.hooks import (
    Forward,
    asks_for,
    check_mask_length,
    checkpoints_reentrantly,
    count_past,
    count_tokens,
    find_cache,
    is_own_mask,
    name_arguments,
    read_parameter_names,
    read_state,
    refuse_names,
    refuse_replicas,
    suspend_checkpointing,
)
from ..models.positions import Positions, PositionShift, is_packed
from ..models.switching import Implementation, find_device, preserve_state, switch_attention
from ..models.tuners import differs_by_row, read_tuner_state
from ..sharding.fully_sharded import Gatherer, run_gathered
from ..sharding.partitioned import any_partitioned
from ..sharding.tensor_parallel import TensorParallelHeads, is_sharded
from .prompt import (
    SHARED,
    PromptHooks,
    find_token_arguments,
    flatten_leading,
    forget_rows_if_empty,
    holds_rows,
    refuse_other_prompt,
    unflatten_leading,
)

LEAST_SAVING = 2 * 10**11
"""The least saving for which a prompt runs once in training on a GPU: tokens times parameters per layer.

A second run of every layer costs launches, which can take the host longer than a few tokens take the GPU. On an H200,
sharing a prompt saved 600 tokens in layers of 10^8 parameters, and a step took 1.8 times as long.
"""


DIFFERENT_ROWS = "PEFT's adapters differ by row"

_WEIGHS = ContextVar("weighs", default=True)  # False while a model is compared with the textbook


@contextmanager
def share_always() -> Iterator[None]:
    """Share prompts in this context even where it takes longer, so that a comparison of small models covers it."""
    token = _WEIGHS.set(False)
    try:
        yield
    finally:
        _WEIGHS.reset(token)


@dataclass(frozen=True, eq=False)
class SharedPrompt:
    """The prompt's keys and values in one call of a model. Gradient checkpointing recomputes a layer with these.

    Args:
        prefixes: the keys and values in every attention layer.
        past: the number of tokens in the cache of the call.
        tokens: the number of tokens of the call.
        count: the number of prompts, which have equal length and are concatenated in the prefixes.
        spans: the rows' spans in the prefixes, with several prompts.
    """

    prefixes: dict[int, Prefix]
    past: int
    tokens: int
    count: int = 1
    spans: Tensor | None = None

    @property
    def length(self) -> int:
        """The number of virtual tokens of each prompt."""
        return next(iter(self.prefixes.values()))[0].shape[1] // self.count


class SharedBinding(Binding):
    """The binding of an attention module to the prompt's keys and values, or None, in a call."""

    def __init__(
        self, shared: SharedPrompt | None, index: int, layer: Layer, heads: TensorParallelHeads | None = None
    ) -> None:
        self.shared = shared
        self.heads = heads
        self.index = index
        self.window = layer.window

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """Return the prefix, or None in calls on the textbook path."""
        if self.shared is None:
            return None
        pk, pv = self.shared.prefixes[self.index]
        return pk.to(query.dtype), pv.to(query.dtype)

    def get_bias(self, query: Tensor) -> Tensor | None:
        """Return the bias that applies a sliding window to the prompt as to the tokens."""
        shared = self.shared
        assert shared is not None
        return make_window_bias(query, self.window, shared.length, shared.past, shared.tokens)

    def get_spans(self, query: Tensor) -> Tensor | None:
        """Return the spans of the rows if they have different prompts, or None."""
        assert self.shared is not None
        return None if self.shared.spans is None else self.shared.spans.to(query.device)


class CaptureBinding(Binding):
    """The binding of an attention module that captures its keys and values while prompts run."""

    def __init__(
        self,
        captured: dict[nn.Module, Prefix],
        gatherer: Gatherer,
        index: int,
        module: nn.Module,
        heads: TensorParallelHeads | None,
    ) -> None:
        self.captured: dict[nn.Module, Prefix] | None = captured
        self.gatherer = gatherer
        self.index = index
        self.module = module
        self.heads = heads

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values that the attention is called with, and return no prefix."""
        if self.captured is not None:  # not in a recomputed layer
            self.gatherer.watch(self.module, (key, value))
            self.captured[self.module] = (key, value)


@contextmanager
def capturing(
    backbone: nn.Module, layers: Iterable[Layer], heads: TensorParallelHeads | None
) -> Iterator[dict[nn.Module, Prefix]]:
    """Capture the keys ``[K, H, S, D]`` and values that attention modules are called with while K prompts run.

    The prompts run without the gradient checkpointing of ``transformers``, since recomputing so few rows saves too
    little memory. PyTorch's checkpoint wrapper remains active, and recomputes layers without capturing them.
    """
    captured: dict[nn.Module, Prefix] = {}
    gatherer = Gatherer(backbone)
    bindings = {
        layer.module: CaptureBinding(captured, gatherer, index, layer.module, heads)
        for index, layer in enumerate(layers)
    }
    carry_through_checkpoints(backbone)
    try:
        with suspend_checkpointing(backbone), carrying(CarriedBindings(bindings)):
            yield captured
    finally:
        for binding in bindings.values():
            binding.captured = None


class PromptCall(NamedTuple):
    """The properties of a call that the prompt's keys and values depend on."""

    types: dict[str, tuple[int, ...]]
    """The arguments with a value per token, such as token types, and the shape of a value. The prompt's are 0."""
    reach: Tensor | None
    """The last position of the call, if rotary frequencies depend on it, or None."""


class _Kept(NamedTuple):
    """A prompt's keys and values in every layer, and the state and the prompt that they were computed from."""

    state: object
    prompt: Tensor
    prefixes: dict[int, Prefix]


class SharedPromptHooks(PromptHooks):
    """A prompt method on a decoder that runs the prompt once for the whole batch."""

    def __init__(self, model: PreTrainedModel, method: PromptMethod, layers: list[Layer], required: bool) -> None:
        super().__init__(model, method)
        self.required = required  # shared_prompt=True: calls that cannot share the prompt raise an error
        self.count = 1  # prompts of equal length
        self.shift = PositionShift(self.backbone, self.positions)
        self.randomness = Randomness(self.backbone)
        self.kept: _Kept | None = None  # for inference
        self.windows = any(layer.window is not None for layer in layers)
        self.implementation: Implementation | None = None
        self.layers = layers
        self.heads = TensorParallelHeads.find(model, layers)
        self.bindings = self._make_bindings(None)  # of calls on the textbook path, and layers called by themselves

    def _make_bindings(self, shared: SharedPrompt | None) -> dict[nn.Module, Binding]:
        """Return the bindings of all layers to the prompt in a call, or to no prompt."""
        return {
            layer.module: SharedBinding(shared, index, layer, self.heads) for index, layer in enumerate(self.layers)
        }

    def install(self, model: PreTrainedModel) -> None:
        """Switch the model's attention, and set the hooks."""
        super().install(model)
        self.handles += [WatchHandle(self.bindings), *self.shift.install()]
        if self.implementation is None:
            self.implementation = Implementation(model, self.bindings)
        else:
            self.implementation.resume()

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the prompt once, then the backbone on the tokens at positions after it."""
        return run_gathered(self.backbone, self.method, lambda: self._run(forward, args, kwargs))

    def _run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.implementation is not None
        self.implementation.check()
        refuse_replicas(self.backbone)
        refuse_names(kwargs, self.backbone)
        arguments = name_arguments(self.names, args, kwargs)
        cache = find_cache(arguments)
        forget_rows_if_empty(cache)
        past, reason = count_past(arguments), self.find_reason_against(arguments)
        if holds_rows(cache):
            reason = "the prompt is in the cache"
        path = "shared" if reason is None else f"textbook: {reason}"
        if self.method.prompt_path != path:
            self.method.prompt_path = path
        if reason is not None and self.required:
            raise ValueError(f"`shared_prompt=True` cannot be exact in this call: {reason}.")
        carry_through_checkpoints(self.backbone)
        try:
            if reason is None:
                output = self.run_shared(forward, arguments, past)
            else:
                own = self.find_own_attention() if asks_for(arguments, self.backbone, "output_attentions") else None
                with carrying(CarriedBindings(self.bindings, own)):
                    output = self.run_in_every_row(forward, arguments)
        finally:
            self.shift.end()
        return output

    def run_shared(self, forward: Forward, arguments: dict[str, Any], past: int) -> Any:
        """Run the backbone on the tokens with the prompt's keys and values as a prefix."""
        leading, arguments = flatten_leading(arguments)
        given = self.prepare_input(arguments)
        length = self.method.config.num_virtual_tokens
        check_mask_length(arguments.get("attention_mask"), past + given.shape[1], length)
        prefixes = self.compute_prefixes(arguments, past)
        spans = self.find_spans(given.shape[0], arguments, past)
        shared = SharedPrompt(prefixes, past, count_tokens(arguments), self.count, spans)
        self.shift.begin(arguments, length)
        with carrying(CarriedBindings(self._make_bindings(shared))):
            output = self.run_with_offset(forward, arguments, past)
        cache = find_cache(output)
        if cache is not None and not torch.compiler.is_compiling():
            self.remember(cache, shared)
        if leading is not None:
            unflatten_leading(output, leading)
        return output

    def compute_prompts(self) -> Tensor:
        """Compute the prompt ``[m, d]``, or prompts ``[K, m, d]``."""
        return self.method.prompt

    def find_spans(self, batch: int, arguments: dict[str, Any], past: int) -> Tensor | None:
        """Return the span of each row's prompt among several, int ``[B, 2]``, or None for one prompt."""
        return None

    def remember(self, cache: Any, shared: SharedPrompt) -> None:
        """Store the prompt's keys and values on a cache that this call began, for the calls that continue it."""
        if shared.past == 0 or not hasattr(cache, SHARED):
            setattr(cache, SHARED, shared)

    def find_own_attention(self) -> str:
        """Return the name of the model's own attention, which returns attention weights.

        Raises:
            ValueError: if the model's own attention is not "eager", the only one that returns weights.
        """
        assert self.implementation is not None
        names = self.implementation.list_watched_attentions()
        if names != {"eager"}:
            raise ValueError(
                '`output_attentions` requires a model with attn_implementation="eager", but it is '
                f"{', '.join(sorted(map(str, names)))}. Detach the adapter, set the attention implementation and "
                "attach the adapter again."
            )
        return "eager"

    def find_reason_against(self, arguments: dict[str, Any]) -> str | None:
        """Return the reason why a call must run the prompt in every row, or None if it can share the prompt."""
        if self.randomness.acts():
            return "dropout in the model differs by row"
        if not self.required and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            rows = len(next(each for each in self.read_tokens(arguments) if each is not None))
            saved = (rows - self.count) * self.method.config.num_virtual_tokens
            if count_past(arguments) == 0 and not saves_time(self.backbone, len(self.bindings), saved):
                return (
                    f"on a GPU, a second run of every layer takes longer than the {max(0, saved)} tokens that it saves"
                )
        if checkpoints_reentrantly(self.backbone):
            return "reentrant gradient checkpointing differentiates a prefix once per layer"
        if asks_for(arguments, self.backbone, "output_router_logits"):
            return "an auxiliary loss counts the prompt's tokens in every row"
        if asks_for(arguments, self.backbone, "output_attentions"):
            return "attention weights are requested, which the fused kernels do not return"
        if self.positions.by_length is not None and self._computes_positions(arguments):
            return "rotary frequencies depend on the last position, which the model computes from more than the tokens"
        if not torch.compiler.is_compiling() and count_past(arguments) == 0 and differs_by_row(self.backbone):
            return DIFFERENT_ROWS
        if (reason := find_reason_against_mask(arguments, self.windows)) is not None:
            return reason
        if (self.windows or self.method.changes_positions) and is_packed(arguments, self.backbone):
            return "a sliding window or an offset of positions starts again with every packed sequence"
        return None

    def remove(self) -> None:
        """Remove all hooks and restore the model's attention."""
        super().remove()
        if self.implementation is not None:
            self.implementation.restore()

    def _computes_positions(self, arguments: dict[str, Any]) -> bool:
        """Return whether the backbone computes positions from more than a token count, such as those of images."""
        text = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}
        others = any(isinstance(value, Tensor) for name, value in arguments.items() if name not in text)
        return self.shift.inside and arguments.get("position_ids") is None and others

    def compute_prefixes(self, arguments: dict[str, Any], past: int) -> dict[int, Prefix]:
        """Return the prompt's keys and values in every layer.

        A call that continues a sequence reuses those stored on its cache. For inference they are kept while no
        parameter changes.

        Raises:
            ValueError: if the cache holds prompts of another length, or another number of prompts.
        """
        self.shift.end()
        compiling = torch.compiler.is_compiling()
        given = self.prepare_input(arguments)
        of_tokens = find_token_arguments(arguments, *given.shape[:2])
        types = {name: tuple(value.shape[2:]) for name, value in of_tokens.items()}
        by_length = self.positions.by_length
        begun: SharedPrompt | None = getattr(find_cache(arguments), SHARED, None) if past > 0 else None
        if begun is not None:
            refuse_other_prompt(begun.length, self.method, begun.count, self.count)
            if not (compiling and by_length is None and not types):
                return begun.prefixes
        reach = None
        if by_length is not None:
            reach = self.positions.move_ids(arguments, self.method.config.num_virtual_tokens).amax()
        call = PromptCall(types, reach)
        captured = next(self.method.parameters()).is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.is_grad_enabled() or compiling or captured:
            self.kept = None  # some optimizers change weights without a change of their version counters
            return self.run_prompt(call)
        if by_length is not None and reach is not None and int(reach) + 1 >= by_length:
            return self.run_prompt(call)  # its keys are valid for this length only
        return self._get_kept(call, past)

    def _get_kept(self, call: PromptCall, past: int) -> dict[int, Prefix]:
        """Return the prompt's keys and values in every layer. They are computed once while no parameter changes."""
        state, tuners = read_state(self.backbone, self.method), read_tuner_state(self.backbone)
        kept, now = self.kept, (call.types, state, tuners)
        unknown = state is None or (tuners is None and not past)
        if kept is None or unknown or kept.state != now or not (past or self._is_good(kept)):
            prefixes = self.run_prompt(call)
            kept = self.kept = _Kept(now, self.compute_prompts().clone(), prefixes)
        return kept.prefixes

    def _is_good(self, kept: _Kept) -> bool:
        """Return whether a prompt is unchanged in ways that ``read_state`` cannot detect. It runs once per sequence.

        Optimizers may change a prompt through ``.data``, and weights may be offloaded.
        """
        unknown = any(parameter.is_meta for parameter in self.backbone.parameters())
        return not unknown and torch.equal(kept.prompt, self.compute_prompts())

    def run_prompt(self, call: PromptCall | None = None) -> dict[int, Prefix]:
        """Compute the prompt's keys and values in every layer for a call."""
        prompt = self.compute_prompts().to(self.precision)
        length = prompt.shape[-2]
        # Positions are passed explicitly, since some models remember those of an earlier call.
        positions = self.positions.first + torch.arange(length, device=prompt.device)
        if call is not None and call.reach is not None:
            prompt, positions = add_reached_token(prompt, positions, call.reach)
        sizes = {} if call is None else call.types
        types = {name: positions.new_zeros(1, len(positions), *size) for name, size in sizes.items()}
        with capturing(self.backbone, self.layers, self.heads) as captured:
            self.run_alone(prompt, position_ids=positions[None], use_cache=False, **types)
        return {
            index: (_join_rows(key[:, :, :length]), _join_rows(value[:, :, :length]))
            for index, (key, value) in enumerate(captured[layer.module] for layer in self.layers)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave out state that exists only while a model runs."""
        return {**self.__dict__, "kept": None}


def _join_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of a tensor ``[K, H, S, D]`` along its tokens, ``[H, K S, D]``."""
    return tensor[0] if len(tensor) == 1 else tensor.transpose(0, 1).flatten(1, 2)


def add_reached_token(prompt: Tensor, positions: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Append one token at the position ``reach`` to a prompt ``[..., S, d]`` and its positions ``[..., S]``.

    LongRoPE and dynamic NTK choose their frequencies from the largest position of a call. Attention is causal, so the
    last token affects nothing but the frequencies.
    """
    last = reach.expand(*positions.shape[:-1], 1)
    return torch.cat([prompt, prompt[..., :1, :]], dim=-2), torch.cat([positions, last], dim=-1)


def find_reason_not_shareable(model: PreTrainedModel) -> str | None:
    """Return the reason why a prompt cannot be shared on this model, or None if it can.

    The properties of the attention layers are checked first. Then a trial compares three tokens as a shared prompt for
    three others with the same tokens in front of them.
    """
    if "position_ids" not in read_parameter_names(find_backbone(model)):
        return "its positions cannot be set"
    try:
        layers = find_layers(model)
    except ValueError as error:
        return str(error)
    if (reason := find_reason_against_layers(model, layers)) is not None:
        return reason
    try:
        return _try_sharing(model, layers)
    except Exception as error:  # families raise different errors
        return f"a trial with a shared prompt failed: {type(error).__name__}: {error}"


def find_reason_against_layers(model: PreTrainedModel, layers: list[Layer]) -> str | None:
    """Return the reason why a prompt's keys and values differ by row or cannot be reused in these layers, or None."""
    if not all(layer.shape.causal for layer in layers):
        return "its attention is not causal in every layer, so a prompt sees the tokens after it"
    if any(getattr(layer.module, "is_causal", True) is False for layer in layers):
        return "its layers are not marked as causal, so SDPA without a mask shows them the tokens after them"
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if others := sorted(types - {"full_attention", "sliding_attention"}):
        return f"it has layers with neither full attention nor a sliding window ({', '.join(others)})"
    if local := [layer.name for layer in layers if layer.local]:
        return f"these layers attend to some earlier tokens only, but not through a sliding window: {', '.join(local)}"
    return None


def find_reason_against_mask(arguments: dict[str, Any], windows: bool) -> str | None:
    """Return the reason why a prompt cannot be shared with a caller's own attention mask, or None if it can."""
    mask = arguments.get("attention_mask")
    if mask is None or not is_own_mask(mask, arguments):
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return "the attention mask is neither [B, K] nor [B, 1, N, K]"
    if mask.ndim == 4 and mask.shape[2] == 1 < count_tokens(arguments):
        return "in an attention mask of one row, the prompt sees the tokens"
    if mask.ndim == 4 and windows:
        return "an attention mask [B, 1, N, K] replaces the sliding windows"
    return None


def saves_time(backbone: nn.Module, layers: int, tokens: int) -> bool:
    """Return whether a training step is faster if every layer runs twice and computes ``tokens`` fewer tokens.

    This is always assumed on a CPU, and if ranks that share parameters must run the layers equally often.
    """
    if not _WEIGHS.get() or not next(backbone.parameters()).is_cuda:
        return True
    if tokens * sum(parameter.numel() for parameter in backbone.parameters()) >= LEAST_SAVING * layers:
        return True
    return is_sharded(backbone) or any_partitioned(backbone)


class Randomness:
    """Find out whether a call of a module is random, through dropout or the noise of a router.

    Layers with dropout may be added, and rates may change. So every training call searches the module, except for a
    trace, which relies on the last search.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found = _has_dropout(module)

    def acts(self) -> bool:
        """Return whether a call is random now."""
        if not self.module.training:
            return False
        if not torch.compiler.is_compiling():
            self.found = _has_dropout(self.module)
        return self.found


def _has_dropout(module: nn.Module) -> bool:
    """Return whether anything in a module is random during training."""
    for submodule in module.modules():
        probability = getattr(submodule, "p", None)  # of nn.Dropout, and of the modules that PEFT has instead
        if "Dropout" in type(submodule).__name__ and isinstance(probability, int | float) and probability > 0:
            return True
        for name, value in vars(submodule).items():
            if isinstance(value, (float, dict)) and name[0] != "_" and re.search("drop|jitter|noise", name):
                rates = value.values() if isinstance(value, dict) else (value,)  # PEFT has one for each adapter
                if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
                    return True
    return False


def _try_sharing(model: PreTrainedModel, layers: list[Layer]) -> str | None:
    """Compare three tokens as a shared prompt for three others with a plain run. The second row has padding."""
    backbone, device = find_backbone(model), find_device(model)
    prompt, tokens = torch.tensor(list_ordinary_ids(model.config, 6), device=device).expand(2, -1).split(3, dim=1)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=device)
    counts = Positions.find(backbone)
    positions = counts.first + torch.arange(3, device=device)[None]

    def run(ids: Tensor, **kwargs: Any) -> Tensor:
        hidden: Tensor = backbone(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
        return hidden[:, -2:].double()

    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
    with switch_attention(model, {}), preserve_state(model), torch.no_grad():
        alone = run(tokens, attention_mask=mask)
        both = torch.cat([torch.ones_like(mask), mask], dim=1)
        textbook = run(torch.cat([prompt, tokens], dim=1), attention_mask=both)
        with capturing(backbone, layers, None) as captured:
            run(prompt[:1], position_ids=positions)
        prefixes = {i: (key[0], value[0]) for i, (key, value) in enumerate(captured[each.module] for each in layers)}
        shared = SharedPrompt(prefixes, 0, tokens.shape[1])
        inputs = {"input_ids": tokens, "attention_mask": mask}
        with carrying(CarriedBindings({e.module: SharedBinding(shared, i, e) for i, e in enumerate(layers)})):
            actual = run(tokens, attention_mask=mask, position_ids=counts.move_ids(inputs, 3))
        exact = _compare_rows(actual, textbook, alone, dtype)
        return None if all(exact) else _explain_failure(run, tokens, positions, unpadded=exact[0])


def _compare_rows(actual: Tensor, textbook: Tensor, alone: Tensor, dtype: torch.dtype) -> list[bool]:
    """Return for each row whether its values agree with the textbook's.

    Two summation orders differ by rounding. A prompt that the model also carries outside attention differs by its
    whole effect.
    """
    effect, error = ((textbook - other).abs().amax(dim=(1, 2)) for other in (alone, actual))
    agree: list[bool] = (error <= (0.1 if torch.finfo(dtype).bits == 16 else 1e-3) * effect).tolist()
    return agree


def _explain_failure(run: Callable[..., Tensor], tokens: Tensor, positions: Tensor, unpadded: bool) -> str:
    """Return the reason for a failed trial, judged by the model's positions. ``unpadded``: the unpadded row agrees."""
    default = run(tokens)
    if torch.equal(default, run(tokens, position_ids=2 * positions + 1)):
        return "it ignores position_ids"
    if not torch.equal(default, run(tokens, position_ids=positions)):
        return f"its positions do not count from {positions[0, 0]}"
    if unpadded:
        return "it counts positions by the attention mask"
    return "a shared prompt does not give the results of the textbook"
