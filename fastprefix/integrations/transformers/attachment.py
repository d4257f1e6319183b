"""Attach a method to a model, switch between attached methods, and detach them."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...methods import (
    METHODS,
    CompositionConfig,
    EmbeddingShape,
    MethodConfig,
    MultitaskPrompt,
    MultitaskPromptConfig,
    PrefixMethod,
    PrefixTuning,
    PrefixTuningConfig,
    SHIPConfig,
    VisualMethod,
)
from .adapter import Adapter, Attachment, Hooks, Method, find_trainable_modules, is_saved_by_transformers
from .checking import conformance
from .checking.conformance import adopt_small_trial, choose_stand_in
from .mixed_batches.mixed_call import BASE
from .mixed_batches.routing import Routing
from .models.attention import carry_through_checkpoints
from .models.discovery import Layer, find_embedding, find_layers, find_method_layers, find_projections
from .models.switching import (
    Inputs,
    find_device,
    is_of_text,
    is_plain_text,
    list_adapting_users,
    load_offloaded,
    loads_all_inside,
    runs_on_text,
)
from .models.tuners import find_base_model, has_tuner_layers
from .prefixes.initial import check_cache_given, make_initial_prefix, tokenize_text
from .prefixes.prefix import PrefixHooks
from .prompts.multitask import pass_task_ids, read_source
from .prompts.prompt import EncoderPromptHooks, PromptHooks
from .prompts.shared_prompt import SharedPromptHooks, find_reason_not_shareable, share_always
from .prompts.task_prompts import TaskPromptHooks
from .sharding.agreement import agree, do_together
from .sharding.fully_sharded import is_fully_sharded, reshard
from .sharding.partitioned import find_whole_shape, gathering_modules, runs_in_engine
from .sharding.tensor_parallel import gather_full_tensor, is_sharded, is_tensor_parallel, make_alike
from .vision.visual_prompt import VisionStack, VisualHooks, find_vision_stack

_STATE = "_fastprefix_attachment"
DEFAULT = "default"
"""The name that ``attach`` gives an adapter by default."""
_LONGEST_NAME = 200
"""The length of a percent-encoded name. A file name has up to 255 bytes, and a temporary one adds 46."""

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    config: MethodConfig,
    *,
    name: str = DEFAULT,
    tokenizer: Any = None,
    example_inputs: Inputs | None = None,
    past_key_values: Any = None,
    check: bool = True,
    freeze_peft: bool = False,
) -> Model:
    """Attach a method to a model: freeze the model's own parameters and add the method's trainable ones.

    You can attach several adapters under different names. The last one attached is in use until ``set_adapter`` selects
    another. If ``attach`` fails, the model is unchanged.

    In a model with PEFT layers such as LoRA, PEFT has already frozen the base model. The parameters that PEFT trains
    stay trainable beside the method, unless ``freeze_peft`` is True.

    Args:
        model: a ``transformers`` model. Prefix methods require attention that goes through the attention interface.
            Prompt methods require input embeddings. All functions of this package also accept a PEFT model around the
            ``transformers`` model if its adapter consists of layers (LoRA, DoRA and others).
        config: the configuration of the method.
        name: the name of the adapter, with up to 200 characters.
        tokenizer: the tokenizer for an initialization from text. None loads the tokenizer from the model's name or
            path.
        example_inputs: for prefix methods, keyword arguments for the run that finds the attention layers. None makes
            small inputs of text, images or sound from the configuration.
        past_key_values: for ``init="cache"``, the cache whose keys and values initialize the prefix. It is a
            ``transformers`` cache, or a sequence with (key, value), (key, value, bias) or (key, bias, value) for each
            layer. Keys and values have the shape ``[1, Hkv, m, D]``, biases ``[1, Hkv, m]``.
        check: compare the method with the textbook on a small copy of the model first, once per model class and
            configuration. A prompt that cannot be shared exactly then runs in every row.
        freeze_peft: freeze the parameters that PEFT trains while this adapter is in use.

    Returns:
        The same model. It stays an ordinary ``transformers`` model.

    Raises:
        TypeError: if ``model`` is not a ``transformers`` model, ``config`` is not a method's configuration, or ``name``
            is not a string.
        ValueError: if the model already has an adapter with this name, or the method cannot be attached to it.
    """
    base = find_base_model(model)
    _check_together(base, config, name)
    if isinstance(config, CompositionConfig):
        raise ValueError(
            "`config` must describe a single prefix, but is a composition. Attach each part, then call "
            "fastprefix.compose."
        )
    check_cache_given(config, past_key_values)
    _check_values_given(config, check)
    with use_adapter(base, None), gathering_modules(base):
        plan = _make_plan(base, config, example_inputs, check)
        if isinstance(plan.method, VisualMethod):
            plan.method.reset_parameters()
        elif isinstance(plan.method, PrefixMethod):
            initial = make_initial_prefix(base, config, plan.layers, tokenizer, past_key_values)
            plan.method.reset_parameters(None if initial is None else initial.pairs)
            if initial is not None and initial.biases is not None and isinstance(plan.method, PrefixTuning):
                plan.method.set_key_biases(initial.biases)
        else:
            ids = tokenize_text(base, config, tokenizer)
            with load_offloaded(base, base.get_input_embeddings()):
                plan.method.reset_parameters(gather_full_tensor(_find_table(base)).detach(), ids)
            if isinstance(config, MultitaskPromptConfig) and isinstance(plan.method, MultitaskPrompt) and config.source:
                plan.method.start_from(*read_source(config.source))
        make_alike(base, plan.method.parameters())
        plan.method.config = plan.method.config.without_private()  # the model's files must not contain documents
        adapter = _make_adapter(base, plan, freeze_peft)
    return install(model, adapter, name)


def attach_empty(
    model: nn.Module, config: MethodConfig, name: str, example_inputs: Inputs | None, freeze_peft: bool
) -> None:
    """Attach a method without initializing its parameters, which the caller loads afterwards."""
    base = find_base_model(model)
    _check_together(base, config, name)
    with use_adapter(base, None), gathering_modules(base):
        adapter = _make_adapter(base, _make_plan(base, config, example_inputs, check=False), freeze_peft)
    install(model, adapter, name)


def detach(model: Model, name: str | None = None) -> Model:
    """Remove adapters from a model and restore its weights and behavior exactly.

    Changes that other code has made since ``attach`` stay, such as edits of the configuration, a resized vocabulary,
    and accelerated PEFT models around the same base model.

    Args:
        model: a model with a method attached.
        name: the name of the adapter to remove. If that adapter is in use, the model runs without an adapter
            afterwards. None removes all adapters.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no method attached, or no adapter with this name.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    gone = list(attachment.adapters) if name is None else [attachment.check_known(name)]
    if attachment.active in gone:
        _activate(base, attachment, None)
    for each in gone:
        adapter = attachment.adapters.pop(each)
        adapter.drop_gradients(base)
        attachment.routing.forget(adapter)
        attachment.together.discard(each)
    attachment.register_together(base)
    if not attachment.adapters and (name is None or not attachment.routing.serves):
        attachment.routing.remove()
        attachment.release(base)
        delattr(base, _STATE)
    return model


