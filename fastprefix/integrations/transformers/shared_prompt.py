"""One prompt for the whole batch, exactly.

In a decoder-only model the prompt stands before everything and attention is causal, so what its tokens compute is the
same in every row. It is run once, as a batch of one; the rows then attend to its keys and values as to a shared
prefix. Values and gradients are those of the textbook's way, which runs the prompt in every row.

Where that is not exact the textbook's way is taken, and ``path`` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...methods import DePT, PromptMethod
from .adapter import is_sharded
from .attention import Binding, Prefix, window_bias
from .discovery import Layer, backbone_of, find_layers
from .hooks import (
    Positions,
    by_name,
    find_cache,
    is_packed,
    not_checkpointed,
    parameter_names,
    past_length,
    reentrant,
    refuse_replicas,
    shifted_positions,
)
from .prompt import PromptHooks
from .switching import Implementation, device_of, forgotten, loaded, switched

_FILLED = "fastprefix_filled"
"""The attribute of a key/value cache that says whether prompts are in it ("textbook") or not ("shared")."""


class SharedPrompt:
    """The prompt's keys and values in every attention layer: being captured, given as prefixes, or neither."""

    def __init__(self) -> None:
        self.prefixes: dict[int, Prefix] | None = None
        self.capturing = False
        self.past = 0  # tokens in the cache of the call in progress

    def bindings(self, layers: list[Layer]) -> dict[nn.Module, Binding]:
        """What each layer's attention module is bound to."""
        return {layer.module: SharedBinding(self, index, layer.window) for index, layer in enumerate(layers)}

    @contextmanager
    def capture(self) -> Iterator[None]:
        """What attention layers are called with in this context becomes their prefix."""
        self.prefixes, self.capturing = {}, True
        try:
            yield
        finally:
            self.capturing = False

    def __getstate__(self) -> dict[str, Any]:
        """What lives only while a model runs is not copied or pickled."""
        return {"prefixes": None, "capturing": False, "past": 0}


class SharedBinding:
    """What an attention module finds on itself: the prompt's keys and values in its layer."""

    def __init__(self, shared: SharedPrompt, index: int, window: int | None) -> None:
        self.shared = shared
        self.index = index
        self.window = window

    def prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """The prefix; None while the prompt itself runs, and on the textbook's path."""
        shared = self.shared
        if shared.prefixes is None:
            return None
        if shared.capturing:
            shared.prefixes[self.index] = (key[0], value[0])
            return None
        pk, pv = shared.prefixes[self.index]
        return pk.to(query.dtype), pv.to(query.dtype)

    def gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[None, None]:
        """None: a prompt has no gates."""
        return None, None

    def bias(self, query: Tensor) -> Tensor | None:
        """A sliding window cuts the prompt as it does the tokens."""
        assert self.shared.prefixes is not None
        length = self.shared.prefixes[self.index][0].shape[1]
        return window_bias(query, self.window, length, self.shared.past)


class _Kept(NamedTuple):
    """A prompt's keys and values in every layer, and what they were computed of."""

    state: object
    prompt: Tensor
    prefixes: dict[int, Prefix]


