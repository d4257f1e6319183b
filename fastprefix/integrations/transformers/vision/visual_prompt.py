"""Run methods that add rows to the tokens of an image in the layers of a vision transformer.

A row is a virtual token here. Rows that are the same for every image run once for the whole batch. Each layer runs on
the rows alone, its attention's keys and values are captured, and the tokens attend to them as to a shared prefix.
Values and gradients equal those of rows in every image. Rows that depend on the image are inserted between its leading
tokens (such as a class token) and its patches.

The caller sees hidden states, pooled outputs and logits of the image's own tokens alone.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ....methods import VisionShape, VisualMethod
from ..models.attention import (
    Binding,
    CarriedBindings,
    Prefix,
    WatchHandle,
    carry_through_checkpoints,
    carrying,
    get_carried_bindings,
    runs_again,
)
from ..models.discovery import ModuleCall, find_layers, record_calls
from ..models.hooks import (
    Forward,
    Interception,
    asks_for,
    checkpoints_reentrantly,
    name_arguments,
    read_parameter_names,
    refuse_replicas,
    suspend_checkpointing,
)
from ..models.switching import Implementation, Inputs, find_device, preserve_state, run_trial
from ..models.tuners import differs_by_row, refuse_different_rows
from ..prompts.shared_prompt import DIFFERENT_ROWS
from ..sharding.fully_sharded import is_fully_sharded

PIXELS = "pixel_values"
_MATCHED = 10  # number of tokens in the matching loss


class VisionStack(NamedTuple):
    """The layers of a vision transformer, each of which receives the output of the layer before."""

    reader: PreTrainedModel
    """The outermost model that reads pixels and no text."""
    part: Any
    """The innermost model that reads pixels and has all of the layers."""
    blocks: list[nn.Module]
    attentions: list[nn.Module]
    """The attention module of each layer."""
    calls: list[ModuleCall]
    """One call of each layer, without the tensors other than the tokens."""
    leading: int
    """The number of tokens before the patches that are the same for every image at the first layer's input."""
    shape: VisionShape
    reason: str | None
    """The reason why a layer cannot run on rows alone, or None."""