def set_adapter(model: Model, name: str) -> Model:
    """Select the adapter that a model runs and trains with. The other adapters keep their parameters.

    When PEFT adds its first layers to a model, it freezes all parameters, including those of the adapter in use. Call
    this function with the name of that adapter to make it trainable again.

    Args:
        model: a model with a method attached.
        name: the name of the adapter.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no method attached, or no adapter with this name, or if PEFT has added its layers
            to modules of that adapter.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    former, adapter = attachment.active, attachment.adapters[attachment.check_known(name)]
    adapter.check_untouched(base)
    saved = attachment.carried or is_saved_by_transformers(base)
    if has_tuner_layers(base) and not saved and not attachment.routing.serves:
        _warn_not_saved(base)
    if has_tuner_layers(base) and not attachment.had_tuners and not adapter.merged:
        adapter.train_again()
    if model is not base and isinstance(adapter.method, MultitaskPrompt):
        pass_task_ids(model)
    if former != name:
        _activate(base, attachment, name)
        if former is not None:
            attachment.adapters[former].drop_gradients(base)
    return model


def _warn_not_saved(model: PreTrainedModel) -> None:
    """Warn that a PEFT model around this model does not save the adapter. The model has no reference to it."""
    warnings.warn(
        f"`model` is the {type(model).__name__} inside a PEFT model, whose save_pretrained and Trainer checkpoints do "
        "not contain this adapter. Pass the PEFT model, or save the adapter with fastprefix.save_adapter.",
        stacklevel=3,
    )


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapter in this context. The model stays frozen, and PEFT's layers stay active.

    Afterwards, the adapter from before is in use again, also if others were attached in this context.

    Raises:
        ValueError: if the model has no method attached.
    """
    get_attachment(model)
    with use_adapter(model, None):
        yield


@contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Use an adapter by name in this context, or no adapter for None. Do nothing if the model has no adapters."""
    attachment, base = find_attachment(model), find_base_model(model)
    if attachment is None:
        yield
        return
    attachment.routing.leave()
    if attachment.active == name:
        yield
        return
    former = attachment.active
    _activate(base, attachment, name)
    try:
        yield
    finally:
        if find_attachment(model) is attachment:  # otherwise, all adapters were detached in this context
            _activate(base, attachment, former if former in attachment.adapters else None)


def get_attachment(model: nn.Module) -> Attachment:
    """Return the attachment of a model. A PEFT model around it also saves and loads the adapter in use from then on.

    The functions that users call get PEFT models here, which can be newer than the adapters.

    Raises:
        ValueError: if the model has no method attached.
    """
    from .files.checkpoints import carry_in_checkpoints

    attachment = find_attachment(model)
    if attachment is None:
        cure = "call fastprefix.attach"
        if hasattr(model, "peft_config"):
            cure += ". PEFT's own adapter has PEFT's methods, such as save_pretrained, accelerated or not"
        raise ValueError(f"`model` must have a method attached, but {type(model).__name__} has none: {cure}.")
    if model is not find_base_model(model):
        carry_in_checkpoints(model)
        attachment.carried = True
    return attachment


def find_attachment(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, or None."""
    attachment: Attachment | None = getattr(find_base_model(model), _STATE, None)
    return attachment


def get_active_name(model: nn.Module) -> str | None:
    """Return the name of the adapter in use on a model, or None."""
    attachment = find_attachment(model)
    return None if attachment is None else attachment.active


def get_method(model: nn.Module) -> Method:
    """Return the method in use on a model, with its parameters."""
    return get_attachment(model).adapter.method


@contextmanager
def restoring_adapters(model: nn.Module) -> Iterator[None]:
    """Undo additions of adapters in this context if it raises an error: detach them, and use the former one again."""
    attachment, former = find_attachment(model), get_active_name(model)
    before = set() if attachment is None else set(attachment.adapters)
    try:
        yield
    except BaseException:
        attachment = find_attachment(model)
        added = [] if attachment is None else [name for name in attachment.adapters if name not in before]
        for name in added:
            detach(model, name)
        if added and former is not None:
            set_adapter(model, former)
        raise


def _activate(model: Any, attachment: Attachment, name: str | None) -> None:
    """Use an adapter, or none. After any error, the model uses the former one again."""
    refuse_partitioned(model)
    attachment.routing.leave()
    reshard(model)  # FSDP2 discards changes to parameters that it has gathered
    former = attachment.active
    try:
        _switch(model, attachment, name)
    except BaseException:
        _switch(model, attachment, former)
        raise


def _switch(model: Any, attachment: Attachment, name: str | None) -> None:
    """Take the adapter in use off a model, and put another one on it. After an error, none is in use."""
    if attachment.active is not None:
        attachment.adapter.take_off(model)
        attachment.active = None
    if name is not None:
        attachment.adapters[name].put_on(model)
        attachment.active = name
    attachment.register_together(model)
    attachment.user.acts = name is not None
    attachment.routing.install()
    attachment.backward_guard.install(model)
    carry_through_checkpoints(model)  # a call without an adapter is recomputed on the attention that it ran on


class _Plan(NamedTuple):
    """A method, its attention layers and its prompt path. Making a plan does not change the model."""

    method: Method
    layers: list[Layer]  # the attention layers that the method needs
    prompt_path: str | None  # of a prompt method: "shared", or "textbook: " and the reason
    stack: VisionStack | None = None  # of a visual method


def _check_together(model: PreTrainedModel, config: MethodConfig, name: str) -> None:
    """Check the model and the options. They must be equal on all ranks of a sharded model."""

    def check() -> None:
        _check_types(model, config)
        _check(model, config, name)

    do_together(model, "attach an adapter", check)
    digest = hashlib.sha256(str(asdict(config)).encode()).hexdigest()  # includes private texts, unlike ``repr``
    agree(model, "attach an adapter", f"{name!r}, {config!r}, {type(model).__name__}, {digest}")


