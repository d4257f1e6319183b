"""Find the attention layers of a model, and build small copies of it.

Layers are found by running the model on a small input and recording which modules call the attention interface, so no
model family has to be known. The same run yields the keys and values of a text in every layer, and the keys and values
that a layer's own projections compute for states that are not tokens (LLaMA-Adapter).

A small copy has the class and configuration of a model, narrow heads and random weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...methods import METHODS, AttentionShape, MethodConfig, PrefixMethod
from ...methods.budget import embedding_width
from ...methods.shapes import Role
from .attention import MASKS, Prefix, fastprefix_attention, read_mask, sees_all_of_window
from .hooks import by_name, parameter_names
from .switching import (
    Inputs,
    borrowed,
    device_of,
    evaluated,
    forgotten,
    is_plain_text,
    switched,
    text_inputs,
    tried,
)

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

    candidates = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    found = _first_called(model, [m for m in candidates if "inputs_embeds" in parameter_names(m)])
    if found is None:
        return model
    mask = found.arguments.get("attention_mask")
    passed_on = mask is None or (isinstance(mask, Tensor) and mask.shape == (1, _FEW))
    return found.module if passed_on else model


def receives_ids(model: PreTrainedModel, backbone: nn.Module) -> bool:
    """Return whether a model hands its ids on to the backbone, rather than what it made of them."""
    found = None if backbone is model else _first_called(model, [backbone])
    return found is None or found.arguments.get("input_ids") is not None


_FEW = 8  # tokens, for models that pool them


def _first_called(model: PreTrainedModel, modules: list[nn.Module]) -> _Reached | None:
    """Run a model on a few tokens, and return the call of the first of some modules that it calls, or None.

    Raises:
        ValueError: the model does not run.
    """

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(module, by_name(parameter_names(module), args, kwargs))

    handles = [m.register_forward_pre_hook(reached, with_kwargs=True) for m in modules]
    ids = torch.tensor([ordinary_ids(model.config, _FEW)], device=device_of(model))
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    masks = {"attention_mask": mask} if "attention_mask" in parameter_names(model) else {}
    try:
        with forgotten(model), torch.no_grad():
            model(input_ids=ids, use_cache=False, **masks)
    except _Reached as found:
        return found
    except Exception as error:
        raise ValueError(
            f"`model` must run on input_ids alone, but {_name(model)} raised {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return None


def embeds_ids_as_given(backbone: Any, embedding: nn.Module) -> bool:
    """Return whether a backbone calls its embedding module with the ids that it gets, or more behind them.

    Some transpose them (XLNet), or put ids of their own before them (CPM-Ant).
    """
    found = _first_called(backbone, [embedding])
    ids = None if found is None else first_tensor((), found.arguments)
    return ids is not None and ids.ndim == 2 and ids[:, :_FEW].tolist() == [ordinary_ids(backbone.config, _FEW)]


def entry_of(backbone: Any, embedding: nn.Module) -> nn.Module:
    """Return the module whose output is what a model calls ``inputs_embeds``.

    That is the embedding module, or a block around it where a family's ``inputs_embeds`` skip the whole block (ESM).
    Which it is, is found by giving the model the output of each in turn: the first module behind all of them must get
    what it gets from the ids.
    """
    names = {module: name for name, module in backbone.named_modules()}
    around = _parents(backbone, names.get(embedding, ""))
    blocks = [module for module in around if not isinstance(module, PreTrainedModel)]
    if not blocks:
        return embedding
    candidates = [embedding, *blocks]
    seen: dict[nn.Module, Any] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(module, output)

    handles = [module.register_forward_hook(record) for module in candidates]
    try:
        ids = torch.tensor([ordinary_ids(backbone.config, _FEW)], device=device_of(backbone))
        expected = _first_state(backbone, [*around, *blocks[-1].modules()], input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    for module in candidates:
        if isinstance(seen.get(module), Tensor) and expected is not None:
            actual = _first_state(backbone, [*around, *blocks[-1].modules()], inputs_embeds=seen[module])
            if actual is not None and actual.shape == expected.shape and torch.allclose(actual, expected):
                return module
    return embedding


def _parents(backbone: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules between a backbone and one of its modules, from the inside out."""
    parts = name.split(".")[:-1]
    return [backbone.get_submodule(".".join(parts[:count])) for count in range(len(parts), 0, -1)]


def ordinary_ids(config: PretrainedConfig, count: int) -> list[int]:
    """Return token ids that mean nothing special to a model: neither padding nor the place of an image."""
    special: set[Any] = set()
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                special |= set(value) if isinstance(value, list | tuple) else {value}
    return [i for i in range(len(special) + count) if i not in special][:count]


