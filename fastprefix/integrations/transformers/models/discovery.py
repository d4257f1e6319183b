"""Find the attention layers of a model, and build small copies of it.

Layers are found by running the model on a small input and recording which modules call the attention interface. This
needs no knowledge of the model family. The same run yields the keys and values of a text in every layer, and the keys
and values that a layer's own projections compute for states that are not tokens (LLaMA-Adapter).

A small copy has the class and configuration of a model, but narrow heads and random weights.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ....methods import METHODS, AttentionShape, MethodConfig, PrefixMethod
from ....methods.budget import read_embedding_width
from ....methods.shapes import Role
from ..sharding.fully_sharded import gathering_around, is_fully_sharded, open_root
from ..sharding.tensor_parallel import HeadSplit, find_splits
from .attention import (
    MASKS,
    Binding,
    CarriedBindings,
    Prefix,
    carrying,
    read_mask,
    run_attention,
    sees_all_of_window,
)
from .hooks import name_arguments, read_parameter_names
from .switching import (
    Inputs,
    borrow_attention,
    drop_adopted_trial,
    evaluating,
    find_device,
    find_runnable,
    is_plain_text,
    make_text_inputs,
    preserve_state,
    propose_inputs,
    run_trial,
    seed_generators,
    switch_attention,
)

_NAME = "fastprefix_probe"


@dataclass
class Layer:
    """An attention module and the tensors of its call.

    ``entry`` is the first module inside the surrounding layer that gets the residual stream exactly as it enters the
    layer, or None. A hook on the layer itself could not read that stream reliably, since gradient checkpointing may
    recompute the layer without its hooks.

    ``window`` is the sliding window, or None if the attention reaches all earlier tokens. ``local`` is True if it
    reaches another subset of the earlier tokens, such as a chunk.
    """

    name: str
    module: nn.Module
    shape: AttentionShape
    key: Tensor
    value: Tensor
    entry: nn.Module | None
    window: int | None
    local: bool
    projection: Projection | None = None  # for a method whose prefix the layer projects
    query: Tensor | None = None
    split: HeadSplit | None = None  # on a tensor-parallel model, where ``shape`` has the heads of this rank

    @property
    def whole_shape(self) -> AttentionShape:
        """Return the shape with the heads of all ranks."""
        return self.shape if self.split is None else self.split.shape


def find_layers(
    model: PreTrainedModel, input_ids: Tensor | None = None, example_inputs: Inputs | None = None
) -> list[Layer]:
    """Return the attention layers of a model in the order of their calls.

    Args:
        model: a model of any kind.
        input_ids: ids ``[1, N]`` to run a text model on. None uses the inputs of the trial of the model's attention.
        example_inputs: the caller's inputs for that trial.

    Raises:
        ValueError: if the model's attention does not go through the attention interface, or depends on more than its
            arguments.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"`model` must have attention that goes through the attention interface, but the attention of "
            f"{_get_class_name(model)} does not. Prompt methods for text models do not require it."
        )
    trial = run_trial(model, example_inputs)
    inputs = trial.inputs if input_ids is None else make_text_inputs(model, input_ids)
    trace, windows, halves = _Trace(model), _Windows(MASKS[trial.attention]), _Halves(model)
    layers: dict[nn.Module, Layer] = {}

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        entry, hidden = trace.find_entry(module)
        causal, others = _is_causal(attention_mask, query), query.shape[2] != key.shape[2]
        shape = AttentionShape(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            key_size=key.shape[3],
            value_size=value.shape[3],
            width=_find_width(model, query) if hidden is None else hidden.shape[-1],
            causal=causal,
            role="cross" if others else halves.find_role(module, causal),
        )
        window, local = windows.find(attention_mask, kwargs.get("sliding_window"))
        layer = Layer(trace.names[module], module, shape, key, value, entry, window, local, query=query)
        layers.setdefault(module, layer)
        return run_attention(module, query, key, value, attention_mask, **kwargs)

    try:
        with borrow_attention(model, _NAME, probe, windows.make_mask), trace:
            find_runnable(model)(**inputs)
    except Exception:  # the model itself may fail on inputs that its small copy accepts
        if not drop_adopted_trial(model):
            raise
        return find_layers(model, input_ids, example_inputs)
    if not layers:
        raise ValueError(
            f"`model` must have attention layers for a prefix, but {_get_class_name(model)} never called the attention "
            "interface."
        )
    found = list(layers.values())
    find_splits(model, found)
    return found


def _find_width(model: PreTrainedModel, query: Tensor) -> int:
    """Return the width of a model's embeddings, or of all heads of a layer if the model embeds no tokens."""
    try:
        return read_embedding_width(model)
    except ValueError:
        return query.shape[1] * query.shape[3]


def find_method_layers(
    model: PreTrainedModel, config: MethodConfig, example_inputs: Inputs | None = None
) -> list[Layer]:
    """Return the attention layers of a model that a prefix method applies to."""
    method_class = METHODS[config.method_name()][1]
    assert issubclass(method_class, PrefixMethod)
    layers = find_layers(model, example_inputs=example_inputs)
    return [layers[index] for index in method_class.chosen_layers(config, [layer.shape for layer in layers])]