def _check_values_given(config: MethodConfig, check: bool) -> None:
    """Check that the parameters of a new method can be trained, and are given (small copies use random ones)."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "`model` must not get a new adapter inside torch.inference_mode(), where it cannot be trained."
        )
    if check and isinstance(config, SHIPConfig) and config.bank is not None and config.prototypes is None:
        raise ValueError(
            f"`bank` must be a tensor [C, d] of prototypes, but only its size is given, {config.bank}. Compute it with "
            "fastprefix.compute_bank."
        )


def refuse_partitioned(model: nn.Module) -> None:
    """Refuse to add or remove parameters once DeepSpeed has partitioned them."""
    if runs_in_engine(model):
        raise ValueError(
            "`model` must not be partitioned by DeepSpeed ZeRO-3 yet, since its parameters are then empty between "
            "calls. Attach, switch and detach adapters before deepspeed.initialize."
        )


def _check(model: PreTrainedModel, config: MethodConfig, name: str) -> None:
    refuse_partitioned(model)
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate loads weights before use
    if not offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must have its weights loaded, but has parameters on the meta device.")
    check_name_free(model, name)
    if config.kind != "visual" and not is_plain_text(model):
        _check_not_plain_text(model, config)
    _check_alone(model)
    if loads_all_inside(model):
        raise ValueError(
            "`model` is offloaded with its own class in preload_module_classes, so accelerate would look for the "
            "adapter's parameters among the offloaded weights. Offload the model without that class."
        )
    trainable = find_trainable_modules(model, config.modules_to_save)
    if lost := [name for name, module in trainable.items() if any(p.is_meta for p in module.parameters())]:
        raise ValueError(
            f"`modules_to_save` names modules that stay trainable, and accelerate has offloaded the weights of {lost}. "
            "Keep these modules on the device in the device map, or pass modules_to_save=[]."
        )


def check_name(name: str) -> None:
    """Refuse a name that cannot be the name of an adapter or of its file.

    Raises:
        TypeError: if the name is not a string.
        ValueError: if the name is empty or too long.
    """
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string, but is {type(name).__name__}.")
    if not 0 < len(quote(name, safe="")) <= _LONGEST_NAME:
        raise ValueError(
            f"`name` must have 1 to {_LONGEST_NAME} characters, since files are named after it, but has {len(name)}. "
            "Characters other than ASCII letters and digits count several times. Choose another name."
        )


def check_name_free(model: nn.Module, name: str) -> None:
    """Refuse a wrong name, one that an adapter already has, and one that is reserved for the base model."""
    check_name(name)
    attachment = find_attachment(model)
    if name == BASE:
        raise ValueError(
            f"`name` must not be {BASE!r}, which selects the base model in `adapter_names`. Choose another name."
        )
    if attachment is None:
        return
    if name in attachment.adapters:
        raise ValueError(
            f"`name` must be unique, but an adapter named {name!r} is attached already. Detach that adapter, or choose "
            "another name."
        )
    if name in attachment.routing.stored:
        raise ValueError(
            f"`name` must be unique, but the store has an adapter named {name!r}. Drop it from the store first."
        )


def _check_alone(model: PreTrainedModel) -> None:
    """Refuse a model if a model inside it, or one that shares modules with it, has adapters.

    Neither adapter could be disabled while the other one is checked, and each would freeze and store the parameters of
    the other.
    """
    for name, module in model.named_modules():
        if module is not model and hasattr(module, _STATE):
            raise ValueError(
                f"`model` has an adapter inside already, on its {name!r} ({type(module).__name__}). Detach that "
                "adapter first, or attach both to the same model under different names."
            )
    own = getattr(model, _STATE, None)
    if around := [user.adapts for user in list_adapting_users(model) if own is None or user is not own.user]:
        raise ValueError(
            f"`model` shares modules with a {around[0]} that has an adapter. Detach that adapter first, or attach both "
            "to the same model under different names."
        )


def _check_types(model: Any, config: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        peft = ". To speed up PEFT's prompts, prefixes and adaption prompts, use fastprefix.accelerate"
        hints = {"OptimizedModule": ". Attach first, then compile", "PeftModel": peft}
        hint = next((hints[each.__name__] for each in type(model).__mro__ if each.__name__ in hints), "")
        raise TypeError(f"`model` must be a transformers model, but is {type(model).__name__}{hint}.")
    if not isinstance(config, MethodConfig):
        kind = config if isinstance(config, type) else type(config)
        actual = f"{'the class ' * (kind is config)}{kind.__module__.partition('.')[0]}.{kind.__name__}"
        raise TypeError(
            f"`config` must be a method's configuration, such as fastprefix.PrefixTuningConfig(20), but is {actual}."
        )


def _check_not_plain_text(model: PreTrainedModel, config: Any) -> None:
    """Refuse methods that require a single sequence of tokens on encoder-decoders and image or audio models."""
    what = f"the encoder-decoder {type(model).__name__}"
    if not model.config.is_encoder_decoder:
        what = f"{type(model).__name__}, whose input is {model.main_input_name}"
    if config.kind == "prompt" and is_of_text(model):
        return
    if not isinstance(config, PrefixTuningConfig):
        raise ValueError(f"`model` must be a text model for {type(config).__name__}, but is {what}.")
    if config.init in ("text", "chunks", "cache"):
        raise ValueError(
            f'`init` must be "normal" or "zero" for {what}, which is not a plain text model, but is "{config.init}".'
        )
    if config.prefix_position == "shift":
        raise ValueError(
            f'`prefix_position` must be "none" for {what}, whose positions cannot be shifted, but is "shift".'
        )


def _make_plan(model: PreTrainedModel, config: MethodConfig, example_inputs: Inputs | None, check: bool) -> _Plan:
    """Build the uninitialized module of a method on the model's device, in float32 or the model's higher precision."""
    config = copy.deepcopy(config)  # the caller may change it afterwards
    method_class = METHODS[config.method_name()][1]
    if issubclass(method_class, VisualMethod):
        return _make_visual_plan(model, method_class, config, example_inputs, check)
    if example_inputs is None:
        adopt_small_trial(model)
    layers: list[Layer] = []
    path = None
    method: Method
    if issubclass(method_class, PrefixMethod):
        layers = find_method_layers(model, config, example_inputs)
        if check:
            _refuse_wrong(conformance.check(model, config, _attach_unchecked), "Use another method or model.")
        if not runs_on_text(model):
            _check_not_plain_text(model, config)
        method = method_class(config, [layer.whole_shape for layer in layers])
        if method.projected_states(0) is not None:
            for layer, projection in zip(layers, find_projections(model, layers), strict=True):
                layer.projection = projection
        check_method_fits(method, layers)
    else:
        method = method_class(config, EmbeddingShape(*find_whole_shape(_find_table(model))))
        path = _choose_prompt_path(model, config, check)
        layers = find_layers(model) if path == "shared" else []
    return _Plan(_move_method(model, method), layers, path)


def check_method_fits(method: PrefixMethod, layers: list[Layer]) -> None:
    """Refuse a prefix that these attention layers cannot have."""
    shift = method.position_shift()
    if shift not in (0, method.config.num_virtual_tokens) and any(layer.window for layer in layers):
        raise ValueError(
            "`position_shift` must be None for a model with sliding windows, which hide prefix tokens by their "
            f"positions, but is {shift}."
        )
    if method.needs_hidden() and (lost := [layer.name for layer in layers if layer.entry is None]):
        raise ValueError(
            f"`model` must have layers whose input a hook can read for the gate, but it cannot be read in {lost}."
        )


def _make_visual_plan(
    model: PreTrainedModel,
    method_class: type[VisualMethod],
    config: MethodConfig,
    example_inputs: Inputs | None,
    check: bool,
) -> _Plan:
    """Build a visual method for a vision model."""
    if is_fully_sharded(model):
        raise ValueError("`model` must not be sharded by FSDP2 yet for visual prompts. Attach before fully_shard.")
    stack = find_vision_stack(model, example_inputs)
    method = method_class(config, stack.shape)
    reason = method.sees_tokens(training=False) or stack.reason
    if stack.leading == 0 and (getattr(config, "bank", None) or getattr(config, "matching_loss", False)):
        raise ValueError(
            f"`model` must have a class token for `bank` and `matching_loss`, which read the attention of that token, "
            f"but {type(stack.part).__name__} has no class token."
        )
    if reason is not None and method.strength(0) is not None:
        raise ValueError(
            f"`model` must have layers that run on rows without an image for {type(method).__name__}, but {reason}."
        )
    if check:
        _refuse_wrong(conformance.check(stack.reader, config, _attach_unchecked), "Use another method or model.")
    return _Plan(_move_method(model, method), [], "shared" if reason is None else f"textbook: {reason}", stack)


def _move_method(model: PreTrainedModel, method: Method) -> Method:
    """Return a method on the device of a model, in float32 or the model's higher precision."""
    return method.to(device=find_device(model), dtype=torch.promote_types(model.dtype, torch.float32))