def find_vision_stack(model: PreTrainedModel, example_inputs: Inputs | None = None) -> VisionStack:
    """Find the layers of a vision transformer by running it on small images.

    Raises:
        ValueError: if the model has no such layers.
    """
    readers = [m for m in model.modules() if isinstance(m, PreTrainedModel) and _reads_pixels(m)]
    name = type(model).__name__
    if not readers:
        raise ValueError(f"`model` must be or contain a model of images alone, but {name} does not contain one.")
    layers = [layer for layer in find_layers(readers[0], example_inputs=example_inputs) if layer.shape.role != "cross"]
    names = [match.group(1) if (match := re.match(r"(.*\.\d+)(\.|$)", layer.name)) else "" for layer in layers]
    if len({each.rpartition(".")[0] for each in names}) != 1 or len(set(names)) != len(names) or not names[0]:
        raise ValueError(
            f"`model` must have one stack of layers with one attention each, but the attention layers of {name} are "
            f"{', '.join(layer.name for layer in layers[:4])}."
        )
    blocks = [readers[0].get_submodule(each) for each in names]
    part = [reader for reader in readers if set(reader.modules()) >= set(blocks)][-1]
    pixels = run_trial(readers[0]).inputs[PIXELS]
    first, second = (_run_blocks(part, blocks, image) for image in (pixels, 0.5 - pixels))
    states = [call.first_tensor for call in first]
    if not all(_is_state(s, states[0]) for s in states) or not _are_chained(first):
        raise ValueError(f"`model` must have layers that each receive the previous output, but {name} does not.")
    assert states[0] is not None
    assert second[0].first_tensor is not None
    same = torch.eq(states[0], second[0].first_tensor).flatten(2).all(-1).all(0).long()
    convolution = next((m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    width = states[0].shape[-1]
    shape = VisionShape(width, len(blocks), width if convolution is None else convolution.weight[0].numel())
    calls = [_keep_options(call) for call in first]
    reason = _find_reason_against_rows(blocks[0], calls[0], states[0][:1, :2])
    attentions = [layer.module for layer in layers]
    return VisionStack(readers[0], part, blocks, attentions, calls, int(same.cumprod(0).sum()), shape, reason)


def _find_reason_against_rows(block: nn.Module, call: ModuleCall, rows: Tensor) -> str | None:
    args, kwargs = change_tokens(call.args, call.kwargs, lambda _: rows)
    try:
        with preserve_state(block), torch.no_grad():
            block(*args, **kwargs)
    except Exception as error:  # families raise different errors for rows without a position
        return f"a layer does not run on rows alone ({type(error).__name__}: {error})"
    return None


def _reads_pixels(module: nn.Module) -> bool:
    names = read_parameter_names(module)
    return PIXELS in names and "input_ids" not in names


def _run_blocks(part: nn.Module, blocks: list[nn.Module], pixels: Tensor) -> list[ModuleCall]:
    def is_enough(calls: dict[nn.Module, ModuleCall]) -> bool:
        return all(block in calls and calls[block].output is not None for block in blocks)

    calls, error = record_calls(part, blocks, is_enough, **{PIXELS: pixels.to(find_device(part))})  # type: ignore[arg-type]
    if error is not None:
        raise ValueError(f"`model` must run on {PIXELS} alone, but {type(part).__name__} does not.") from error
    return [calls[block] for block in blocks]


def _is_state(tensor: Tensor | None, first: Tensor | None) -> bool:
    return tensor is not None and first is not None and tensor.ndim == 3 and tensor.shape == first.shape


def _are_chained(calls: list[ModuleCall]) -> bool:
    """Return whether every layer receives the output of the layer before."""
    pairs = itertools.pairwise(calls)
    return all(torch.equal(get_state(a.output), b.first_tensor) for a, b in pairs if b.first_tensor is not None)


def _keep_options(call: ModuleCall) -> ModuleCall:
    """Return a call without its tensors. An empty tensor marks the place of the first one, the tokens."""
    tokens = call.first_tensor

    def keep(each: Tensor) -> Tensor | None:
        return each.new_empty(0) if each is tokens else None

    args, kwargs = tree_map_only(Tensor, keep, (call.args, dict(call.kwargs)))
    return ModuleCall(args, kwargs)


def get_state(output: Any) -> Tensor:
    """Return the tokens in a layer's output, which may be a tuple that begins with them."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


def replace_state(output: Any, state: Tensor) -> Any:
    """Return a layer's output with other tokens."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


def change_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer with a change of its tokens, which are the first tensor."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], change(value), *args[i + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: change(kwargs[name])}


def extend_mask(mask: Any, place: int, rows: int, tokens: int) -> Any:
    """Insert rows at ``place`` into a mask ``[..., N or 1, N]``. Rows and tokens all see each other."""
    if not isinstance(mask, Tensor) or mask.shape[-1] != tokens:
        return mask
    seen = mask.dtype is torch.bool
    for dim in (-1, -2):
        if mask.ndim >= -dim and mask.shape[dim] == tokens:
            before, after = mask.split([place, tokens - place], dim)
            shape = [rows if i == mask.ndim + dim else size for i, size in enumerate(mask.shape)]
            mask = torch.cat([before, mask.new_full(shape, seen), after], dim)
    return mask


def crop_states(output: Any, place: int, rows: int, length: int) -> Any:
    """Return an output with the rows removed from its states ``[B, N + P, d]``."""

    def crop(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(crop, value))
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == length + rows:
            return torch.cat([value[:, :place], value[:, place + rows :]], dim=1)
        return value

    if not isinstance(output, ModelOutput):
        return tuple(map(crop, output)) if isinstance(output, tuple) else output
    for name, value in list(output.items()):
        if "hidden_state" in name:
            output[name] = crop(value)
    return output


@dataclass(eq=False)
class RowsCall:
    """The rows of one call. Gradient checkpointing recomputes a layer with those of its own call."""

    prefixes: list[Prefix] | None = None
    """The keys ``[1, Hkv, P, D]`` and values of shared rows in every layer, or None if every image contains them."""
    last: Tensor | None = None
    """The shared rows ``[1, P, d]`` that enter the last layer."""
    rows: int = 0
    """The number of rows in every image."""
    tokens: int = 0
    """The number of tokens of an image without rows."""


class RowsBinding(Binding):
    """The binding of a layer's attention to the keys and values of the rows in a call."""

    def __init__(self, hooks: VisualHooks, index: int, call: RowsCall) -> None:
        self.hooks = hooks
        self.index = index
        self.call = call
        self.captured: Prefix | None = None  # keys and values of the rows that run now
        self.image_rows: Prefix | None = None  # keys and values ``[B, Hkv, A, D]`` of the rows that differ by image
        self.attention: Tensor | None = None  # attention of the class token to the tokens ``[B, N]``, if needed

    def hook_layer(self) -> list[Interception]:
        """Set the interception of the layer, unless the hooks are installed."""
        return [] if self.hooks.block_handles else [self.hooks.intercept(self.index)]

    def attend_alone(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Store the keys and values of rows that run alone. The output of each row is its own value."""
        if not self.hooks.running_rows:
            return None
        self.captured = key, value
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """Return the keys and values of the rows, or None if every image contains the rows."""
        if self.call.prefixes is None:
            return None
        key_of_rows, value_of_rows = self.call.prefixes[self.index]
        pk, pv = key_of_rows[0].to(query), value_of_rows[0].to(query)
        if self.image_rows is not None:
            pk, pv = (
                torch.cat([shared.expand(len(query), -1, -1, -1), own], dim=2)
                for shared, own in zip((pk, pv), self.image_rows, strict=True)
            )
        if self.hooks.asks_for_attention(self.index):
            self.attention = self._compute_attention(query, key, pk)
        return pk, pv

    def _compute_attention(self, query: Tensor, key: Tensor, prefix_key: Tensor) -> Tensor:
        """Compute the attention ``[B, N]`` of the class token to the tokens, averaged over heads."""
        groups, tokens = query.shape[1] // key.shape[1], key.shape[2]
        if self.hooks.method.strength(self.index) is None:
            key = torch.cat([key, prefix_key.expand(len(key), -1, -1, -1)], dim=2)
        scale = getattr(self.hooks.stack.attentions[self.index], "scaling", query.shape[-1] ** -0.5)
        scores = query[:, :, :1] @ key.repeat_interleave(groups, 1).mT * scale
        attention: Tensor = scores.softmax(-1)[..., :tokens].mean(1).squeeze(1)
        return attention

    def get_gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[None, Tensor | None]:
        """Return the output gate ``share / (1 - share)`` of a separate softmax over the rows.

        ``get_output_scale`` multiplies the output by ``1 - share``, which gives the rows their share.
        """
        share = self.hooks.method.strength(self.index)
        return None, None if share is None else query.new_full((query.shape[1],), share / (1.0 - share))

    def get_output_scale(self) -> float:
        """Return the factor of the output, which is the share of the softmax over the tokens."""
        share = self.hooks.method.strength(self.index)
        return 1.0 if share is None or self.call.prefixes is None else 1.0 - share

    def __getstate__(self) -> dict[str, Any]:
        """Leave out state that exists only while a model runs."""
        return {**self.__dict__, "captured": None, "image_rows": None, "attention": None}


class VisualHooks:
    """A method with rows beside the tokens of an image. Its hooks are set from ``install`` to ``remove``."""

    def __init__(self, model: PreTrainedModel, method: VisualMethod, stack: VisionStack) -> None:
        self.model = model
        self.method: Any = method
        self.stack = stack
        self.names = read_parameter_names(stack.part)
        self.bindings = self._make_bindings(RowsCall())  # while rows run alone, and of layers called by themselves
        self.running_rows = False
        self.handles: list[Interception | WatchHandle] = []
        self.block_handles: list[Interception] = []
        self.implementation: Implementation | None = None

    def _make_bindings(self, call: RowsCall) -> dict[nn.Module, RowsBinding]:
        """Return the bindings of all layers to a call."""
        return {module: RowsBinding(self, index, call) for index, module in enumerate(self.stack.attentions)}

    def install(self, model: PreTrainedModel) -> None:
        """Set the hooks, and switch the attention if rows can be shared."""
        if self.find_reason(training=False) is None:
            if self.implementation is None:
                self.implementation = Implementation(self.stack.part, {**self.bindings})
            else:
                self.implementation.resume()
        self.block_handles = [self.intercept(index) for index in range(len(self.stack.blocks))]
        self.handles = [Interception(self.stack.part, self.run), WatchHandle(self.bindings), *self.block_handles]

    def intercept(self, index: int) -> Interception:
        """Intercept the calls of a layer."""
        owners = (self.model, self.stack.part)
        return Interception(self.stack.blocks[index], functools.partial(self.run_block, index), owners)

    def remove(self) -> None:
        """Remove all hooks and restore the model's attention."""
        for handle in self.handles:
            handle.remove()
        if self.implementation is not None:
            self.implementation.restore()
        self.handles, self.block_handles = [], []

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model. Rows that do not depend on the image run once for the whole batch."""
        refuse_replicas(self.stack.part)
        arguments = name_arguments(self.names, args, kwargs)
        if torch.is_grad_enabled() and checkpoints_reentrantly(self.stack.part):
            raise ValueError(
                "`use_reentrant` must be False for gradient checkpointing of a model with visual prompts, which would "
                "get no gradients."
            )
        reason = self.find_reason(self.method.training)
        if reason is None and not torch.compiler.is_compiling():
            reason = self.find_reason_of_call()
        path = "shared" if reason is None else f"textbook: {reason}"
        if self.method.prompt_path != path:
            self.method.prompt_path = path
        if self.implementation is not None:
            self.implementation.check()
            if asks_for(arguments, self.stack.part, "output_attentions"):
                raise ValueError(
                    "`output_attentions` must be False with visual prompts that are shared without dropout, whose "
                    "kernels do not return attention weights."
                )
        call = self.run_rows() if reason is None else RowsCall()
        carry_through_checkpoints(self.stack.part)
        with carrying(CarriedBindings(self._make_bindings(call))):
            output = forward(*args, **kwargs)
        if reason is not None:
            return crop_states(output, self.stack.leading, call.rows, call.tokens)
        tail = self.count_tail()
        return crop_states(output, call.tokens, tail, call.tokens) if tail else output

    def find_reason(self, training: bool) -> str | None:
        """Return the reason why every image must contain the rows, or None if they run once for the whole batch."""
        return self.method.sees_tokens(training) or self.stack.reason

    def find_reason_of_call(self) -> str | None:
        """Return the reason why every image of this call must contain the rows, or None.

        Raises:
            ValueError: if there is a reason, and the method's rows cannot be in every image.
        """
        part, of_method = self.stack.part, type(self.method).__name__
        in_images = self.method.strength(0) is None
        if differs_by_row(part):
            if not in_images:
                refuse_different_rows(part, of_method)
            return DIFFERENT_ROWS
        if is_fully_sharded(part):
            if not in_images:
                raise ValueError(f"`model` must not be sharded by FSDP2 for {of_method}. Use DistributedDataParallel.")
            return "layers of a sharded model do not run on rows alone"
        return None

    def find_binding(self, index: int) -> RowsBinding | None:
        """Return a layer's binding in the call in progress, or None if that call runs without this adapter."""
        carried, attention = get_carried_bindings(), self.stack.attentions[index]
        binding = self.bindings[attention] if carried is None else carried.bindings.get(attention)
        return binding if isinstance(binding, RowsBinding) and binding.hooks is self else None

    def run_rows(self) -> RowsCall:
        """Run the rows alone."""
        rows: Tensor | None = None
        prefixes: list[Prefix] = []
        former: Tensor | None = None
        # Recomputed layers are assumed to run on tokens.
        with suspend_checkpointing(self.stack.part), carrying(CarriedBindings(self.bindings)):
            for index in range(len(self.stack.blocks)):
                rows = self.method.make_rows(index, former, 1)
                former, prefix = self.run_alone(index, self.block_handles[index].forward, rows)
                prefixes.append(prefix)
        return RowsCall(prefixes, rows)

    def run_alone(self, index: int, forward: Forward, rows: Tensor) -> tuple[Tensor, Prefix]:
        """Run a layer on rows ``[B, P, d]`` alone, and return its output for them, and their keys and values."""
        former, self.running_rows = self.running_rows, True
        binding, call = self.find_binding(index), self.stack.calls[index]
        assert binding is not None
        rows = rows.to(self.stack.part.dtype)
        args, kwargs = change_tokens(call.args, call.kwargs, lambda _: rows)
        try:
            output = forward(*args, **kwargs)
        finally:
            self.running_rows = former
        captured, binding.captured = binding.captured, None
        if captured is None:
            raise RuntimeError(f"{type(self.stack.blocks[index]).__name__} did not call the attention interface.")
        return get_state(output), captured

    def run_block(self, index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer. If the rows are not shared, insert them into every image."""
        binding = self.find_binding(index)
        if binding is None:
            return forward(*args, **kwargs)
        call = binding.call
        if call.prefixes is not None:
            return self.run_beside_rows(index, forward, args, kwargs)
        place, former = self.stack.leading, call.rows if index else 0

        def insert(state: Tensor) -> Tensor:
            own = state[:, place : place + former] if former else None
            rows = self.method.make_rows(index, own, len(state)).to(state)
            call.rows, call.tokens = rows.shape[1], state.shape[1] - former
            return torch.cat([state[:, :place], rows, state[:, place + former :]], dim=1)

        args, kwargs = change_tokens(args, kwargs, insert)
        args, kwargs = tree_map_only(
            Tensor,
            lambda each: each if each.ndim == 3 else extend_mask(each, place, call.rows, call.tokens),
            (args, kwargs),
        )
        output = forward(*args, **kwargs)
        if index + 1 < len(self.stack.blocks):
            return output
        state = get_state(output)
        return replace_state(output, torch.cat([state[:, :place], state[:, place + call.rows :]], dim=1))

    # Rows that differ by image. Between layers they are appended to the tokens. Before the layer that creates them, the
    # tokens that they are made of are appended instead. A recomputed layer thereby gets all of its inputs.

    def count_tail(self) -> int:
        """Return the number of rows that differ by image, or 0."""
        reads = any(self.method.reads_tokens(index) for index in range(len(self.stack.blocks)))
        return int(self.method.config.num_attribute) if reads else 0

    def has_tail(self, index: int) -> bool:
        """Return whether rows that differ by image, or the tokens that they are made of, enter a layer."""
        return any(self.method.reads_tokens(i) for i in range(index + 1))

    def asks_for_attention(self, index: int) -> bool:
        """Return whether the attention of the class token is needed in a layer."""
        last = index + 1 == len(self.stack.blocks)
        return self.keeps_loss() if last else self.method.reads_tokens(index + 1)

    def keeps_loss(self) -> bool:
        """Return whether calls store a loss on the method."""
        return bool(getattr(self.method.config, "matching_loss", False))

    def run_beside_rows(self, index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer whose tokens attend to shared rows, and to rows that differ by image if there are any."""
        if not self.keeps_loss() and self.count_tail() == 0:
            return forward(*args, **kwargs)
        block: Any = self.stack.blocks[index]
        checkpoints = getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled()
        if not checkpoints:
            return self.run_beside_image_rows(index, forward, args, kwargs)

        def run_plainly(*given: Any) -> Any:
            block.gradient_checkpointing = False
            try:
                return self.run_beside_image_rows(index, forward, given, kwargs)
            finally:
                block.gradient_checkpointing = True

        # Inside the layer's own checkpoint, a recomputed layer would get the image rows of a later call.
        return block._gradient_checkpointing_func(run_plainly, *args)

    def run_beside_image_rows(self, index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer on the tokens, and on the rows that differ by image."""
        count = self.count_tail() if self.has_tail(index) else 0
        tail: Tensor | None = None
        tokens: Tensor | None = None

        def split(state: Tensor) -> Tensor:
            nonlocal tail, tokens
            end = state.shape[1] - count
            tokens, tail = state[:, :end], state[:, end:] if count else None
            return tokens

        args, kwargs = change_tokens(args, kwargs, split)
        assert tokens is not None
        binding = self.find_binding(index)
        assert binding is not None
        binding.call.tokens = tokens.shape[1]
        rows, after = self.method.make_image_rows(index, tail), None
        if rows is not None:
            after, binding.image_rows = self.run_alone(index, forward, rows)
        try:
            output = forward(*args, **kwargs)
        finally:
            attention, binding.attention, binding.image_rows = binding.attention, None, None
        if index + 1 == len(self.stack.blocks):
            if self.keeps_loss():
                loss = self.compute_loss(binding.call, tokens, rows, attention)
                if not runs_again():
                    self.method.matching_loss = loss
            return output
        if self.method.reads_tokens(index + 1):
            after = self.choose_tokens(get_state(output), attention, self.count_tail())
        return output if after is None else replace_state(output, torch.cat([get_state(output), after], dim=1))

    def choose_tokens(self, state: Tensor, attention: Tensor | None, count: int) -> Tensor:
        """Return the patches ``[B, A, d]`` with the largest attention of the class token."""
        assert attention is not None
        patches = attention[:, self.stack.leading :]
        if patches.shape[1] < count:
            raise ValueError(f"`num_attribute` must be at most {patches.shape[1]}, the number of patches, got {count}.")
        place = patches.topk(count, dim=1).indices + self.stack.leading
        return state.gather(1, place[..., None].expand(-1, -1, state.shape[-1]))

    def compute_loss(self, call: RowsCall, tokens: Tensor, rows: Tensor | None, attention: Tensor | None) -> Tensor:
        """Compute the matching loss between the rows and the most attended tokens at the last layer's input."""
        last = call.last
        assert last is not None
        count = min(_MATCHED, tokens.shape[1] - self.stack.leading)
        shared = last.to(tokens).expand(len(tokens), -1, -1)
        every = shared if rows is None else torch.cat([shared, rows.to(tokens)], dim=1)
        loss: Tensor = self.method.compute_matching_loss(every, self.choose_tokens(tokens, attention, count))
        return loss