class InputPath(NamedTuple):
    """The modules through which token ids reach the embedding of a model."""

    backbone: nn.Module
    """The outermost module that a model calls with embeddings or ids to get hidden states.

    It may be a part of ``base_model``. It is the model itself for encoder-decoders, for models with other inputs than
    text, and for models that make the masks before they call such a module.
    """
    receives_ids: bool
    """True if the model passes its ids to the backbone, rather than embeddings."""
    embeds_ids: bool
    """True if the backbone calls its embedding module with the ids that it gets, possibly followed by more ids.

    Some backbones transpose the ids (XLNet) or insert their own ids in front (CPM-Ant).
    """


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """Return the backbone of a model's ``InputPath``."""
    return find_input_path(model).backbone if is_plain_text(model) else model


def find_input_path(model: PreTrainedModel, encoder: nn.Module | None = None) -> InputPath:
    """Run a model on a few tokens up to its embedding, and return the modules that get the ids.

    Args:
        model: a text model.
        encoder: the backbone, if it is known. None finds it.

    Raises:
        ValueError: if the model does not run on ids alone.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    inside = (
        [module for module in models if "inputs_embeds" in read_parameter_names(module)]
        if encoder is None
        else [encoder]
    )
    embeddings = {module: find_embedding(module) for module in (model, *inside)}

    def read_path(calls: dict[nn.Module, ModuleCall]) -> InputPath | None:
        """Return the path, or None as long as it is not known."""
        backbone: nn.Module = model
        if inside:
            reached = next((module for module in calls if module in inside), None)
            if reached is None:
                return None
            mask = calls[reached].name_arguments(reached).get("attention_mask")
            is_plain = mask is None or (isinstance(mask, Tensor) and mask.shape == (1, _FEW))
            backbone = reached if is_plain or encoder is not None else model
        receives_ids = backbone is model or calls[backbone].name_arguments(backbone).get("input_ids") is not None
        embedding = embeddings[backbone]
        if not receives_ids or embedding is None:
            return InputPath(backbone, receives_ids, embeds_ids=False)
        if embedding not in calls:
            return None
        ids = calls[embedding].first_tensor
        embeds_ids = ids is not None and ids.ndim == 2 and ids[:, :_FEW].tolist() == few["input_ids"].tolist()
        return InputPath(backbone, receives_ids, embeds_ids)

    few = make_few_ids(model, padded=True)
    modules = [*inside, *filter(None, embeddings.values())]
    calls, error = record_calls(model, modules, lambda calls: read_path(calls) is not None, **few)
    path = read_path(calls)
    if path is None and error is not None:
        raise ValueError(
            f"`model` must run on input_ids alone, but {_get_class_name(model)} raised {type(error).__name__}: {error}"
        ) from error
    return InputPath(model, receives_ids=True, embeds_ids=False) if path is None else path


def find_embedding(module: Any) -> nn.Module | None:
    """Return the input embeddings of a model, or None if it has none, such as a vision model."""
    try:
        embedding: nn.Module | None = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding


_FEW = 8  # tokens, enough for models that pool them


def make_few_ids(model: Any, padded: bool = False, first: int | None = None) -> dict[str, Any]:
    """Return a row of a few ordinary ids as arguments of a model.

    Args:
        model: a model that reads ids.
        padded: hide the first token in the mask.
        first: the first id. None uses an ordinary id.
    """
    ids = torch.tensor([list_ordinary_ids(model.config, _FEW)], device=find_device(model))
    if first is not None:
        ids[:, 0] = first
    mask = torch.ones_like(ids)
    mask[:, 0] = 0 if padded else 1
    names = read_parameter_names(model)
    options = {name: value for name, value in (("attention_mask", mask), ("use_cache", False)) if name in names}
    return {"input_ids": ids, **options}


class ModuleCall(NamedTuple):
    """A call of a module, and its output if it has returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def first_tensor(self) -> Tensor | None:
        """Return the first tensor among the arguments."""
        return find_first_tensor(self.args, self.kwargs)

    def name_arguments(self, module: nn.Module) -> dict[str, Any]:
        """Return the arguments by the names in the signature of the module."""
        return name_arguments(read_parameter_names(module), self.args, self.kwargs)


class _Stop(Exception):  # noqa: N818 (not an error)
    """The exception that ends the run of ``record_calls`` once ``is_enough`` returns True."""


def record_calls(
    model: nn.Module,
    modules: Iterable[nn.Module],
    is_enough: Callable[[dict[nn.Module, ModuleCall]], bool],
    **inputs: Any,
) -> tuple[dict[nn.Module, ModuleCall], Exception | None]:
    """Run a model until enough is known, and record the first call of each of the given modules.

    Args:
        model: the model to run. Its state is restored afterwards.
        modules: the modules whose calls are recorded.
        is_enough: a function of the recorded calls. It is called when one of the modules is called or returns, and the
            run stops once it returns True.
        inputs: keyword arguments of the model.

    Returns:
        The calls in order, and the error that ended the run, or None.
    """
    calls: dict[nn.Module, ModuleCall] = {}
    runs_on = is_fully_sharded(model)  # FSDP2 cannot be stopped in the middle of a run

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in calls:
            calls[module] = ModuleCall(args, kwargs)
            stop_if_enough()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if calls[module].output is None:
            calls[module] = calls[module]._replace(output=output)
            stop_if_enough()

    def stop_if_enough() -> None:
        if not runs_on and is_enough(calls):
            raise _Stop

    handles: list[RemovableHandle] = []
    for module in dict.fromkeys(modules):
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    error = None
    try:
        with preserve_state(model), torch.no_grad():
            open_root(model)
            model(**inputs)
    except _Stop:
        pass
    except Exception as raised:  # whatever a family makes of such inputs
        error = raised
    finally:
        for handle in handles:
            handle.remove()
    return calls, error


