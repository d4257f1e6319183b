"""Finding a model's attention layers by running it on something small: what calls the attention interface, is one.

That needs no knowledge of model families. It also gives the keys and values that a text has in every layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...methods import METHODS, AttentionShape, MethodConfig, PrefixMethod
from ...methods.budget import embedding_width
from ...methods.shapes import Role
from .attention import MASKS, fastprefix_attention
from .borrowing import borrowed, forgotten
from .calls import by_name, parameter_names
from .inputs import Inputs, is_plain_text, text_inputs
from .masks import read_mask, sees_all_of_window
from .trial import tried

if TYPE_CHECKING:
    from .projection import Projection

_NAME = "fastprefix_probe"


@dataclass
class Layer:
    """An attention module, and what it was called with.

    ``entry`` is the module, inside the layer that the attention belongs to, that is the first to be given the residual
    stream as it enters the layer (None: there is none). The layer's own hooks will not do to watch that stream:
    gradient checkpointing may run the layer again without them.

    ``window`` is its sliding window (None: it sees all that went before), ``local`` says that it sees some other part
    of what went before, such as a chunk.
    """

    name: str
    module: nn.Module
    shape: AttentionShape
    key: Tensor
    value: Tensor
    entry: nn.Module | None
    window: int | None
    local: bool
    projection: Projection | None = None  # for a method that has the layer project its prefix


def text_keys_values(model: PreTrainedModel, input_ids: Tensor, layers: list[Layer]) -> list[tuple[Tensor, Tensor]]:
    """Keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` that layers of the model compute for ids ``[m]``."""
    found = {layer.module: layer for layer in find_layers(model, input_ids[None])}
    return [(found[layer.module].key[0], found[layer.module].value[0]) for layer in layers]


def find_layers(
    model: PreTrainedModel, input_ids: Tensor | None = None, example_inputs: Inputs | None = None
) -> list[Layer]:
    """The attention layers of a model, in the order in which they are called.

    Args:
        model: any.
        input_ids: ``[1, N]``, for a model of text to run on; None: what the trial of its attention ran on.
        example_inputs: a caller's, for that trial.

    Raises:
        ValueError: the model's attention does not go through the attention interface, or is not as it says.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"model takes a model whose attention goes through the attention interface, got {_name(model)}"
        )
    trial = tried(model, example_inputs)
    inputs = trial.inputs if input_ids is None else text_inputs(model, input_ids)
    trace, windows, halves = _Trace(model), _Windows(MASKS[trial.attention]), _Halves(model)
    layers: dict[nn.Module, Layer] = {}

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        entry, hidden = trace.entry(module)
        causal, others = _is_causal(attention_mask, query), query.shape[2] != key.shape[2]
        shape = AttentionShape(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            key_size=key.shape[3],
            value_size=value.shape[3],
            width=embedding_width(model) if hidden is None else hidden.shape[-1],
            causal=causal,
            role="cross" if others else halves.role(module, causal),
        )
        window, local = windows.of(attention_mask, kwargs.get("sliding_window"))
        layers.setdefault(module, Layer(trace.names[module], module, shape, key, value, entry, window, local))
        return fastprefix_attention(module, query, key, value, attention_mask, **kwargs)

    with borrowed(model, _NAME, probe, windows.mask), trace:
        model.base_model(**inputs)
    if not layers:
        raise ValueError(
            f"{_name(model)} never called the attention interface: it has no attention to give a prefix to"
        )
    return list(layers.values())


def method_layers(model: PreTrainedModel, config: MethodConfig, example_inputs: Inputs | None = None) -> list[Layer]:
    """The attention layers of a model that a prefix method is for."""
    method_class = METHODS[config.method_name()][1]
    assert issubclass(method_class, PrefixMethod)
    layers = find_layers(model, example_inputs=example_inputs)
    return [layers[index] for index in method_class.chosen_layers(config, [layer.shape for layer in layers])]


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The module that turns embeddings into hidden states: the outermost that a model calls with them.

    That need not be its ``base_model``: some call a part of it. Of a model with two halves, with another input than
    text, or that makes the masks before it calls such a part, it is the model.
    """
    if not is_plain_text(model):
        return model

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(module, by_name(parameter_names(module), args, kwargs).get("attention_mask"))

    candidates = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    reach = [m for m in candidates if "inputs_embeds" in parameter_names(m)]
    handles = [m.register_forward_pre_hook(reached, with_kwargs=True) for m in reach]
    mask = torch.tensor([[0, 1]], device=model.device)
    masks = {"attention_mask": mask} if "attention_mask" in parameter_names(model) else {}
    try:
        with forgotten(model), torch.no_grad():
            model(input_ids=torch.zeros_like(mask), use_cache=False, **masks)
    except _Reached as found:
        passed_on = found.mask is None or (isinstance(found.mask, Tensor) and found.mask.shape == mask.shape)
        return found.module if passed_on else model
    except Exception as error:
        raise ValueError(f"model takes one that runs on input_ids alone, got {_name(model)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return model


class _Reached(Exception):  # noqa: N818 (nothing is wrong)
    """Ends a run at a module, which was given this mask."""

    def __init__(self, module: nn.Module, mask: Any) -> None:
        super().__init__()
        self.module = module
        self.mask = mask


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor that a module was called with: of a layer, the residual stream."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class _Halves:
    """Which half of an encoder-decoder a module is in; in any other model, what its attention is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.encoder = set(model.get_encoder().modules()) if model.config.is_encoder_decoder else None

    def role(self, module: nn.Module, causal: bool) -> Role:
        """That of a self-attention."""
        in_decoder = causal if self.encoder is None else module not in self.encoder
        return "decoder" if in_decoder else "encoder"


class _Windows:
    """The sliding windows in the masks that are made, each mask carrying its own."""

    def __init__(self, mask_function: Any) -> None:
        self.mask_function = mask_function
        self.made = False  # a mask with a window

    def mask(self, *args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        """The mask function, which leaves a note on the mask."""
        mask: Tensor | None = self.mask_function(*args, local_size=local_size, **kwargs)
        if local_size is not None:
            self.made = True
        if mask is not None:
            sliding = local_size is None or sees_all_of_window(kwargs["mask_function"], local_size, mask.device)
            mask.fastprefix_window = (local_size, False) if sliding else (None, True)  # type: ignore[attr-defined]
        return mask

    def of(self, mask: Tensor | None, said: int | None) -> tuple[int | None, bool]:
        """Window and ``local`` of a layer. The mask counts; one that a model made over says nothing any more, and what
        the layer ``said`` was meant for other kernels.
        """
        unknown = (None, self.made or said is not None)
        window: tuple[int | None, bool] = getattr(mask, "fastprefix_window", unknown)
        return window


class _Trace:
    """Which modules were called with which tensor, in order, while the context lasts."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[tuple[nn.Module, Tensor | None]] = []
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self.handles = [m.register_forward_pre_hook(self._record, with_kwargs=True) for m in self.names]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.calls.clear()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((module, first_tensor(args, kwargs)))

    def entry(self, attention: nn.Module) -> tuple[nn.Module | None, Tensor | None]:
        """The module inside the layer in progress that first got what entered the layer, and what that was.

        The layer is named by the attention's qualified name up to its last number.
        """
        match = re.match(r"(.*\.\d+)(\.|$)", self.names[attention])
        if match is None:
            return None, None
        layer = match.group(1)
        start = max((i for i, (module, _) in enumerate(self.calls) if self.names[module] == layer), default=None)
        if start is None:
            return None, None
        hidden = self.calls[start][1]
        for module, tensor in self.calls[start + 1 :]:
            if tensor is hidden and hidden is not None and self.names[module].startswith(f"{layer}."):
                return module, hidden
        return None, None


def _is_causal(mask: Tensor | None, query: Tensor) -> bool:
    """Whether the first token, of the first row, is kept from seeing the last."""
    masking = read_mask(mask, query)
    if masking.is_causal or masking.attn_mask is None:
        return masking.is_causal
    seen = masking.attn_mask[0, 0, 0, -1]
    return not bool(seen) if seen.dtype is torch.bool else bool(seen < -1)


def _name(model: nn.Module) -> str:
    return type(model).__name__