def _first_state(backbone: nn.Module, before: list[nn.Module], **inputs: Tensor) -> Tensor | None:
    """Return the first ``[B, N, d]`` that a module not among those ``before`` is called with, or None."""

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = first_tensor(args, kwargs)
        if state is not None and state.is_floating_point() and state.ndim == 3:
            raise _Reached(module, {"state": state})

    others = set(backbone.modules()) - {backbone, *before}
    handles = [module.register_forward_pre_hook(reached, with_kwargs=True) for module in others]
    try:
        with forgotten(backbone), torch.no_grad():
            backbone(**inputs)
    except _Reached as found:
        state: Tensor = found.arguments["state"]
        return state
    except Exception:  # whatever a family makes of embeddings that it does not expect
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None


class _Reached(Exception):  # noqa: N818 (nothing is wrong)
    """End a run at a module, which was called with these arguments."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments


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
    """The sliding windows in the masks that are made. A view of a mask, such as a slice, has the mask's."""

    def __init__(self, mask_function: Any) -> None:
        self.mask_function = mask_function
        self.made = False  # a mask with a window
        self.masks: dict[int, tuple[Tensor, tuple[int | None, bool]]] = {}  # by their storage, and what each says

    def mask(self, *args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        """The mask function; what the mask says is kept."""
        mask: Tensor | None = self.mask_function(*args, local_size=local_size, **kwargs)
        if local_size is not None:
            self.made = True
        if mask is not None:
            sliding = local_size is None or sees_all_of_window(kwargs["mask_function"], local_size, mask.device)
            window = (local_size, False) if sliding else (None, True)
            self.masks[mask.untyped_storage().data_ptr()] = mask, window
        return mask

    def of(self, mask: Tensor | None, said: int | None) -> tuple[int | None, bool]:
        """Window and ``local`` of a layer. The mask counts; one that a model made over says nothing any more, and what
        the layer ``said`` was meant for other kernels.
        """
        unknown = (None, self.made or said is not None)
        found = None if mask is None else self.masks.get(mask.untyped_storage().data_ptr())
        return unknown if found is None else found[1]


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
    """Return whether the first token of the first row is kept from seeing the second, which any window would reach."""
    masking = read_mask(mask, query)
    if masking.is_causal or masking.attn_mask is None:
        return masking.is_causal
    seen = masking.attn_mask[0, 0, 0, 1:2]
    return not bool(seen.all()) if seen.dtype is torch.bool else bool((seen < -1).any())


def _name(model: nn.Module) -> str:
    return type(model).__name__


class Projection:
    """Keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` of states ``[m, d]``, as an attention module computes them.

    The module is called as its model calls it for one token at position 0, where a rotary embedding does not rotate;
    each state is such a token, in a row of its own. So nothing has to be known of the module, neither the names of its
    projections nor what else it does to keys and values.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.call = (args, kwargs)
        self.running = False
        self.projected: Prefix | None = None

    def __call__(self, states: Tensor) -> Prefix:
        hidden = first_tensor(*self.call)

        def adapted(tensor: Tensor) -> Tensor:
            """The states in place of the token; the rest where and as the states are, should the model have moved."""
            if tensor is hidden:
                return states[:, None]
            return tensor.to(states if tensor.is_floating_point() else states.device)

        args, kwargs = tree_map_only(Tensor, adapted, self.call)
        self.running = True
        try:
            self.module.forward(*args, **kwargs)
        finally:
            self.running, projected, self.projected = False, self.projected, None
        if projected is None:
            raise RuntimeError(f"{type(self.module).__name__} did not call the attention interface")
        key, value = projected  # [m, Hkv, 1, D]
        return key.squeeze(2).transpose(0, 1), value.squeeze(2).transpose(0, 1)

    def prefix(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Take what the module calls its attention with; for that call there is no prefix."""
        self.projected = (key, value)

    def gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[None, None]:
        """None."""
        return None, None

    def bias(self, query: Tensor) -> None:
        """None."""


def find_projections(model: PreTrainedModel, layers: list[Layer]) -> list[Projection]:
    """The projections of attention layers, found by running the model on one token.

    Raises:
        ValueError: a layer whose keys and values are not its own projections of what enters it.
    """
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, dict(kwargs)))

    handles = [layer.module.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        find_layers(model, torch.zeros(1, 1, dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    projections = [Projection(layer.module, *calls.get(layer.module, ((), {}))) for layer in layers]
    with switched(model, {p.module: p for p in projections}), evaluated(model), torch.no_grad():
        if lost := [layer.name for layer, p in zip(layers, projections, strict=True) if not _projects(layer, p)]:
            raise ValueError(
                f"model takes one whose layers compute keys and values of what enters their attention; not: {lost}"
            )
    return projections


def _projects(layer: Layer, projection: Projection) -> bool:
    """Whether a projection gives each of two states keys and values of its own, in the layer's shapes."""
    hidden = first_tensor(*projection.call)
    if hidden is None or hidden.shape != (1, 1, layer.shape.width):
        return False
    keys, values = projection(torch.randn(2, layer.shape.width).to(hidden))
    shape = layer.shape
    return (
        keys.shape == (shape.kv_heads, 2, shape.key_size)
        and values.shape == (shape.kv_heads, 2, shape.value_size)
        and not torch.equal(keys[:, 0], keys[:, 1])
        and not torch.equal(values[:, 0], values[:, 1])
    )


_HEAD_SIZE = 8
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    *("decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"),
)
_WIDTHS = {"hidden_size", "n_embd", "d_model", "embed_dim"}
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers", "encoder_layers"}
_SMALL = {
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner"), 32),
    **dict.fromkeys(
        ("ffn_dim", "d_ff", "ffn_hidden_size", "expert_ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 32
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 16),
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"qk_rope_head_dim": _HEAD_SIZE, "qk_head_dim": 16 + _HEAD_SIZE},
    "rotary_dim": 4,
    **{"vocab_size": 128, "vocab_size_per_layer_input": 128},
}
_MOST_PARAMETERS = 300_000_000
"""A model is built as it is, where its small copy cannot be, up to here."""


def random_model(config: Any) -> PreTrainedModel | None:
    """A small copy of a model that runs; else the model itself, if it is small; else None."""
    ids = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    if config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    for variant in (shrunk, copy.deepcopy):
        try:
            candidate = variant(config)
            with torch.device("meta"):
                size = build(candidate).num_parameters()
            if size > _MOST_PARAMETERS:
                continue
            model: PreTrainedModel = build(candidate).eval()
            with torch.no_grad():
                model.base_model(**ids, use_cache=False)
        except Exception:  # whatever a family makes of sizes that it was not made for
            continue
        return model
    return None


def build(config: Any) -> PreTrainedModel:
    """A model with random weights, of the class that the configuration names, or else the one that it belongs to."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    torch.manual_seed(0)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named(config)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        model = AutoModel.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def shrunk(config: PretrainedConfig, layers: int | None = None) -> PretrainedConfig:
    """All heads, each of them narrow; few words, experts and hidden neurons.

    Args:
        config: of a model, with those of its parts; it is left alone.
        layers: how many there are at least, and one of every kind; None: all.
    """
    small = copy.deepcopy(config)
    for part in parts(small):
        _narrow(part)
        if layers is not None:
            _shorten(part, layers)
    return small


def parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PretrainedConfig):
            yield from parts(getattr(config, name))


def _narrow(config: Any) -> None:
    sizes = {name: value for name, value in vars(config).items() if type(value) is int}
    heads = next((sizes[name] for name in _HEADS if name in sizes), 1)
    for name in _WIDTHS & sizes.keys():
        setattr(config, name, heads * _HEAD_SIZE)
    for name, size in _SMALL.items():
        if name in sizes:
            setattr(config, name, min(size, sizes[name]))
    if "head_dim" in vars(config):
        config.head_dim = _HEAD_SIZE
    if sizes.get("pad_token_id", 0) >= _SMALL["vocab_size"]:
        config.pad_token_id = 0
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        config.rope_parameters = _narrow_rope(rope)


def _narrow_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Lists are as long as heads are wide; sections of a position in time and space add up to half of that."""
    half = int(_HEAD_SIZE * rope.get("partial_rotary_factor", 1.0)) // 2
    kept = {name: value for name, value in rope.items() if not isinstance(value, list)}
    scaled = {"rope_type": "default"} if len(kept) < len(rope) else {}
    return {**kept, **scaled, "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}


def _shorten(config: Any, layers: int) -> None:
    for name in _LAYERS & vars(config).keys():
        setattr(config, name, layers)
    types = list(dict.fromkeys(vars(config).get("layer_types") or ()))
    if types:
        config.num_hidden_layers = max(layers, len(types))
        config.layer_types = (types * layers)[: config.num_hidden_layers]