def find_entry(backbone: Any, embedding: nn.Module) -> nn.Module:
    """Return the module whose output the model accepts as ``inputs_embeds``.

    That is the embedding module, or a block around it if the model's ``inputs_embeds`` skip the whole block (ESM). The
    output of each candidate is passed to the model as ``inputs_embeds``. With the correct one, the first module after
    all candidates gets the same input as with the ids.
    """
    path = next((name for name, module in backbone.named_modules() if module is embedding), "").split(".")
    around = [backbone.get_submodule(".".join(path[:count])) for count in range(len(path) - 1, 0, -1)]
    blocks = [module for module in around if not isinstance(module, PreTrainedModel)]
    if not blocks:
        return embedding
    entries: list[nn.Module] = [embedding, *blocks]
    behind = set(backbone.modules()) - {backbone, *around, *blocks[-1].modules()}

    def find_state(calls: dict[nn.Module, ModuleCall]) -> Tensor | None:
        """Return the first ``[B, N, d]`` that a module after the blocks is called with."""
        states = (call.first_tensor for module, call in calls.items() if module in behind)
        return next((each for each in states if each is not None and each.is_floating_point() and each.ndim == 3), None)

    def run(**inputs: Any) -> dict[nn.Module, ModuleCall]:
        modules = [*behind, *entries]
        return record_calls(backbone, modules, lambda calls: find_state(calls) is not None, **inputs)[0]

    calls = run(input_ids=make_few_ids(backbone)["input_ids"])
    expected = find_state(calls)
    for module in entries:
        if expected is not None and module in calls and isinstance(calls[module].output, Tensor):
            actual = find_state(run(inputs_embeds=calls[module].output))
            if actual is not None and actual.shape == expected.shape and torch.allclose(actual, expected):
                return module
    return embedding


def list_ordinary_ids(config: PretrainedConfig, count: int) -> list[int]:
    """Return token ids without a special meaning, such as padding or an image placeholder.

    The ids 0 to 2 come last, since families that do not name their padding id have it there. Ids repeat if the
    vocabulary is small.
    """
    named = [value for part in list_configs(config) for name, value in vars(part).items() if "token" in name]
    flat = (each for value in named for each in (value if isinstance(value, list | tuple) else [value]))
    special = {each for each in flat if type(each) is int}
    size = getattr(config.get_text_config(), "vocab_size", None) or 64
    ids = [each for each in (*range(3, size), *range(min(size, 3))) if each not in special]
    return list(itertools.islice(itertools.cycle(ids or [0]), count))


def find_first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first tensor among the arguments of a call. For a layer, this is the residual stream."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class _Halves:
    """The modules of an encoder-decoder's encoder, which identify the role of an attention module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.encoder = set(model.get_encoder().modules()) if model.config.is_encoder_decoder else None

    def find_role(self, module: nn.Module, causal: bool) -> Role:
        """Return the role of a self-attention. In models with one stack, causal attention is a decoder's."""
        in_decoder = causal if self.encoder is None else module not in self.encoder
        return "decoder" if in_decoder else "encoder"


