"""Run a model on another attention function, and restore it afterwards.

A trial decides whether this package's attention can replace a model's own. A model may merge masks, crop them, or pass
arguments that only its own attention knows. So the trial runs the model twice on a few tokens, including padding: first
with its own eager attention over the masks that SDPA would get, then with this package's attention. In the second run,
the result of every attention call is replaced by the result of the first run. So both attentions get the same inputs in
every call, and rounding errors do not accumulate. Attention calls run in float64, so that rounding errors are far
smaller than the effect of a lost mask or argument.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from ..sharding.fully_sharded import recover, reshard
from .attention import (
    BINDING,
    FULL_MASKS,
    MASKS,
    NAME,
    Binding,
    find_eager_attention,
    is_ours,
    make_additive,
    make_full_mask,
    run_attention,
)
from .hooks import read_parameter_names

_LOCK = threading.RLock()  # hooks of users may call this package while a model runs in a trial


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of a model and of parts with a copy of its configuration (T5's encoder and decoder).

    Older ``transformers`` versions skip those parts.
    """
    model.set_attn_implementation(name)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part.config) is type(model.config):
            part.config._attn_implementation_internal = name


@contextmanager
def borrow_attention(model: PreTrainedModel, name: str, function: Any, mask: Any) -> Iterator[None]:
    """Run a model on another attention and mask function in this context, without gradients and one model at a time."""
    with _LOCK, preserve_state(model), replace_attention(model, name, function, mask), torch.no_grad():
        yield