def _choose_prompt_path(model: PreTrainedModel, config: Any, check: bool) -> str:
    """Return how the prompt will run: "shared", or "textbook: " and the reason.

    Raises:
        ValueError: if neither path is exact, or the path that ``shared_prompt`` requires is not exact.
    """
    reason = _find_reason_against_sharing(model, config, check)
    if reason is None:
        return "shared"
    if config.shared_prompt is True:
        raise ValueError(f"`shared_prompt=True` cannot be exact on {type(model).__name__}: {reason}")
    if check:
        in_every_row = replace(config, shared_prompt=False)
        _refuse_wrong(conformance.check(model, in_every_row, _attach_unchecked), "A prefix method may work.")
    _refuse_shared_key_heads(model)
    return f"textbook: {reason}"


def _refuse_shared_key_heads(model: PreTrainedModel) -> None:
    """Refuse a prompt in every row if ranks of a tensor-parallel model share key heads.

    A prompt in every row runs on the model's own attention, which assumes that the gradients of the keys and values are
    complete on each rank.
    """
    if not is_tensor_parallel(model):
        return
    splits = [layer.split for layer in find_layers(model) if layer.split is not None]
    if any(split.queries and not split.keys for split in splits):
        raise ValueError(
            f"`model` must have at least one key head per rank to train a prompt in every row, but the ranks of "
            f"{type(model).__name__} share key heads. Use a shared prompt, a prefix method or fewer ranks."
        )