class SharedPromptHooks(PromptHooks):
    """A prompt method on a decoder that runs its prompt once for the whole batch."""

    def __init__(self, model: PreTrainedModel, method: PromptMethod, layers: list[Layer], required: bool) -> None:
        super().__init__(model, method)
        self.required = required  # shared_prompt=True: a call that cannot share is an error
        self.shared = SharedPrompt()
        self.drops = has_dropout(self.backbone)
        self.kept: _Kept | None = None  # for inference
        self.windows = any(layer.window is not None for layer in layers)
        self.implementation: Implementation | None = None
        self.bindings = self.shared.bindings(layers)

    def install(self, model: PreTrainedModel) -> None:
        """Switch the model's attention, and set the hooks."""
        super().install(model)
        if self.implementation is None:
            self.implementation = Implementation(model, self.bindings)
        else:
            self.implementation.resume()

    def insert(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the backbone: run the prompt once, then the tokens, moved up by its length."""
        assert self.implementation is not None
        self.implementation.check()
        refuse_replicas(module)
        arguments = by_name(self.names, args, kwargs)
        past, reason = past_length(arguments), self.reason_against(arguments)
        filled = getattr(find_cache(arguments), _FILLED, None) if past > 0 else None
        if filled == "shared" and reason is not None:
            raise ValueError(f"past_key_values takes no cache that was filled while the prompt was shared: {reason}")
        if filled == "textbook":
            reason = "the prompt is in the cache"
        path = "shared" if reason is None else f"textbook: {reason}"
        if self.method.prompt_path != path:
            self.method.prompt_path = path
        if reason is not None:
            if self.required:
                raise ValueError(f"shared_prompt=True cannot be exact in this call: {reason}")
            self.shared.prefixes = None
            return super().insert(module, args, kwargs)
        ids, rows = self.tokens(arguments)
        self.inserted = 0
        self.shared.past = past
        self.shared.prefixes = self._prefixes(past)
        embeds = self.embed(ids, rows, past, with_prompt=False)
        length = self.method.config.num_virtual_tokens
        positions = shifted_positions(arguments, embeds, past + self.positions.first, length)
        arguments.update(input_ids=None, inputs_embeds=embeds, position_ids=positions)
        return (), {name: value for name, value in arguments.items() if value is not None or name in kwargs}

    def crop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the backbone: hidden states of the caller's tokens. The cache is told what is in it."""
        cache = find_cache(output)
        if cache is not None and not torch.compiler.is_compiling() and not hasattr(cache, _FILLED):
            setattr(cache, _FILLED, "textbook" if self.shared.prefixes is None else "shared")
        return super().crop(module, args, output)

    def reason_against(self, arguments: dict[str, Any]) -> str | None:
        """Why a call with these arguments takes the textbook's path; None: it shares the prompt."""
        if self.drops and self.backbone.training:
            return "dropout in the model draws anew in every row"
        if reentrant(self.backbone):
            return "reentrant gradient checkpointing differentiates a prefix once a layer"
        if torch.is_grad_enabled() and is_sharded(self.backbone):
            return "FSDP gathers a layer for the backward of its output, not for that of its keys and values"
        if getattr(self.backbone.config, "output_router_logits", False) or arguments.get("output_router_logits"):
            return "an auxiliary loss counts the prompt's tokens in every row"
        mask = arguments.get("attention_mask")
        # With a cache, `generate` makes the masks beforehand; without one they are the caller's own.
        if find_cache(arguments) is None and mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
                return "the attention mask is neither [B, K] nor [B, 1, N, K]"
            if mask.ndim == 4 and mask.shape[2] == 1:
                return "in an attention mask of one row, the prompt sees the tokens"
            if mask.ndim == 4 and self.windows:
                return "an attention mask [B, 1, N, K] stands in the place of the sliding windows"
        if (self.windows or isinstance(self.method, DePT)) and is_packed(arguments, self.backbone.config):
            return "a sliding window and DePT's offset start anew with every packed sequence"
        return None

    def remove(self) -> None:
        """Take everything back."""
        super().remove()
        assert self.implementation is not None
        self.implementation.restore()

    def _prefixes(self, past: int) -> dict[int, Prefix]:
        """The prompt's keys and values in every layer; for inference they are kept while no parameter changes."""
        prompt = self.method.prompt
        captured = prompt.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or captured:
            return self.run_prompt()
        state = _state(self.backbone, self.method)
        if self.kept is None or state is None or self.kept.state != state or not (past or self._is_good(self.kept)):
            self.kept = _Kept(state, prompt.clone(), self.run_prompt())
        return self.kept.prefixes

    def _is_good(self, kept: _Kept) -> bool:
        """Whether nothing has changed that ``_state`` does not tell: a prompt written through ``.data``, as optimizers
        do, PEFT's layers, which may be merged so or switched, or weights that accelerate has offloaded. Asked once a
        sequence.
        """
        unknown = any(hasattr(module, "merged_adapters") for module in self.backbone.modules())
        unknown = unknown or any(parameter.is_meta for parameter in self.backbone.parameters())
        return not unknown and torch.equal(kept.prompt, self.method.prompt)

    def run_prompt(self) -> dict[int, Prefix]:
        """The prompt's keys and values in every layer, computed."""
        prompt = self.method.prompt.to(self.table.dtype)
        # Said, since some models remember where a former call's rows were.
        positions = self.positions.first + torch.arange(len(prompt), device=prompt.device)[None]
        with self.shared.capture(), not_checkpointed(self.backbone):  # one row is not worth running twice
            self.backbone.forward(inputs_embeds=prompt[None], position_ids=positions, use_cache=False)
        assert self.shared.prefixes is not None
        return self.shared.prefixes

    def __getstate__(self) -> dict[str, Any]:
        """What lives only while a model runs is not copied or pickled."""
        return {**self.__dict__, "kept": None}


def reason_not_shareable(model: PreTrainedModel) -> str | None:
    """Why a prompt cannot be shared on this model; None: it can.

    Told by what its attention layers are called with, and then by trying: three tokens as a shared prompt have to do to
    three others what they do as tokens in front of them.
    """
    if "position_ids" not in parameter_names(backbone_of(model)):
        return "its positions cannot be set"
    try:
        layers = find_layers(model)
    except ValueError as error:
        return str(error)
    if (reason := reason_against_layers(model, layers)) is not None:
        return reason
    try:
        return _try(model, layers)
    except Exception as error:  # whatever a family makes of it
        return f"trying to share the prompt failed: {type(error).__name__}: {error}"


def reason_against_layers(model: PreTrainedModel, layers: list[Layer]) -> str | None:
    """Why what a prompt does in a model's layers is not the same in every row, or cannot be handed on; None: it is."""
    if not all(layer.shape.causal for layer in layers):
        return "its attention is not causal throughout, so a prompt sees what comes after it"
    if any(getattr(layer.module, "is_causal", True) is False for layer in layers):
        return "its layers are not causal by themselves, and SDPA, where it gets no mask, shows them what comes after"
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if others := sorted(types - {"full_attention", "sliding_attention"}):
        return f"it has layers that see neither all that went before nor a sliding window of it ({', '.join(others)})"
    if local := [layer.name for layer in layers if layer.local]:
        return f"what these layers see of what went before is no sliding window: {', '.join(local)}"
    return None


def has_dropout(module: nn.Module) -> bool:
    """Whether anything in a module drops anything while training."""
    for submodule in module.modules():
        if isinstance(submodule, nn.Dropout) and submodule.p > 0.0:
            return True
        rates = (value for name, value in vars(submodule).items() if re.search("drop", name))
        if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
            return True
    return False


def _try(model: PreTrainedModel, layers: list[Layer]) -> str | None:
    """Three tokens as a prompt for three others: in front of them and shared. The second row has padding."""
    shared, backbone, embedding = SharedPrompt(), backbone_of(model), model.get_input_embeddings()
    prompt, tokens = torch.arange(6, device=device_of(model)).expand(2, -1).split(3, dim=1)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=device_of(model))
    positions = Positions.of(backbone).first + torch.arange(3, device=device_of(model))[None]

    def run(ids: Tensor, **kwargs: Any) -> Tensor:
        with loaded(model, embedding):
            rows = embedding(ids)
        hidden: Tensor = backbone(inputs_embeds=rows, use_cache=False, **kwargs).last_hidden_state
        return hidden[:, -2:].double()

    with switched(model, shared.bindings(layers)), forgotten(model), torch.no_grad():
        alone = run(tokens, attention_mask=mask)
        both = torch.cat([torch.ones_like(mask), mask], dim=1)
        textbook = run(torch.cat([prompt, tokens], dim=1), attention_mask=both)
        with shared.capture():
            run(prompt[:1], position_ids=positions)
        actual = run(tokens, attention_mask=mask, position_ids=positions + 3)
        exact = _agreement(actual, textbook, alone, model.dtype)
        shared.prefixes = None
        return None if all(exact) else _why_not(run, tokens, positions, unpadded=exact[0])