class _Windows:
    """The sliding windows of the masks that are made. A view of a mask, such as a slice, has the window of the mask."""

    def __init__(self, mask_function: Any) -> None:
        self.mask_function = mask_function
        self.made = False  # True once a mask with a window was made
        self.masks: dict[
            int, tuple[Tensor, tuple[int | None, bool]]
        ] = {}  # by storage pointer, with ``window`` and ``local``

    def make_mask(self, *args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        """Make a mask and record its window."""
        mask: Tensor | None = self.mask_function(*args, local_size=local_size, **kwargs)
        if local_size is not None:
            self.made = True
        if mask is not None:
            sliding = local_size is None or sees_all_of_window(kwargs["mask_function"], local_size, mask.device)
            window = (local_size, False) if sliding else (None, True)
            self.masks[mask.untyped_storage().data_ptr()] = mask, window
        return mask

    def find(self, mask: Tensor | None, said: int | None) -> tuple[int | None, bool]:
        """Return ``window`` and ``local`` of a layer, given its mask.

        If the model has changed the mask, the window is unknown. ``said`` is the ``sliding_window`` that the layer
        passed. It only shows that a window exists, since it is meant for other kernels.
        """
        unknown = (None, self.made or said is not None)
        found = None if mask is None else self.masks.get(mask.untyped_storage().data_ptr())
        return unknown if found is None else found[1]


class _Trace:
    """A context that records the modules that are called, in order, each with its first tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[tuple[nn.Module, Tensor | None]] = []
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self.handles = [module.register_forward_pre_hook(self._record, with_kwargs=True) for module in self.names]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.calls.clear()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((module, find_first_tensor(args, kwargs)))

    def find_entry(self, attention: nn.Module) -> tuple[nn.Module | None, Tensor | None]:
        """Return the first module inside the current layer that got the input tensor of the layer, and that tensor.

        The name of the layer is the attention's qualified name up to its last number.
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
    """Return whether the mask hides the second token from the first one in the first row. A window never does so."""
    masking = read_mask(mask, query)
    if masking.is_causal or masking.attn_mask is None:
        return masking.is_causal
    seen = masking.attn_mask[0, 0, 0, 1:2]
    return not bool(seen.all()) if seen.dtype is torch.bool else bool((seen < -1).any())


def _get_class_name(model: nn.Module) -> str:
    return type(model).__name__


class Projection:
    """A function that returns keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` of states ``[m, d]``.

    An attention module computes them. It is called like its model calls it for one token at position 0, where a rotary
    embedding does not rotate. Each state is such a token in its own row. So this needs no knowledge of the module, such
    as the names of its projections or other operations on keys and values.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.call = (args, kwargs)

    def __call__(self, states: Tensor, binding: Binding | None = None) -> Prefix:
        """Return the keys and values of states, for the same heads as those of the layer's ``binding``."""
        hidden = find_first_tensor(*self.call)

        def adapt(tensor: Tensor) -> Tensor:
            """Replace the token by the states, and move other tensors to the states' device and dtype.

            The model may have been moved since the call was recorded.
            """
            if tensor is hidden:
                return states[:, None]
            return tensor.to(states if tensor.is_floating_point() else states.device)

        args, kwargs = tree_map_only(Tensor, adapt, self.call)
        capture = _Capture(binding)
        with carrying(CarriedBindings({self.module: capture})):
            self.module.forward(*args, **kwargs)
        if capture.projected is None:
            raise RuntimeError(f"{type(self.module).__name__} did not call the attention interface.")
        key, value = capture.projected  # [m, Hkv, 1, D]
        return key.squeeze(2).transpose(0, 1), value.squeeze(2).transpose(0, 1)


class _Capture(Binding):
    """The binding of an attention module in place of its own ``binding`` while the module projects states."""

    def __init__(self, binding: Binding | None) -> None:
        if binding is not None:
            self.heads, self.index = binding.heads, binding.index
        self.projected: Prefix | None = None

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Record the keys and values that the module passes to its attention, and return no prefix."""
        self.projected = (key, value)


def find_projections(model: PreTrainedModel, layers: list[Layer]) -> list[Projection]:
    """Find the projections of attention layers by running the model on one token.

    Raises:
        ValueError: if the keys and values of a layer are not its own projections of its input.
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
    around = gathering_around(model, [projection.module for projection in projections])
    with switch_attention(model, {}), evaluating(model), torch.no_grad(), around:
        if lost := [layer.name for layer, p in zip(layers, projections, strict=True) if not _projects(layer, p)]:
            raise ValueError(
                "`model` must have layers that compute keys and values from the input of their attention, but these "
                f"do not: {lost}."
            )
    return projections


def _projects(layer: Layer, projection: Projection) -> bool:
    """Return whether a projection gives two states different keys and values in the layer's shapes."""
    hidden = find_first_tensor(*projection.call)
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


_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    *("decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"),
    *("num_decoder_attention_heads", "decoder_num_attention_heads", "encoder_num_attention_heads"),
    *("swa_num_attention_heads", "num_sliding_attention_heads"),
)
_KEY_VALUE_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads"),
    *("encoder_num_key_value_heads", "decoder_num_key_value_heads", "num_global_key_value_heads"),
)
_HEAD_SIZES = ("head_dim", "d_kv", "d_head", "swa_head_dim", "global_head_dim", "attention_head_dim")
_STATES = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("num_heads", "head_dim", "expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
)
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim_model")
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "layers", "num_decoder_layers"),
    *("decoder_layers", "encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"),
    *("decoder_num_hidden_layers", "speech_encoder_layers", "conf_num_hidden_layers"),
)
_WIDTH_NAME = re.compile(
    r"(^|_)(hidden_size|hidden_size_global|hidden_dim|embed_dim|embedding_dim|embedding_size|d_model|projection_dim|"
    r"projection_size|upsample_groups|in_channels|output_dim|input_dim)$|^(adapter|projector)_\w*(dim|size)$"
)
"""The names of widths that depend on another option."""
_SMALL = {
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(
        ("ffn_dim", "d_ff", "ffn_hidden_size", "expert_ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 32
    ),
    **dict.fromkeys(("moe_hidden_size", "projector_hidden_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 16),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 16),
    **{"linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_num_heads": 8},
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "rotary_dim": 4},
    **{"base_channels": 32, "num_embeddings": 128, "codebook_size": 128, "num_filters": 4},
    **{"encoder_hash_byte_group_vocab": 128, "cross_attn_k": 1, "num_queries": 16, "latent_query_num": 4},
}
_DEFAULT_SECTIONS = re.compile(r"get\(\"mrope_section\", \[([\d, ]+)\]")
_VOCABULARY = 128
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size")
_TOKEN_NAME = re.compile(r"_token_ids?$|_token_index$|^eos_token_id$|_token_indices$")
_WINDOWS = (
    *("sliding_window", "sliding_window_size", "local_attention", "attention_window_size", "window_size"),
    "attention_chunk_size",
)
"""The names of text windows in configurations with a vocabulary. In others, they are windows of pixels or frames."""
WINDOW = 4
"""The sliding windows and chunks of a small copy, in tokens."""
CONTEXT = 16
"""The original context of a small copy whose rotary embedding changes beyond it, in tokens."""
_POSITIONS = 512
_SOUND = 16
"""The number of audio positions of a small copy."""
_FRAMES = 4
"""The number of video frames of a small copy."""
_GRID, _PIXELS = 4, 64
"""The side length of a small copy's images, in patches, or in pixels if the model has no patches."""
_LAYER_KINDS = {"layer_types", "layers_block_type"}
_PATTERN = "block_types"
"""The name of a list of kinds that repeats over the layers."""
_FLAGGED_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""The names of the number of leading layers that are of another kind."""
_PERIOD_NAME = re.compile(r"(period|interval|every_n\w*|_step|_pattern|layer_group_size|inner_group_num)$")
_LAYER_INDICES_NAME = re.compile(r"(?<!out_)(idxs|indexes|indices|layer_ids|_layers|_blocks)$")
_LAYER_SOURCES_NAME = re.compile(r"source_layers$")
_MOST_KINDS = 8
_MOST_PARAMETERS = 100_000_000
"""The largest number of parameters of a small copy."""


@dataclass(frozen=True)
class _Scale:
    """The size of a small copy. None keeps the size of the model."""

    head_size: int | None
    heads: int | None
    fewer_layers: bool
    small_signals: bool = False
    """Make images and audio small."""
    of_each: int = 1
    """The number of layers of each kind, if ``fewer_layers`` is True."""


_SCALES = (
    *(_Scale(16, 4, True, small_signals=True), _Scale(16, 4, True), _Scale(16, 4, True, of_each=2)),
    *(_Scale(8, None, True), _Scale(None, None, True), _Scale(None, None, False)),
)


class CopyError(ValueError):
    """Raised if no small copy of a model can be built, or if it can be built (``built``) but does not run."""

    def __init__(self, built: bool, error: BaseException | None) -> None:
        why = "" if error is None else f": {type(error).__name__}: {error}"
        super().__init__(f"a small copy of the model {'does not run' if built else 'cannot be built'}{why}")
        self.built = built


def make_small_copy(
    config: PretrainedConfig,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
) -> PreTrainedModel:
    """Return the smallest copy of a model that runs on some input, with random weights.

    Args:
        config: the configuration of the model. It is not changed.
        model_class: the class of the model. None uses the class that the configuration names.
        dtype: the dtype of the copy.
        whole: keep all layers, and the lengths of windows and contexts.

    Raises:
        CopyError: if every copy is too large, or none runs on the inputs that its configuration suggests.
    """
    failures: list[CopyError] = []
    for scale in _SCALES:
        built = False
        try:
            candidate = shrink_config(config, scale, whole)
            if scale.head_size is not None:
                _add_sections(candidate, model_class, scale.head_size)
            with torch.device("meta"):
                size = build_model(candidate, model_class).num_parameters()
            if size > _MOST_PARAMETERS:
                raise ValueError(f"the copy still has {size:,} parameters")
            model: PreTrainedModel = randomize(build_model(candidate, model_class)).eval()
            nn.Module.to(model, dtype)
            built = True
            find_running_inputs(model)
            return model
        except Exception as error:  # families check for sizes that they do not support
            failures.append(CopyError(built, error))
    raise next((failure for failure in failures if failure.built), failures[0])


def find_running_inputs(model: PreTrainedModel) -> Inputs:
    """Return the first small inputs on which a model runs.

    Raises:
        Exception: the error for the first inputs, if the model runs on none.
    """
    failures: list[Exception] = []
    for inputs in propose_inputs(model):
        try:
            with preserve_state(model), torch.no_grad():
                find_runnable(model)(**inputs)
        except Exception as error:  # any error that the family raises on such inputs
            failures.append(error)
        else:
            return inputs
    raise failures[0] if failures else ValueError("no suitable inputs are known for the model")


def build_model(config: Any, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Build a model with random weights, of the given class or the class for the configuration."""
    named = getattr(transformers, (config.architectures or [""])[0], None) if model_class is None else model_class
    seed_generators()
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named(config)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        model = AutoModel.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Add noise to biases, scales and gates of a model, so that an initial 0 or 1 does not hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.1 * noise).to(parameter))
    return model