@contextmanager
def replace_attention(model: PreTrainedModel, name: str, function: Any, mask: Any) -> Iterator[None]:
    """Register an attention and a mask function under a name, and run a model on them in this context.

    Contexts may be nested, also with the same name.
    """
    before = [(config, config._attn_implementation) for config in list_configurations(model)]
    mappings = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    former = [mapping.get(name) for mapping in mappings]
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)
    try:
        set_attention(model, name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for mapping, registered in zip(mappings, former, strict=True):
            if registered is None:
                del mapping[name]
            else:
                mapping[name] = registered


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode in this context, and restore its modules afterwards.

    All changes that calls made to attributes of the modules are undone, such as the positions that Qwen-VL stores.
    The contents of containers are restored in place, since handles of hooks refer to the containers. For example, the
    first call makes ``transformers`` install its output-capturing hooks and set an attribute. Both must be restored
    together.
    """
    reshard(model)
    before = [(module, dict(vars(module)), _copy_contents(vars(module), [])) for module in model.modules()]
    try:
        with evaluating(model):
            yield
    except BaseException:
        recover(model)
        raise
    finally:
        reshard(model)
        for module, attributes, contents in before:
            _refill(vars(module), attributes)
            for container, content in contents:
                _refill(container, content)


_Container = dict[Any, Any] | list[Any] | set[Any]
_Copies = list[tuple[_Container, _Container]]


def _copy_contents(container: _Container, copies: _Copies) -> _Copies:
    """Append all containers inside a container to ``copies``, each with a copy of its contents."""
    for value in container.values() if isinstance(container, dict) else container:
        if isinstance(value, (dict, list, set)):  # a tuple, since a union of types is twice as slow
            copies.append((value, value.copy()))
            if value:
                _copy_contents(value, copies)
    return copies


def _refill(container: _Container, content: _Container) -> None:
    """Restore the former content of a container if it has changed."""
    if isinstance(container, list):
        container[:] = content
    elif container != content if isinstance(container, set) else not _is_same(container, content):
        container.clear()
        container.update(content)


def _is_same(first: dict[Any, Any], second: Any) -> bool:
    """Return whether two dictionaries hold the same objects in the same order."""
    return (
        len(first) == len(second)
        and all(map(operator.is_, first, second))
        and all(map(operator.is_, first.values(), second.values()))
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode in this context. Afterwards, restore all modes and the random state.

    The random state is that of the CPU and of the model's devices.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with preserve_random_state(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def list_generators(model: nn.Module | None = None) -> list[torch.Generator]:
    """Return the random generators of the CPU, of PyTorch's default device and of the devices of a model."""
    parameters = () if model is None else model.parameters()
    devices = {torch.get_default_device(), *(parameter.device for parameter in parameters)}
    found = [torch.default_generator]
    for device in devices:
        if generators := getattr(getattr(torch, device.type, None), "default_generators", ()):
            found.append(generators[device.index])
    return found


@contextmanager
def preserve_random_state(model: nn.Module | None = None) -> Iterator[None]:
    """Restore the random state of the generators that ``list_generators`` returns after this context."""
    states = [(generator, generator.get_state()) for generator in list_generators(model)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def seed_generators(model: nn.Module | None = None) -> None:
    """Seed the generators that ``preserve_random_state`` restores. ``torch.manual_seed`` would seed every device."""
    for generator in list_generators(model):
        generator.manual_seed(0)


def find_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model runs on.

    That is the device of its weights, or the device that accelerate loads offloaded weights to.
    """
    device: torch.device = model.device
    if device.type == "meta":
        for module in model.modules():
            for each in _list_accelerate_hooks(module):
                execution_device = getattr(each, "execution_device", None)
                if execution_device is not None:
                    return torch.device(execution_device)
    return device


def _list_accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks that accelerate has on a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def loads_all_inside(module: nn.Module) -> bool:
    """Return whether accelerate loads the weights of all modules inside a module by their names at offloading."""
    return any(
        getattr(hook, "offload", False) and getattr(hook, "place_submodules", False)
        for hook in _list_accelerate_hooks(module)
    )


@contextmanager
def load_offloaded(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Make the weights of a module of a model readable in this context, if accelerate has offloaded them.

    The hooks of the modules around it run too, since one of them may load the weights of all modules inside it.
    """
    with ExitStack() as stack:
        for around in model.modules():
            hook = getattr(around, "_hf_hook", None)
            if hook is not None and any(inside is module for inside in around.modules()):
                hook.pre_forward(around)
                stack.callback(hook.post_forward, around, None)
        yield


Inputs = Mapping[str, Any]
"""The keyword arguments of a model."""

_ROWS, _TOKENS, _PADDING = 2, 6, 2
_FRAMES = 64  # of audio, if a model accepts any number
_IMAGE = 64  # pixels on a side, if a model accepts any
_SPECTRUM = 80
_SIDE = 4  # patches on a side, if a model accepts patches
_IMAGES = 2  # per row, if a model accepts several

_IMAGE_SIZES = ("image_size", "crop_size")
_VIDEO_LENGTHS = ("num_frames", "frames_per_clip")
_SPECTRUM_SIZES = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size")
"""The names of the number of mel bins in configurations."""


def is_of_text(model: PreTrainedModel) -> bool:
    """Return whether a model's input is token ids."""
    return str(model.main_input_name) == "input_ids"


def is_plain_text(model: PreTrainedModel) -> bool:
    """Return whether a model's input is token ids in a single sequence."""
    return is_of_text(model) and not model.config.is_encoder_decoder


def find_runnable(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that runs on its input, without a head if possible.

    An FSDP2 model runs as a whole, since its root gathers the parameters outside of its layers.
    """
    if isinstance(model, FSDPModule):
        return model
    base: nn.Module = model.base_model
    return base if str(model.main_input_name) in inspect.signature(base.forward).parameters else model


def make_text_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
    """Return inputs with ids ``[B, N]`` for a text model.

    The decoder of an encoder-decoder gets fewer ids than the encoder, so that cross-attention can be recognized.
    """
    ids = input_ids.to(find_device(model))
    if model.config.is_encoder_decoder:
        return {"input_ids": _end_rows(model, ids), **_make_decoder_inputs(model, len(ids))}
    return {"input_ids": ids, "use_cache": False}


def propose_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield small inputs on which a model may run, the most informative first.

    The first inputs contain only the main input, with padding first for text. Inputs of all known sizes follow.
    """
    ids = _make_tokens(model)
    if is_of_text(model):
        inputs = make_text_inputs(model, ids)
        mask = torch.ones_like(inputs["input_ids"])
        mask[-1, :_PADDING] = 0
        yield {**inputs, "attention_mask": mask}
        yield inputs
    else:
        decoder = _make_decoder_inputs(model, 1) if model.config.is_encoder_decoder else {}
        main = str(model.main_input_name)
        for shape in _propose_shapes(model, main):
            yield {main: _make_noise(model, (1, *shape)), **decoder}
    together: dict[str, Any] = {"input_ids": ids}
    for name in ("pixel_values", "pixel_values_videos", "input_features", "input_values"):
        first = next(_propose_shapes(model, name), None)
        if first is not None and name in read_parameter_names(find_runnable(model)):
            together[name] = _make_noise(model, (_ROWS, *first))
    if model.config.is_encoder_decoder:
        together |= _make_decoder_inputs(model, _ROWS)
    yield together
    if not is_of_text(model) and "input_ids" in read_parameter_names(find_runnable(model)):
        yield make_text_inputs(model, ids)
    yield from _propose_required(model)


def _propose_required(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield all required inputs whose meaning is known by name, then also those that may be required.

    Each appears in several forms, such as images as patches and as pixels.
    """
    parameters = inspect.signature(find_runnable(model).forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    demanded = {p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds}
    names = {p.name for p in parameters}
    least = demanded | ((_HELPFUL | {str(model.main_input_name)}) & names)
    decoder = _make_decoder_inputs(model, _ROWS) if model.config.is_encoder_decoder else {}
    for wanted, second in itertools.product((least, least | (_MODALITIES & names)), (False, True)):
        for form in _propose_forms(model, second):
            made = {name: _make_input(model, name, form) for name in sorted(wanted)}
            if made and None not in made.values():
                yield {**made, **decoder}
            if not any("input_features" in name for name in made):
                break


_HELPFUL = {"bbox", "grid_thw", "input_features_mask", "feature_attention_mask", "pixel_position_ids"}
_MODALITIES = {
    *("input_ids", "pixel_values", "input_features", "input_values", "image_attention_mask", "pixel_attention_mask"),
    *("spatial_shapes", "target_sizes", "future_values", "future_time_features", "encoder_hidden_states"),
    "image_embeds_position_mask",
    *("states", "actions", "rewards", "returns_to_go", "timesteps"),
}
"""Inputs that a model may need, although its signature has a default for them."""


class _Form(NamedTuple):
    """The form of inputs: the shape of a row of audio, its number of frames, and whether inputs have a second form.

    In the second form, boxes are fractions of a page, a row has several images, and audio has a channel dimension.
    """

    sound: tuple[int, ...]
    frames: int
    second: bool


def _propose_forms(model: PreTrainedModel, second: bool) -> Iterator[_Form]:
    """Yield the possible forms of inputs."""
    frames = _count_frames(model.config)
    spectra = list(
        dict.fromkeys((*_list_spectra(model.config), _SPECTRUM, 4 * _SPECTRUM, 128))
    )  # also of four stacked frames
    sounds = [*_propose_shapes(model, "input_features")]
    sounds += [shape for spectrum in spectra for shape in ((frames, spectrum), (spectrum, frames))]
    for sound in dict.fromkeys(sounds):
        length = sound[0] if sound[1] in spectra else sound[1]
        yield _Form(sound, length, second)
        if second:
            yield _Form((1, *sound), length, second)


def propose_images(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yield small images, as patches or pixels, for a model that reads images and text."""
    base: Any = model.base_model
    names = inspect.signature(base.get_image_features).parameters
    size = functools.partial(_find_size, model.config)
    patch = size("patch_size") or 1
    if "image_grid_thw" in names and isinstance(patch, int):
        pixels = (size("in_channels", "num_channels") or 3) * (size("temporal_patch_size") or 1) * patch**2
        yield {
            "pixel_values": _make_noise(model, (_SIDE**2, pixels)),
            "image_grid_thw": torch.tensor([[1, _SIDE, _SIDE]], device=model.device),
        }
    for shape in _propose_shapes(model, "pixel_values"):
        yield {"pixel_values": _make_noise(model, (1, *shape))}


def _make_input(model: PreTrainedModel, name: str, form: _Form) -> Tensor | None:
    """Return a small input for an argument name, or None if the name is unknown."""
    size = functools.partial(_find_size, model.config)
    names = read_parameter_names(find_runnable(model))
    patch = size("patch_size") or 1
    patch = patch if isinstance(patch, int) else patch[-1]
    channels, times = (
        size("num_channels", "in_channels", "in_chans") or 3,
        size("temporal_patch_size", "patch_temporal"),
    )
    pixels = channels * (times or 1) * patch**2
    sound, frames, lags = form.sound, form.frames, max(size("lags_sequence") or [0])
    width, history = size("hidden_size", "d_model") or 1, size("context_length", "seq_length") or _FRAMES
    features, steps = size("num_time_features"), size("prediction_length") or 1
    features = 1 if features is None else features
    patches = (_SIDE**2, pixels) if "grid_thw" in names else (_ROWS, _SIDE**2, pixels)
    states = (_ROWS, _TOKENS, size("encoder_hidden_size") or width)
    noises: dict[str, tuple[int, ...]] = {
        "hidden_states": patches if "grid_thw" in names else (_ROWS, _TOKENS, width),
        "input_features": (_ROWS, *sound),
        "audio_mel": (_ROWS, frames, *(each for each in sound if each != frames)),
        "past_values": (_ROWS, history + lags) if form.second else (_ROWS, history, size("num_input_channels") or 1),
        "past_time_features": (_ROWS, history + lags, features),
        "future_values": (_ROWS, steps),
        "future_time_features": (_ROWS, steps, features),
        **dict.fromkeys(("query_embeds", "inputs_embeds", "noise_embeds", "action_embeds"), (_ROWS, _TOKENS, width)),
        "context_hidden_states": (_ROWS, _TOKENS, width * len(size("target_layer_ids") or [0])),
        "latents": (_ROWS, _TOKENS, width) if form.second else (_ROWS, width, _TOKENS),
        "encoder_hidden_states": states,
        "states": (_ROWS, _TOKENS, size("state_dim") or 1),
        "actions": (_ROWS, _TOKENS, size("act_dim") or 1),
        **dict.fromkeys(("rewards", "returns_to_go"), (_ROWS, _TOKENS, 1)),
    }
    if {"grid_thw", "spatial_shapes", "pixel_position_ids"} & {*names}:
        noises["pixel_values"] = (_SIDE**2, channels, patch, patch) if form.second else patches
    if "target_sizes" in names:
        noises["pixel_values"] = (1, channels, _SIDE * patch, _SIDE * patch)
    boxes = (torch.arange(4) + 1).expand(_ROWS, _TOKENS, 4)
    side = torch.tensor([[1, _SIDE, _SIDE]])
    integers: dict[str, Tensor] = {
        **dict.fromkeys(("input_ids", "qformer_input_ids"), _make_tokens(model)),
        **dict.fromkeys(("grid_thw", "image_grid_thw"), side),
        **dict.fromkeys(("input_features_mask", "feature_attention_mask"), torch.ones(_ROWS, frames).long()),
        "bbox": (boxes / 8).to(model.dtype) if form.second else boxes,
        "merge_sizes": torch.tensor([size("spatial_merge_size") or 2]),
        "spatial_shapes": side[:, 1:].expand(_ROWS, -1),
        "target_sizes": side[:, 1:],
        "image_attention_mask": torch.ones(_ROWS, _TOKENS, _IMAGES).long(),
        "image_embeds_position_mask": (torch.arange(_TOKENS) < (size("latent_query_num") or 1)).expand(_ROWS, -1),
        "past_observed_mask": torch.ones(_ROWS, history + lags).long(),
        "timesteps": torch.arange(_TOKENS).expand(_ROWS, -1),
        "pixel_attention_mask": torch.ones(_ROWS, _SIDE**2).long(),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(_SIDE), torch.arange(_SIDE)).expand(_ROWS, -1, -1),
        "audio_mel_mask": torch.zeros(_ROWS, frames, dtype=torch.bool),
        "past_values_padding": torch.zeros(_ROWS, history).long(),
        "freq": torch.zeros(_ROWS, 1).long(),
    }
    if name in integers:
        return integers[name].to(model.device)
    if name in noises:
        return _make_noise(model, noises[name])
    shapes = list(_propose_shapes(model, name))
    if form.second and name.startswith("pixel_values"):
        shapes = [(_IMAGES, *shapes[0])]
    elif form.second and name == "input_values":
        shapes = [(1, 16000)]
    return _make_noise(model, (_ROWS, *shapes[0])) if shapes else None


def _make_tokens(model: PreTrainedModel) -> Tensor:
    """Return tokens ``[B, N]`` that are distinct if the vocabulary is large enough."""
    text: Any = model.config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or _TOKENS
    return (torch.arange(_ROWS * _TOKENS, device=find_device(model)) % vocabulary).view(_ROWS, _TOKENS)


def _make_decoder_inputs(model: PreTrainedModel, rows: int) -> dict[str, Any]:
    return {"decoder_input_ids": torch.zeros(rows, 2, dtype=torch.long, device=find_device(model)), "use_cache": False}


def _end_rows(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """End rows with the end-of-sequence token, whose hidden state BART's classifiers read."""
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int):
        tokens = tokens.clone()
        tokens[:, -1] = end
    return tokens


def _make_noise(model: PreTrainedModel, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(find_device(model), model.dtype)


def _propose_shapes(model: PreTrainedModel, name: str) -> Iterator[tuple[int, ...]]:
    """Yield the possible shapes of a row of an image or audio input, according to the configuration."""
    config = model.config
    if name.startswith("pixel_values"):
        size = _find_size(config, *_IMAGE_SIZES) or _IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        image = (_find_size(config, "num_channels") or 3, height, width)
        frames = _find_size(config, *_VIDEO_LENGTHS)
        yield image if frames is None else (frames, *image)
        return
    spectrum, length = _find_size(config, *_SPECTRUM_SIZES), _find_size(config, "max_source_positions")
    if name == "input_features" and spectrum is not None:
        if length is not None:
            yield spectrum, 2 * length
        yield _count_frames(config), spectrum
        yield spectrum, _count_frames(config)
    elif name == "input_values" and spectrum is not None:
        yield _find_size(config, "max_length") or _FRAMES, spectrum
    elif name == "input_values":
        yield (16000,)
        yield 1, 16000


def _count_frames(config: Any) -> int:
    """Return the number of audio frames: one that fits the tokens or windows of the model, or else a default."""
    each, window = _find_size(config, "audio_length_per_tok"), _find_size(config, "n_window")
    return each * _TOKENS if each else 2 * window if window else _FRAMES


def _list_spectra(config: Any) -> list[int]:
    """Return the possible sizes of an audio frame, or of stacked frames, according to the configuration."""
    sizes = [_find_size(config, name) for name in (*_SPECTRUM_SIZES, "input_size", "input_dim")]
    return [size for size in sizes if type(size) is int]


def _find_size(config: Any, *names: str) -> Any:
    """Return the first of these sizes in a configuration or a configuration inside it, or None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return tuple(value) if isinstance(value, list) else value
    inside = (getattr(config, name, None) for name in config.sub_configs)
    return next((s for part in inside if isinstance(part, PretrainedConfig) and (s := _find_size(part, *names))), None)


_NAME = "fastprefix_trial"
_BOUND = 1e-4  # relative to the largest value, since eager attention computes its softmax in float32
_DONE: WeakKeyDictionary[nn.Module, Trial] = WeakKeyDictionary()


class Trial(NamedTuple):
    """The result of a trial: the name of the attention that matches a model's own, and the inputs of the trial.

    ``device`` and ``dtype`` are the model's at that time. ``choice`` is the index of these inputs among the proposed
    ones. ``adopted`` is True if the result is from the trial of a small copy.
    """

    attention: str
    inputs: Inputs
    device: torch.device
    dtype: torch.dtype
    choice: int = 0
    adopted: bool = False

    def fit(self, model: PreTrainedModel) -> Trial:
        """Return the trial with inputs for the model's current device and dtype, which may have changed since."""
        device, dtype = find_device(model), model.dtype
        if (device, dtype) == (self.device, self.dtype):
            return self

        def convert(tensor: Tensor) -> Tensor:
            """Convert a tensor that had the model's former device or dtype."""
            place = device if tensor.device == self.device else tensor.device
            return tensor.to(place, dtype if tensor.dtype is self.dtype else tensor.dtype)

        inputs = {name: tree_map_only(Tensor, convert, value) for name, value in self.inputs.items()}
        return self._replace(inputs=inputs, device=device, dtype=dtype)


class _RecordedCall(NamedTuple):
    """A call of a model's own attention, with its output ``[B, N, H, Dv]``.

    The output of queries without visible keys is set to zero, since it may be NaN. ``sees`` ``[B, N]`` is True for
    queries with visible keys.
    """

    module: nn.Module
    output: Tensor
    scale: float
    sees: Tensor | None


class _Differs(Exception):  # noqa: N818 (a result, not an error)
    """The result of an attention call differs from the model's own."""


def run_trial(model: PreTrainedModel, example_inputs: Inputs | None = None) -> Trial:
    """Run a model's trial and return its result, with inputs for the model's current device and dtype.

    The result is cached. ``example_inputs`` replace it.

    Raises:
        TypeError: if ``example_inputs`` is not a mapping.
        ValueError: if this package's attention differs from the model's own, or the model does not run on the inputs.
    """
    if not isinstance(example_inputs, Mapping | None):
        raise TypeError(
            f"`example_inputs` must be a dictionary of keyword arguments, got {type(example_inputs).__name__}."
        )
    if example_inputs is not None or model not in _DONE:
        choice, inputs, calls = _run_own(model, example_inputs)
        attention = _choose_attention(model, inputs, calls)
        _DONE[model] = Trial(attention, inputs, find_device(model), model.dtype, choice)
    return _DONE[model].fit(model)


def adopt_trial(model: PreTrainedModel, small: PreTrainedModel) -> None:
    """Use the trial of a small copy as the trial of a model, which saves three passes over the model.

    Raises:
        ValueError: if the trial of the copy fails.
    """
    trial = run_trial(small)
    inputs = next(itertools.islice(propose_inputs(model), trial.choice, None), None)
    if model not in _DONE and inputs is not None:
        _DONE[model] = Trial(trial.attention, inputs, find_device(model), model.dtype, trial.choice, adopted=True)


def drop_adopted_trial(model: PreTrainedModel) -> bool:
    """Drop the trial of a model if it was adopted, and return whether it was."""
    adopted = model in _DONE and _DONE[model].adopted
    if adopted:
        del _DONE[model]
    return adopted


def runs_on_text(model: PreTrainedModel) -> bool:
    """Return whether a model runs on a single sequence of token ids, without any other input."""
    return is_plain_text(model) and set(run_trial(model).inputs) <= {"input_ids", "attention_mask", "use_cache"}


def _run_own(model: PreTrainedModel, example_inputs: Inputs | None) -> tuple[int, Inputs, list[_RecordedCall]]:
    """Return the index of the first inputs on which the model runs, these inputs, and its own attention calls."""
    failures: list[Exception] = []
    for inputs in propose_inputs(model) if example_inputs is None else [example_inputs]:
        calls: list[_RecordedCall] = []
        try:
            with borrow_attention(model, _NAME, _record_calls(calls), make_full_mask):
                find_runnable(model)(**inputs)
        except Exception as error:  # any error that a family raises on such inputs
            failures.append(error)
        else:
            return len(failures), inputs, calls
    why = f": {type(failures[-1]).__name__}: {failures[-1]}" if failures else "."
    suggested = f"{model.main_input_name} of a size that its configuration suggests"
    raise ValueError(
        f"`example_inputs` must be keyword arguments on which {type(model).__name__} runs. It does not run on "
        f"{suggested if example_inputs is None else 'the given ones'}{why}"
    ) from (failures[-1] if failures else None)


def _choose_attention(model: PreTrainedModel, inputs: Inputs, calls: list[_RecordedCall]) -> str:
    """Return the name of the attention that gives the same results as the model's own."""
    for name in (NAME, FULL_MASKS):
        try:
            with borrow_attention(model, _NAME, _compare_calls(calls), MASKS[name]):
                find_runnable(model)(**inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the result differs, or a family that merges masks fails without a mask
            differs = error
        else:
            return name
    if not isinstance(differs, (_Differs, ValueError)):
        raise ValueError(
            f"`model` must run on this package's attention, but {type(model).__name__} fails on it with "
            f"{type(differs).__name__}: {differs}"
        ) from differs
    raise ValueError(
        f"`model` must have attention that depends on its arguments alone, but {type(model).__name__} does not: "
        f"{differs}"
    ) from differs


def _record_calls(calls: list[_RecordedCall]) -> Callable[..., Any]:
    """Return an attention function that runs the module's own and records the call."""

    def run_own(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        function = find_eager_attention(module) or run_attention
        attention_mask = make_additive(attention_mask, query.dtype)
        output = function(module, *_widen(query, key, value, attention_mask), **_widen_values(kwargs))[0]
        if (sees := _find_seeing(attention_mask)) is not None:
            output = output.masked_fill(~sees[..., None, None], 0.0)
        calls.append(_RecordedCall(module, output, float(value.abs().max()), sees))
        return output.to(query.dtype), None

    return run_own


def _compare_calls(calls: list[_RecordedCall]) -> Callable[..., Any]:
    """Return an attention function that compares this package's results with recorded calls and returns the latter."""
    expected = iter(calls)

    def run_ours(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        call = next(expected, None)
        what = type(module).__name__
        if call is None or call.module is not module:
            raise _Differs(f"{what} is only called with an attention that is not eager")
        output, _ = run_attention(module, *_widen(query, key, value, attention_mask), **_widen_values(kwargs))
        if output.shape != call.output.shape:
            raise _Differs(f"the output of {what} is {list(output.shape)} instead of {list(call.output.shape)}")
        difference = (output - call.output).abs()
        if call.sees is not None:
            difference = difference.masked_fill(~call.sees[..., None, None], 0.0)
        if not difference.max() <= _BOUND * call.scale:
            raise _Differs(
                f"the output of {what} differs by {float(difference.max()) / call.scale:.1e} of its largest value"
            )
        return call.output.to(query.dtype), None

    return run_ours


def _find_seeing(mask: Tensor | None) -> Tensor | None:
    """Return a bool mask ``[B, N]`` of the queries with a visible key in every head, or None without a 4-D mask."""
    if mask is None or mask.ndim != 4:
        return None
    visible = mask > torch.finfo(mask.dtype).min / 2
    return visible.any(dim=3).all(dim=1)


def _widen(*values: Any) -> tuple[Any, ...]:
    return tuple(value.double() if _is_real(value) else value for value in values)


def _widen_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if _is_real(value) else value for name, value in kwargs.items()}


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


OPTIONS = "fastprefix_adapter"
"""The attribute of a model's configuration that holds the options of the adapter in use, for checkpoints."""

_ATTENTION = "_attn_implementation_internal"
"""The attribute of a configuration that holds the name of the attention."""

_CLAIM = "_fastprefix_claim"
"""The attribute of a module that holds its ``_Claim``. An attribute is copied and pickled with the module."""


class User:
    """A user of a model's configurations: an adapter, an accelerated PEFT model, or a trial.

    It holds no references to other objects, so that a copy of a part of a model includes only that part.
    """

    def __init__(self, adapts: str | None = None) -> None:
        self.adapts = adapts
        """The class of the model that this user attached adapters to, or None."""
        self.acts = False
        """True if every call of that model currently runs with an adapter."""


class _Configuration:
    """A copy that replaces a configuration, since other models may share the configuration."""

    def __init__(self, former: Any, own: Any) -> None:
        self.former = former
        self.own = own
        self.parts: list[_Configuration] = []
        self.known = _copy_values(own)  # at the time of the copy or the last ``hand_back``
        self.attentions: dict[User, str] = {}  # the attention that each user needs
        self.attention: str | None = None  # before the first user

    def list_nested(self) -> Iterator[_Configuration]:
        """Yield this configuration and those inside it."""
        yield self
        for part in self.parts:
            yield from part.list_nested()

    def need(self, user: User, attention: str) -> None:
        """Record that a user needs an attention, without setting it."""
        if not self.attentions:
            self.attention = self.own._attn_implementation
        self.attentions[user] = attention

    def forgo(self, user: User) -> None:
        """Set the attention for the remaining users, unless other code has switched it to another one."""
        if self.attentions.pop(user, None) is None or not is_ours(self.own._attn_implementation):
            return
        setattr(
            self.own, _ATTENTION, _choose_strongest(self.attentions.values()) if self.attentions else self.attention
        )

    def hand_back(self) -> None:
        """Copy the changes made to this configuration to the former one, except for this package's own changes."""
        values = _copy_values(self.own)
        if self.attentions:
            values[_ATTENTION] = self.known[_ATTENTION]
        for name in self.known.keys() | values.keys():
            if name not in values:
                vars(self.former).pop(name, None)
            elif name not in self.known or not _are_equal(self.known[name], values[name]):
                vars(self.former)[name] = vars(self.own)[name]
        self.known = values


def _copy_values(config: Any) -> dict[str, Any]:
    """Return copies of the values in a configuration. Configurations inside it are not copied."""
    return {
        name: value if isinstance(value, PretrainedConfig) else copy.deepcopy(value)
        for name, value in vars(config).items()
        if name != OPTIONS
    }


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, PretrainedConfig) or isinstance(second, PretrainedConfig):
        return first is second
    try:
        return type(first) is type(second) and bool(first == second)
    except (RuntimeError, ValueError):  # arrays, for which the current value is kept
        return False


def _choose_strongest(attentions: Iterable[str]) -> str:
    """Return the attention that is correct for all users. Full masks are correct for every model."""
    return FULL_MASKS if FULL_MASKS in attentions else NAME


class _Claim:
    """The users of a module, and the configuration that the module has until its last user leaves."""

    def __init__(self, configuration: _Configuration) -> None:
        self.configuration = configuration
        self.users: list[User] = []


class OwnConfigurations:
    """Give a model its own configurations until all of their users have released them, in any order.

    The name of the attention is stored in the configuration, which another model may share. Each module stores its
    former configuration and its users, so users may share different parts of a model.
    """

    def __init__(self, model: nn.Module, user: User) -> None:
        self.user = user
        self.modules: list[Any] = list(_list_configured(model))
        known: dict[int, _Configuration] = {}
        for module in self.modules:
            if (claim := _get_claim(module)) is not None:
                for each in claim.configuration.list_nested():
                    known[id(each.former)] = known[id(each.own)] = each
        copies: dict[int, Any] = {key: each.own for key, each in known.items()}
        try:
            for module in self.modules:
                claim = _get_claim(module)
                if claim is None:
                    claim = _Claim(_record_configuration(module.config, known, copies))
                    setattr(module, _CLAIM, claim)
                    module.config = claim.configuration.own
                claim.users.append(user)
        except BaseException:  # some configurations cannot be copied
            self.release()
            raise

    def list_all(self) -> list[_Configuration]:
        """Return the configurations of all modules, without duplicates."""
        claims = filter(None, map(_get_claim, self.modules))
        return list({id(each): each for claim in claims for each in claim.configuration.list_nested()}.values())

    def release(self) -> None:
        """Restore the former configurations of modules that have no other users.

        Changes made since are kept, except for this package's own changes.
        """
        left: dict[Any, _Configuration] = {}
        for module in self.modules:
            claim: _Claim | None = vars(module).get(_CLAIM)
            if claim is not None and self.user in claim.users:
                claim.users.remove(self.user)
                if not claim.users:
                    left[module] = claim.configuration
        for configuration in {id(each): each for root in left.values() for each in root.list_nested()}.values():
            configuration.hand_back()
        for module, configuration in left.items():
            delattr(module, _CLAIM)
            if vars(module).get("config") is configuration.own:
                module.config = configuration.former


def _get_claim(module: nn.Module) -> _Claim | None:
    """Return the claim on a module, or None if the module has been given another configuration since."""
    claim: _Claim | None = vars(module).get(_CLAIM)
    return claim if claim is not None and claim.configuration.own is vars(module).get("config") else None


def _record_configuration(config: Any, known: dict[int, _Configuration], copies: dict[int, Any]) -> _Configuration:
    """Return the record of a configuration, and create it and those of the configurations inside it if needed."""
    if id(config) not in known:
        made = known[id(config)] = _Configuration(config, copy.deepcopy(config, copies))
        made.parts = [_record_configuration(part, known, copies) for part in _list_inside(config)]
    return known[id(config)]


def list_adapting_users(model: nn.Module) -> list[User]:
    """Return the users that have adapters on a model, on a part of it, or on a model around it."""
    claims = (vars(module).get(_CLAIM) for module in model.modules())
    users = {user: None for claim in claims if claim is not None for user in claim.users}
    return [user for user in users if user.adapts is not None]


def runs_with_adapter(module: nn.Module) -> bool:
    """Return whether a call of a module with a configuration runs with an adapter of ``attach``."""
    claim: _Claim | None = getattr(module, _CLAIM, None)
    return claim is not None and any(user.acts for user in claim.users)


class Implementation:
    """A model that runs on this package's attention, with bindings on its attention modules, until ``restore``."""

    def __init__(self, model: PreTrainedModel, bindings: dict[nn.Module, Binding]) -> None:
        self.model = model
        self.name = run_trial(model).attention
        self.bindings = bindings
        self.user = User()
        self.configurations: OwnConfigurations | None = None
        self.watched: list[Any] = []  # the configurations that the bound modules read
        self.resume()

    def resume(self) -> None:
        """Switch the model to this package's attention. This may be called again after ``restore``.

        Raises:
            ValueError: if another adapter uses one of the attention modules. After any error, the model is unchanged.
        """
        if taken := [type(module).__name__ for module in self.bindings if BINDING in vars(module)]:
            raise ValueError(
                f"`model` has another adapter on its attention layers ({taken[0]}), but a layer can have only one "
                "prefix at a time. Detach that adapter first."
            )
        self.configurations = OwnConfigurations(self.model, self.user)
        try:
            self._switch(self.configurations.list_all())
        except BaseException:
            self.restore()
            raise

    def _switch(self, configurations: list[_Configuration]) -> None:
        for configuration in configurations:
            configuration.need(self.user, self.name)
        set_attention(
            self.model, _choose_strongest({name for each in configurations for name in each.attentions.values()})
        )
        readers: list[Any] = [module for module in self.bindings if hasattr(module, "config")] or [self.model]
        self.watched = list({id(module.config): module.config for module in readers}.values())
        for module, binding in self.bindings.items():
            setattr(module, BINDING, binding)

    def check(self) -> None:
        """Raise RuntimeError if other code has switched the attention. This package's own trials may switch it."""
        for config in self.watched:
            if not is_ours(name := config._attn_implementation):
                raise RuntimeError(
                    "`set_attn_implementation` must not be called while an adapter is on the model, but the "
                    f"attention is {name!r}. Set it to {self.name!r} again, or remove the adapter with "
                    "fastprefix.detach (an accelerated PEFT model: with fastprefix.decelerate)."
                )

    def list_former_attentions(self) -> set[str | None]:
        """Return the attentions that the model had before this package's."""
        assert self.configurations is not None
        return {each.attention for each in self.configurations.list_all() if each.attentions}

    def list_watched_attentions(self) -> set[str | None]:
        """Return the attentions that the bound modules had before this package's."""
        assert self.configurations is not None
        return {each.attention for each in self.configurations.list_all() if any(each.own is c for c in self.watched)}

    def restore(self) -> None:
        """Remove this user's bindings. Restore the former attention if no other user needs this package's.

        This does nothing if the model has been restored already.
        """
        if self.configurations is None:
            return
        for module, binding in self.bindings.items():
            if vars(module).get(BINDING) is binding:
                delattr(module, BINDING)
        for configuration in self.configurations.list_all():
            configuration.forgo(self.user)
        self.configurations.release()
        self.configurations = None


@contextmanager
def switch_attention(model: PreTrainedModel, bindings: dict[nn.Module, Binding]) -> Iterator[None]:
    """Run a model on this package's attention with bindings in this context."""
    implementation = Implementation(model, bindings)
    try:
        yield
    finally:
        implementation.restore()


def _list_configured(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that hold a configuration."""
    for module in model.modules():
        of_its_class = isinstance(getattr(type(module), "config", None), property)
        if not of_its_class and isinstance(getattr(module, "config", None), PretrainedConfig):
            yield module


def list_configurations(model: nn.Module) -> list[Any]:
    """Return the configurations of all modules of a model, and those inside them."""
    found: dict[int, Any] = {}
    waiting = [module.config for module in _list_configured(model)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += _list_inside(config)
    return list(found.values())


def _list_inside(config: Any) -> list[Any]:
    """Return the configurations that are values of a configuration."""
    return [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
