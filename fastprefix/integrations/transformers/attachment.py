"""Attaching a method to a model, and taking it off again."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from ...methods import METHODS, EmbeddingShape, MethodConfig, PrefixMethod, PromptMethod
from .heads import trainable_modules
from .prefix import PrefixAttachment
from .probe import Layer, find_layers, text_keys_values
from .prompt import PromptAttachment
from .shared_prompt import SharedPromptAttachment, reason_not_shareable

MODULE = "fastprefix"
"""The name under which the method's parameters hang on the model."""
_STATE = "_fastprefix_attachment"

Model = TypeVar("Model", bound=PreTrainedModel)


class Hooks(Protocol):
    """What a method changed about how a model runs."""

    def remove(self) -> None:
        """Take everything back."""


class Attachment:
    """What ``attach`` did to a model, so that ``detach`` can undo it."""

    def __init__(
        self,
        config: MethodConfig,
        hooks: Hooks,
        requires_grad: dict[str, bool],
        saved_modules: dict[str, dict[str, Tensor]],
    ) -> None:
        self.config = config
        self.hooks: Hooks = hooks
        self.requires_grad = requires_grad  # of the model's own parameters, before
        self.saved_modules = saved_modules  # weights of the modules that stay trainable, before
        self.merged = False
        self.outside: str | None = None  # what of a merged method is not in its parameters, and cannot be saved


def attach(model: Model, config: MethodConfig, *, tokenizer: Any = None) -> Model:
    """Attach a method: the model's own parameters are frozen, the method's are added.

    Args:
        model: a ``transformers`` model; for prefix methods one whose attention goes through the attention interface,
            for prompt methods any with input embeddings.
        config: the method and its options.
        tokenizer: for an initialisation from text; None: the one of the model's name or path.

    Returns:
        The same model. It stays an ordinary ``transformers`` model.

    Raises:
        TypeError: not a ``transformers`` model, or not a method's configuration.
        ValueError: the model has a method attached already, or the method cannot be attached to it, and why.
    """
    plan = _plan(model, config)
    ids = _text_ids(model, config, tokenizer)
    if isinstance(plan.method, PrefixMethod):
        plan.method.reset_parameters(None if ids is None else text_keys_values(model, ids))
    else:
        plan.method.reset_parameters(_table(model), ids)
    return _install(model, config, plan)


def attach_empty(model: Model, config: MethodConfig) -> Model:
    """Attach a method whose parameters are about to be loaded: they are not initialised."""
    return _install(model, config, _plan(model, config))


def detach(model: Model) -> Model:
    """Take the method off: the model, its weights and its behaviour are exactly as they were.

    Raises:
        ValueError: the model has no method attached.
    """
    attachment = attachment_of(model)
    attachment.hooks.remove()
    delattr(model, MODULE)
    delattr(model, _STATE)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weights in attachment.saved_modules.items():
            for key, parameter in modules[name].named_parameters():
                parameter.copy_(weights[key])
                parameter.grad = None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attachment.requires_grad[name])
    return model


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a model.

    Raises:
        ValueError: there is none.
    """
    attachment = getattr(model, _STATE, None)
    if not isinstance(attachment, Attachment):
        raise ValueError(f"model takes a model with a method attached (fastprefix.attach), got {type(model).__name__}")
    return attachment


def method_of(model: nn.Module) -> PromptMethod | PrefixMethod:
    """The method attached to a model, with its parameters."""
    attachment_of(model)
    method: PromptMethod | PrefixMethod = getattr(model, MODULE)
    return method


class _Plan(NamedTuple):
    """What is attached, and to what. Making it changes nothing; carrying it out cannot fail."""

    method: PromptMethod | PrefixMethod
    layers: list[Layer]  # the attention layers that the method needs
    prompt_path: str | None  # of a prompt method: "shared", or "textbook: " and why


def _check(model: PreTrainedModel, config: MethodConfig) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model takes a transformers model, got {type(model).__name__}")
    if not isinstance(config, MethodConfig):
        raise TypeError(f"config takes a method's configuration, such as PrefixTuningConfig, got {config!r}")
    if hasattr(model, _STATE):
        raise ValueError("model has a method attached already: detach it first")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model takes an encoder or a decoder, got the encoder-decoder {type(model).__name__}")
    trainable_modules(model, config.modules_to_save)


def _plan(model: PreTrainedModel, config: MethodConfig) -> _Plan:
    """The method's module for a model, not yet initialised: on its device, float32 where the model is smaller."""
    _check(model, config)
    method_class = METHODS[config.method_name()][1]
    layers: list[Layer] = []
    path = None
    method: PromptMethod | PrefixMethod
    if issubclass(method_class, PrefixMethod):
        layers = find_layers(model)
        method = method_class(config, [layer.shape for layer in layers])
        if method.needs_hidden() and (lost := [layer.name for layer in layers if layer.entry is None]):
            raise ValueError(f"model takes one whose layers' input can be watched, for the gate; not found: {lost}")
    else:
        method = method_class(config, EmbeddingShape(*_table(model).shape))
        path = _prompt_path(model, config)
        layers = find_layers(model) if path == "shared" else []
    method.to(device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
    return _Plan(method, layers, path)


def _prompt_path(model: PreTrainedModel, config: Any) -> str:
    """How the prompt will run: "shared", or "textbook: " and why."""
    if config.shared_prompt is False:
        return "textbook: shared_prompt=False"
    reason = reason_not_shareable(model)
    if reason is None:
        return "shared"
    if config.shared_prompt is True:
        raise ValueError(f"shared_prompt=True cannot be exact on {type(model).__name__}: {reason}")
    return f"textbook: {reason}"


def _table(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _install(model: Model, config: MethodConfig, plan: _Plan) -> Model:
    """Freeze the model, hang the method on it, set its hooks."""
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    saved_modules = {}
    for name, module in trainable_modules(model, config.modules_to_save).items():
        saved_modules[name] = {key: p.detach().clone() for key, p in module.named_parameters()}
        module.requires_grad_(True)
    method, layers, path = plan
    model.add_module(MODULE, method.train(model.training))
    hooks: Hooks
    if isinstance(method, PrefixMethod):
        hooks = PrefixAttachment(model, method, layers)
    else:
        method.prompt_path = path
        required = method.config.shared_prompt is True
        hooks = (
            SharedPromptAttachment(model, method, layers, required)
            if path == "shared"
            else PromptAttachment(model, method)
        )
    setattr(model, _STATE, Attachment(copy.deepcopy(config), hooks, requires_grad, saved_modules))
    return model


def _text_ids(model: PreTrainedModel, config: Any, tokenizer: Any) -> Tensor | None:
    """The token ids ``[m]`` of the text that a method starts from, repeated to its length; None: from no text."""
    if config.init_text is None:
        return None
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError("tokenizer takes the model's tokenizer for init_text, since the model has no name or path")
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"init_text takes a text of at least one token, got {config.init_text!r}")
    length = config.num_virtual_tokens
    return torch.tensor((ids * -(-length // len(ids)))[:length])