def _find_reason_against_sharing(model: PreTrainedModel, config: Any, check: bool) -> str | None:
    if config.shared_prompt is False:
        return "shared_prompt=False"
    if isinstance(config, MultitaskPromptConfig) and config.num_tasks > 1 and is_sharded(model):
        return "each row of a sharded model has the prompt of its task"
    if model.config.is_encoder_decoder:
        return "its encoder's prompt sees what comes after it"
    reason = find_reason_not_shareable(choose_stand_in(model))
    if reason is None and check:
        with share_always():
            report = conformance.check(model, replace(config, shared_prompt=None), _attach_unchecked)
        reason = None if report.agrees else str(report.wrong[0])
    return reason


def _refuse_wrong(report: conformance.ConformanceReport, alternative: str) -> None:
    """Raise ValueError if the report shows a difference from the textbook."""
    if not report.agrees:
        raise ValueError(report.describe(alternative))


def _attach_unchecked(model: PreTrainedModel, config: MethodConfig) -> PreTrainedModel:
    return attach(model, config, check=False)


def _find_table(model: PreTrainedModel) -> Tensor:
    weight = getattr(find_embedding(model), "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"`model` must have an input embedding table for a prompt, but {type(model).__name__} has none. Try a "
            "prefix method."
        )
    return weight


def _make_adapter(model: PreTrainedModel, plan: _Plan, freeze_peft: bool) -> Adapter:
    method, layers, path, stack = plan
    hooks: Hooks
    if isinstance(method, VisualMethod):
        assert stack is not None
        method.prompt_path = path
        hooks = VisualHooks(model, method, stack)
    elif isinstance(method, PrefixMethod):
        hooks = PrefixHooks(model, method, layers)
        if hooks.heads is not None:
            hooks.heads.distribute(method)
    else:
        method.prompt_path = path
        required = method.config.shared_prompt is True
        if path == "shared" and isinstance(method, MultitaskPrompt) and method.config.num_tasks > 1:
            hooks = TaskPromptHooks(model, method, layers, required)
        elif path == "shared":
            hooks = SharedPromptHooks(model, method, layers, required)
        elif model.config.is_encoder_decoder:
            hooks = EncoderPromptHooks(model, method)
        else:
            hooks = PromptHooks(model, method)
    return Adapter(model, method.config, method, hooks, freeze_peft)


def install(model: Model, adapter: Adapter, name: str) -> Model:
    """Freeze the model if it is not frozen yet, add an adapter to it and select that adapter.

    After any error, the model is unchanged.
    """
    with restoring_adapters(model):
        prepare(find_base_model(model)).adapters[name] = adapter
        return set_adapter(model, name)


def prepare(model: PreTrainedModel) -> Attachment:
    """Create the model's attachment if it has none: freeze the model and let its calls name adapters."""
    if not hasattr(model, _STATE):
        attachment = Attachment(model)
        attachment.routing = Routing(model, attachment)
        setattr(model, _STATE, attachment)
    return get_attachment(model)