def shrink_config(config: PretrainedConfig, scale: _Scale = _SCALES[0], whole: bool = False) -> PretrainedConfig:
    """Return a small copy of a configuration and of those inside it.

    The copy keeps the structure of the model: the type of rotary embedding, every kind of layer, shared keys and
    values, and special tokens. Widths, vocabularies, windows and contexts are scaled down. If ``whole`` is True,
    windows, contexts and the number of layers are kept.
    """
    small = copy.deepcopy(config)
    every = list(list_configs(small))
    widths: dict[int, int] = {}
    for part in sorted(every, key=_is_headless):
        if scale.head_size is not None:
            widths |= _narrow(part, scale.head_size, scale.heads, widths)
    for part in every:
        if not whole:
            _scale_positions(part)
        if scale.fewer_layers and not whole:
            _shorten(part, scale.of_each)
        if scale.small_signals and not whole:
            _shrink_signals(part)
        _calm(part)
    for part in every:
        for name, value in list(vars(part).items()):
            if name in _WIDTHS or not _WIDTH_NAME.search(name):
                continue
            if type(value) is int:
                setattr(part, name, _narrow_width(value, widths))
            elif _is_list_of_sizes(value) and widths.keys() >= set(value):
                setattr(part, name, [widths[each] for each in value])
    _limit_vocabulary(every)
    return small


