"""Hold the adapters of a model: each is a method under a name, and one of them at a time is in use.

Also: which modules of the base model stay trainable, and which models are sharded over processes.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ...methods import MethodConfig, PrefixMethod, PromptMethod
from .switching import OPTIONS, OwnConfigurations, User, device_of


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are spread over processes, as by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered from all processes."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def check_whole(model: nn.Module) -> None:
    """Refuse to change what a model trains once it is spread: its processes would not exchange those gradients.

    Raises:
        ValueError: it is sharded, or has a tensor-parallel plan.
    """
    name, size = type(model).__name__, getattr(model, "tp_size", None) or 1
    if size > 1:
        raise ValueError(f"model takes one without a tensor-parallel plan, got {name} with tp_size={size}")
    if is_sharded(model):
        raise ValueError(
            f"model takes one that is not sharded, got {name} with sharded parameters: attach, switch and detach "
            "before fully_shard"
        )


_FRESH_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")


def trainable_modules(model: PreTrainedModel, names: list[str] | None) -> dict[str, nn.Module]:
    """The modules that stay trainable, by name.

    Raises:
        ValueError: a name that the model does not have.
    """
    if names is not None:
        modules = dict(model.named_modules())
        if missing := [name for name in names if name not in modules or not name]:
            raise ValueError(f"modules_to_save takes names of modules of {type(model).__name__}, got {missing}")
        return {name: modules[name] for name in names}
    if not _FRESH_HEAD.search(type(model).__name__):
        return {}
    children = model.named_children()
    return {name: child for name, child in children if child is not model.base_model and list(child.parameters())}


MODULE = "fastprefix"
"""The name under which the parameters of the adapter in use hang on the model."""

Method = PromptMethod | PrefixMethod


class Hooks(Protocol):
    """What a method changes about how a model runs."""

    def install(self, model: PreTrainedModel) -> None:
        """Make the changes, again after ``remove`` too."""

    def remove(self) -> None:
        """Take everything back."""


class Adapter:
    """A method, its hooks and its weights of the base modules that it trains: on the model, or waiting beside it."""

    def __init__(self, model: PreTrainedModel, config: MethodConfig, method: Method, hooks: Hooks) -> None:
        self.config = config
        self.method = method
        self.hooks = hooks
        self.merged = False
        self.guard: RemovableHandle | None = None  # against training, while it is merged and on the model
        self.outside: str | None = None  # what of a merged method is not in its parameters, and cannot be saved
        modules = trainable_modules(model, config.modules_to_save)
        self.saved_modules: dict[str, dict[str, Tensor]] = {
            name: {key: p.detach().clone() for key, p in module.named_parameters()} for name, module in modules.items()
        }
        """Weights of those modules: the base model's while the adapter is on the model, otherwise the adapter's."""

    def put_on(self, model: PreTrainedModel) -> None:
        """Make the model run and train with this adapter."""
        self._exchange_weights(model)
        for name in self.saved_modules:
            model.get_submodule(name).requires_grad_(not self.merged)
        model.add_module(MODULE, self.method.to(device_of(model)).train(model.training))
        self.mark(model)
        self.hooks.install(model)

    def mark(self, model: PreTrainedModel) -> None:
        """Say in the model's configuration what is on it, for checkpoints of the whole; merged, it makes none: what
        ``save_pretrained`` would write, is no model when it is read again.
        """
        setattr(model.config, OPTIONS, self.config.to_dict())
        if self.merged:
            vars(model)["save_pretrained"] = _refuse_saving
            self.guard = model.register_forward_hook(_refuse_training)

    def take_off(self, model: PreTrainedModel) -> None:
        """Make the model, which stays frozen, what it is without."""
        self.hooks.remove()
        delattr(model, MODULE)
        vars(model.config).pop(OPTIONS, None)
        vars(model).pop("save_pretrained", None)
        if self.guard is not None:
            self.guard.remove()
        for name in self.saved_modules:
            model.get_submodule(name).requires_grad_(False)
        self._exchange_weights(model)

    def drop_gradients(self, model: PreTrainedModel) -> None:
        """Of the modules that it trained: they are not for whoever trains them next."""
        for name in self.saved_modules:
            model.get_submodule(name).zero_grad()

    def _exchange_weights(self, model: PreTrainedModel) -> None:
        """Exchange ``data``: a graph that was made before the adapter was taken off is good once it is on again."""
        for name, weights in self.saved_modules.items():
            for key, parameter in model.get_submodule(name).named_parameters():
                if key in weights:
                    weights[key], parameter.data = parameter.data, _grown(weights[key].to(parameter), parameter.data)


def _grown(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the shape of another, which has since been resized, with what the other has beyond it."""
    if tensor.shape == other.shape:
        return tensor
    grown = other.clone()
    common = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, other.shape, strict=True))
    grown[common] = tensor[common]
    return grown


def _refuse_saving(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        "save_pretrained takes a model without a merged adapter, whose weights would be read as another model's: keep "
        "the adapter (fastprefix.save_adapter, before merging) beside the base model, load it and merge again"
    )


def _refuse_training(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Have the outputs that a training loop would differentiate raise an error then (a forward hook).

    These are losses, and while the model is in training mode all floating tensors.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return output

    def guarded(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
            return value
        if value.ndim > 0 and not module.training:
            return value
        return _Untrainable.apply(value, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]

    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = guarded(value)
        return output
    return tuple(map(guarded, output)) if type(output) is tuple else guarded(output)


class _Untrainable(torch.autograd.Function):
    """The identity, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()  # no view, since Trainer scales losses in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise RuntimeError(
            "the adapter on `model` is merged, so nothing of the model can be trained: call fastprefix.detach first, "
            "then attach or load the adapter again"
        )


class Attachment:
    """The adapters of a model that is frozen, and how it was before."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.user = User(type(model).__name__)
        self.configurations = OwnConfigurations(model, self.user)
        self.quantized: bool = getattr(model, "is_quantized", False)
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        model.requires_grad_(False)
        if self.quantized:
            vars(model)["is_quantized"] = (
                False  # Trainer refuses to train quantised weights, and these it does not train
            )

    def release(self, model: PreTrainedModel) -> None:
        """Make the model, which has no adapters any more, what it was before; what it gained since stays as it is."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        self.configurations.release()
        if self.quantized:
            vars(model)["is_quantized"] = True

    @property
    def adapter(self) -> Adapter:
        """The one in use.

        Raises:
            ValueError: there is none in use.
        """
        if self.active is None:
            names = ", ".join(map(repr, self.adapters))
            raise ValueError(f"model has none of its adapters in use, which are {names}: see fastprefix.set_adapter")
        return self.adapters[self.active]

    def known(self, name: str) -> str:
        """A name that one of the adapters has.

        Raises:
            ValueError: none has it.
        """
        if name not in self.adapters:
            raise ValueError(f"name takes one of {', '.join(map(repr, self.adapters))}, got {name!r}")
        return name

    @property
    def config(self) -> MethodConfig:
        """Of the adapter in use."""
        return self.adapter.config

    @property
    def hooks(self) -> Hooks:
        """Of the adapter in use."""
        return self.adapter.hooks