def _agreement(actual: Tensor, textbook: Tensor, alone: Tensor, dtype: torch.dtype) -> list[bool]:
    """Of which rows the textbook's values are hit. Two orders of the same sums differ by rounding; a prompt that is
    carried past attention, by all of its effect.
    """
    effect, error = ((textbook - other).abs().amax(dim=(1, 2)) for other in (alone, actual))
    agree: list[bool] = (error <= (0.1 if torch.finfo(dtype).bits == 16 else 1e-3) * effect).tolist()
    return agree


def _why_not(run: Callable[..., Tensor], tokens: Tensor, positions: Tensor, unpadded: bool) -> str:
    """The reason, from what a model does with positions; ``unpadded``: without padding, sharing was exact."""
    default = run(tokens)
    if torch.equal(default, run(tokens, position_ids=2 * positions + 1)):
        return "it ignores position_ids"
    if not torch.equal(default, run(tokens, position_ids=positions)):
        return f"its positions do not count from {positions[0, 0]}"
    if unpadded:
        return "it counts positions by the attention mask"
    return "sharing the prompt does not give what the textbook's way gives"


def _state(*modules: nn.Module) -> object:
    """Something that is equal while no parameter is changed or moved, nor autocast; None where that cannot be told.

    PyTorch counts a tensor's in-place changes; only those through ``.data`` it does not see.
    """
    parameters = [p for module in modules for p in module.parameters()]
    if any(p.is_inference() for p in parameters):
        return None
    kind = parameters[-1].device.type  # the adapter's, since offloaded weights are on the meta device between calls
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, *((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)