def list_configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PretrainedConfig):
            yield from list_configs(getattr(config, name))


def _read_sizes(config: Any) -> dict[str, int]:
    return {name: value for name, value in vars(config).items() if type(value) is int}


def _is_headless(config: Any) -> bool:
    """Return whether a configuration has no number of heads, so that its width depends on another part."""
    return not _read_sizes(config).keys() & set(_HEADS)


def _narrow(config: Any, head_size: int, heads: int | None, known: dict[int, int]) -> dict[int, int]:
    """Reduce the size and number of heads. Return a new width for each old one, given ``known`` ones of other parts."""
    sizes = _read_sizes(config)
    known = known if _is_headless(config) else {}
    before = next((sizes[name] for name in _HEADS if name in sizes), 1)
    head_dim = sizes.get("head_dim") or next((sizes[name] // before for name in _WIDTHS if name in sizes), head_size)
    after = before if heads is None else min(before, heads)
    for name in _HEADS:
        if name in sizes:
            setattr(config, name, sizes[name] if heads is None else min(sizes[name], heads))
    for name in _KEY_VALUE_HEADS:
        if name in sizes and heads is not None:
            grouped = 1 if sizes[name] == 1 else max(after // 2, 1)
            setattr(config, name, after if sizes[name] >= before else grouped)
    widths = {size: known.get(size, after * head_size) for name in _WIDTHS if (size := sizes.get(name))}
    for name in _WIDTHS:
        if sizes.get(name):
            setattr(config, name, widths[sizes[name]])
    for name, size in _SMALL.items():
        if name in sizes:
            setattr(config, name, min(size, sizes[name]))
        elif _is_list_of_sizes(vars(config).get(name)):
            setattr(config, name, [min(size, value) for value in vars(config)[name]])
    for name in _HEAD_SIZES:
        if name in sizes or (name == "head_dim" and name in vars(config)):
            setattr(config, name, head_size)
    _narrow_states(config, head_size)
    _narrow_latent(config, sizes, head_size)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := vars(config).get(name), dict):
            setattr(config, name, _narrow_rope(rope, head_size, head_dim))
    return widths


def _narrow_latent(config: Any, sizes: dict[str, int], head_size: int) -> None:
    """Set the head dimensions of a latent attention, which rotates only one part of the columns."""
    if "qk_rope_head_dim" in sizes:
        config.qk_rope_head_dim = head_size
    whole = min(_SMALL["qk_nope_head_dim"], sizes.get("qk_nope_head_dim", 0)) + head_size
    if "qk_head_dim" in sizes:
        config.qk_head_dim = whole
    if sizes.get("head_dim", 0) == sizes.get("qk_nope_head_dim", 0) + sizes.get("qk_rope_head_dim", 0) > 0:
        config.head_dim = whole
        for rope in _list_ropes(vars(config).get("rope_parameters")):
            if "partial_rotary_factor" in rope:
                rope["partial_rotary_factor"] = head_size / whole


def _narrow_width(width: int, widths: dict[int, int]) -> int:
    """Return the new width for an old width, or for two or four concatenated old widths. Keep other widths."""
    counts = (count for count in (1, 2, 4) if width % count == 0 and width // count in widths)
    count = next(counts, None)
    return width if count is None else count * widths[width // count]


def _narrow_states(config: Any, head_size: int) -> None:
    """Set the heads of a state-space layer, which together are ``expand`` times as wide as the hidden size."""
    for heads, size, expand in _STATES:
        sizes = _read_sizes(config)
        factor = vars(config).get(expand)
        if heads in sizes and size in sizes and isinstance(factor, int | float) and "hidden_size" in sizes:
            setattr(config, size, head_size)
            setattr(config, heads, max(int(factor * config.hidden_size) // head_size, 1))
            if "mamba_d_ssm" in sizes:
                config.mamba_d_ssm = getattr(config, heads) * head_size
            for groups in {"n_groups", "mamba_n_groups", "mamba_ngroups"} & sizes.keys():
                setattr(config, groups, 1)


def _is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(each) is int for each in value)


def _narrow_rope(rope: dict[str, Any], head_size: int, former: int) -> dict[str, Any]:
    """Shorten the lists of the rotary embedding, or of one per layer type, to the size of the heads.

    A list of factors has one factor for each pair of columns. Its first and last factors are kept. The sections of
    positions in time and space add up to the number of pairs.
    """
    if any(isinstance(value, dict) for value in rope.values()):
        return {k: _narrow_rope(v, head_size, former) if isinstance(v, dict) else v for k, v in rope.items()}
    partial = rope.get("partial_rotary_factor") or 1.0
    pairs, small = dict(rope), max(int(head_size * partial) // 2, 1)
    for name, value in rope.items():
        if not isinstance(value, list | tuple) or len(value) < 2:
            continue
        if "section" in name:
            pairs[name] = _split_sections(list(value), small)
        elif name.endswith("factor"):
            pairs[name] = [value[round(i * (len(value) - 1) / max(small - 1, 1))] for i in range(small)]
    return pairs


def _split_sections(sections: list[int], pairs: int) -> list[int]:
    """Return sections of about the same proportions that add up to the number of pairs."""
    total = sum(sections)
    small = [max(pairs * section // total, 1 if section else 0) for section in sections]
    single = next((i for i, section in enumerate(sections) if sections.count(section) == 1), 0)  # equal ones stay equal
    small[single] += pairs - sum(small)
    return small if small[single] > 0 else [pairs, *(0 for _ in sections[1:])]


def _add_sections(config: Any, model_class: type[PreTrainedModel] | None, head_size: int) -> None:
    """Set the sections of positions in time and space if the family's code has defaults for one head dimension only."""
    modules = {each.__module__ for each in (model_class, *map(type, list_configs(config))) if each is not None}
    names = {module.replace(".configuration_", ".modeling_") for module in modules}
    sources = [source for name in sorted(names) if "mrope_section" in (source := _read_source(name))]
    if not sources:
        return
    found = next(filter(None, map(_DEFAULT_SECTIONS.search, sources)), None)
    sections = [2, 3, 3] if found is None else [int(each) for each in found.group(1).split(",")]
    for part in list_configs(config):
        for rope in _list_ropes(vars(part).get("rope_parameters")):
            if "rope_theta" in rope and "mrope_section" not in rope:
                pairs = int(head_size * (rope.get("partial_rotary_factor") or 1.0)) // 2
                rope["mrope_section"] = _split_sections(sections, pairs)


def _read_source(module: str) -> str:
    """Return the source code of a module, or "" if it cannot be read."""
    try:
        return inspect.getsource(importlib.import_module(module))
    except (ImportError, OSError):
        return ""


def _scale_positions(config: Any) -> None:
    """Scale windows, chunks and contexts down, so that short inputs exceed them."""
    sizes = _read_sizes(config)
    for name in _WINDOWS:
        if "vocab_size" in sizes and sizes.get(name, 0) > WINDOW:
            setattr(config, name, WINDOW)
    if _is_list_of_sizes(windows := vars(config).get("attention_window")):
        config.attention_window = [min(window, WINDOW) for window in windows]
    ropes = [rope for name in ("rope_parameters", "rope_scaling") for rope in _list_ropes(vars(config).get(name))]
    limit = sizes.get("max_position_embeddings")
    originals = {rope.get("original_max_position_embeddings") for rope in ropes}
    originals |= {sizes.get("original_max_position_embeddings")}
    original = next((each for each in originals if each), None)
    if any("dynamic" in str(rope.get("rope_type")) for rope in ropes):
        original = limit
    if not original or not ropes:
        return
    for rope in ropes:
        if rope.get("original_max_position_embeddings"):
            rope["original_max_position_embeddings"] = CONTEXT
    if "original_max_position_embeddings" in sizes:
        config.original_max_position_embeddings = CONTEXT
    if limit:
        config.max_position_embeddings = max(CONTEXT * limit // original, CONTEXT)


def _shrink_signals(config: Any) -> None:
    """Make images and audio small, since they would otherwise have far more positions than the text."""
    sizes = _read_sizes(config)
    if sizes.get("max_source_positions", 0) > _SOUND:
        config.max_source_positions = _SOUND
    side = _GRID * sizes["patch_size"] if "patch_size" in sizes else _PIXELS
    for name in ("image_size", "crop_size"):
        if sizes.get(name, 0) > side:
            setattr(config, name, side)
    if "image_embedding_size" in sizes and "patch_size" in sizes:
        config.image_embedding_size = config.image_size // config.patch_size
    for name in ("num_frames", "frames_per_clip"):
        if "patch_size" in vars(config) and sizes.get(name, 0) > _FRAMES:
            setattr(config, name, _FRAMES)


def _list_ropes(rope: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary embeddings in an option, which holds one embedding or one per layer type."""
    if isinstance(rope, dict):
        inside = [value for value in rope.values() if isinstance(value, dict)]
        yield from inside or [rope]


def _calm(config: Any) -> None:
    """Remove randomness between runs, and choose initial weights large enough to reveal errors."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    if isinstance(vars(config).get("initializer_range"), float):
        config.initializer_range = 0.2
    for name in ("mask_time_prob", "mask_feature_prob"):  # masking of audio during training
        if vars(config).get(name):
            setattr(config, name, 0.0)
    config._experts_implementation = "eager"  # the other implementations do not support float64
    if vars(config).get("quantization_config") is not None:
        del config.quantization_config
    if isinstance(positions := vars(config).get("max_position_embeddings"), int):
        config.max_position_embeddings = min(positions, _POSITIONS)


def _shorten(config: Any, of_each: int) -> None:
    """Keep ``of_each`` layers of every kind, and at least two layers in total."""
    sizes = _read_sizes(config)
    names = [name for name in _LAYERS if sizes.get(name, 0) > 1]
    if not names and _LAYER_KINDS & vars(config).keys():
        counts = {len(kinds) for name in _LAYER_KINDS if (kinds := vars(config).get(name))}
        for count in counts:
            _shorten_to_kinds(config, count, [], of_each)
    for count in {sizes[name] for name in names}:
        _shorten_to_kinds(config, count, [name for name in names if sizes[name] == count], of_each)


def _shorten_to_kinds(config: Any, count: int, names: list[str], of_each: int) -> None:
    """Shorten the options of a configuration that describe ``count`` layers."""
    values = vars(config)
    lists = {n: v for n, v in values.items() if isinstance(v, list | tuple) and len(v) == count and count > 2}
    sources = {n: v for n, v in lists.items() if _LAYER_SOURCES_NAME.search(n)}
    indices = {
        name: value
        for name, value in values.items()
        if name not in lists
        and _LAYER_INDICES_NAME.search(name)
        and _is_list_of_sizes(value)
        and max(value) <= count
        and min(value) >= 0
    }
    counts = {n: values[n] for n in _FLAGGED_COUNTS if type(values.get(n)) is int}
    pattern = values.get(_PATTERN)
    shared = values.get("num_kv_shared_layers") or 0

    def describe_kind(layer: int) -> str:
        told = [value[layer] for name, value in lists.items() if name not in sources]
        told += [value[layer] == layer for value in sources.values()]
        told += [layer in value for value in indices.values()]
        told += [layer < value for value in counts.values()]
        told += [pattern[layer % len(pattern)]] if pattern else []
        return repr([*told, layer >= count - shared])

    kinds: dict[str, list[int]] = {}
    for layer in range(count):
        kinds.setdefault(describe_kind(layer), []).append(layer)
    chosen = {layer for layers in list(kinds.values())[:_MOST_KINDS] for layer in layers[:of_each]}
    periods = [v for n, v in values.items() if type(v) is int and 1 < v <= count and _PERIOD_NAME.search(n)]
    if periods and not _LAYER_KINDS & lists.keys():
        chosen |= set(range(min(max(periods), count)))
    for source in sources.values():
        chosen |= {source[layer] for layer in chosen if type(source[layer]) is int and 0 <= source[layer] < count}
    chosen |= set(range(min(2, count))) if len(chosen) < 2 else set()
    kept = sorted(chosen)
    place = {layer: index for index, layer in enumerate(kept)}
    for name, value in lists.items():
        setattr(config, name, [value[layer] for layer in kept])
    for name, value in sources.items():
        setattr(config, name, [place.get(value[layer], value[layer]) for layer in kept])
    for name, value in indices.items():
        setattr(config, name, [place[layer] for layer in value if layer in place])
    for name, value in counts.items():
        setattr(config, name, sum(layer < value for layer in kept))
    if pattern:
        setattr(config, _PATTERN, [pattern[layer % len(pattern)] for layer in kept])
    if shared:
        config.num_kv_shared_layers = sum(layer >= count - shared for layer in kept)
    for name in names:
        setattr(config, name, len(kept))


def _limit_vocabulary(configs: list[Any]) -> None:
    """Reduce the vocabulary, and give each special token an id within it, the same in every part."""
    limits = [value for part in configs for name in _VOCABULARIES if type(value := vars(part).get(name)) is int]
    least = min([_VOCABULARY, *(limit for limit in limits if limit > 1)])
    named = [(part, name, value) for part in configs for name, value in vars(part).items() if _TOKEN_NAME.search(name)]
    ids = {each for _, _, value in named for each in (value if isinstance(value, list | tuple) else [value])}
    known = {each for each in ids if type(each) is int and each >= 0}
    free = (each for each in range(least - 1, -1, -1) if each not in known)
    places = {each: each if each < least else next(free) for each in sorted(known)}
    for part, name, value in named:
        if isinstance(value, list | tuple):
            setattr(part, name, [places.get(each, each) for each in value])
        else:
            setattr(part, name, places.get(value, value))
    for part in configs:
        words = vars(part).get("vocabulary_map")
        if isinstance(words, dict) and words:
            part.vocabulary_map = _choose_words(words, places, least)
        for name in _VOCABULARIES:
            if type(size := vars(part).get(name)) is int:
                setattr(part, name, min(size, _VOCABULARY))


def _choose_words(words: dict[str, int], places: dict[int, int], count: int) -> dict[str, int]:
    """Return evenly spaced words of a vocabulary and all special ones, with ids below ``count``."""
    step = max(max(words.values()) // count + 1, 1)
    taken = set(places.values())
    few = {word: each // step for word, each in words.items() if each % step == 0 and each // step not in taken}
    return few | {word: places[each] for word, each in words.items() if each in places}
