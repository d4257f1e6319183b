"""Hold the adapters of a model: each is a method under a name, and one of them at a time is in use.

Also: which modules of the base model stay trainable, and which models are sharded over processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ...methods import Composition, MethodConfig, PrefixMethod, PromptMethod, VisualMethod
from .models.switching import OPTIONS, OwnConfigurations, User, find_device
from .models.tuners import Frozen, find_taken_by_peft, has_tuner_layers, list_tuner_parameters
from .sharding.fully_sharded import shard_like
from .sharding.tensor_parallel import is_sharded, write_whole

_FRESH_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")


def find_trainable_modules(model: PreTrainedModel, names: list[str] | None) -> dict[str, nn.Module]:
    """Return the modules that stay trainable, by name. A head that PEFT trains is left to PEFT.

    Raises:
        ValueError: a name that the model does not have, or of a module that PEFT has put its layers into.
    """
    if names is not None:
        modules = dict(model.named_modules())
        if missing := [name for name in names if name not in modules or not name]:
            raise ValueError(f"`modules_to_save` must name modules of {type(model).__name__}, which has no {missing}.")
        if taken := find_taken_by_peft(model, names):
            raise ValueError(f"`modules_to_save` must name modules that PEFT does not train and save, but has {taken}.")
        return {name: modules[name] for name in names}
    if not _FRESH_HEAD.search(type(model).__name__):
        return {}
    children = dict(model.named_children())
    heads = {name: child for name, child in children.items() if child is not model.base_model}
    taken = find_taken_by_peft(model, heads)
    return {name: head for name, head in heads.items() if name not in taken and list(head.parameters())}


MODULE = "fastprefix"
"""The name under which the parameters of the adapter in use hang on the model."""

Method = PromptMethod | PrefixMethod | VisualMethod


class Hooks(Protocol):
    """The changes of a method to how a model runs."""

    def install(self, model: PreTrainedModel) -> None:
        """Make the changes, again after ``remove`` too."""

    def remove(self) -> None:
        """Undo the changes."""


def _copy_for_training(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter to train: float32 where the model is smaller, as optimizers and scalers need it.

    A part of a parameter that is sharded keeps its precision, in which it is gathered with others.
    """
    weight = parameter.detach().clone()
    if isinstance(parameter, DTensor):
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) if weight.is_floating_point() else weight


_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Casts:
    """The hooks of modules that are trained in float32 within a model of lower precision.

    Their inputs are cast to their own precision, and their outputs to that of the model, so that nothing around them
    notices. Modules outside that have one of their parameters, as a tied embedding does, are treated alike.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        called = [each for module in modules for each in _list_called(module)]
        inside = {each for module in called for each in module.modules()}
        self.parameters = [p for module in called for p in module.parameters() if p.is_floating_point()]
        own = set(self.parameters)
        tied = [m for m in model.modules() if m not in inside and not own.isdisjoint(m._parameters.values())]
        self.modules = [*called, *tied]
        added = {each.parameter for each in list_tuner_parameters(model)}  # float32 in any model
        frozen = [p for p in model.parameters() if p not in own and p not in added and p.dtype in _PRECISIONS]
        alike = [p for p in frozen if own and p.dtype is self.parameters[0].dtype]
        self.model_parameter = next(iter(alike or frozen), None)  # tells in which precision the model is now
        self.precision = self.read_model_precision()
        self.handles: list[RemovableHandle] = []

    def read_model_precision(self) -> torch.dtype | None:
        """Return the precision that the model has now, or None where all of it is trained."""
        return None if self.model_parameter is None else self.model_parameter.dtype

    def fit_weight(self, weight: Tensor, trained: bool) -> Tensor:
        """Return a weight that waited beside the model, which may have been moved and given another precision."""
        now = self.read_model_precision()
        if now is not None and now is not self.precision and weight.is_floating_point():
            weight = weight.to(torch.promote_types(now, torch.float32) if trained else now)
        return weight

    def install(self) -> None:
        """Set the hooks, where the precisions differ."""
        self.precision = self.read_model_precision()
        if all(p.dtype is self.precision for p in self.parameters):
            return
        for module in self.modules:
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.precision = self.read_model_precision()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cast the inputs of a module to the precision of its parameters (a forward pre-hook)."""
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return _cast((args, kwargs), dtype)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Cast the outputs of a module to the precision of the model (a forward hook)."""
        precision = self.read_model_precision()
        return output if precision is None else _cast(output, precision)


def _list_called(module: nn.Module) -> list[nn.Module]:
    """Return the module, or in place of a mere container the modules in it."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [module] if list(module.parameters()) else []
    return [each for child in module.children() for each in _list_called(child)]


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Return nested values with all floating tensors in another precision."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)


class Adapter:
    """A method, its hooks and its weights of the base modules that it trains: on the model, or waiting beside it."""

    def __init__(
        self, model: PreTrainedModel, config: MethodConfig, method: Method, hooks: Hooks, freeze_peft: bool = False
    ) -> None:
        self.config = config
        self.method = method
        self.hooks = hooks
        self.trained = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
        self.freeze_peft = freeze_peft
        self.frozen = Frozen()  # what PEFT trains, while this adapter is on the model and does not let it
        self.merged = False
        self.guard: RemovableHandle | None = None  # against training, while it is merged and on the model
        self.outside: str | None = None  # what of a merged method is not in its parameters, and cannot be saved
        modules = find_trainable_modules(model, config.modules_to_save)
        if config.modules_to_save is None and has_tuner_layers(model):
            config.modules_to_save = list(modules)  # without PEFT's layers it would be others
        self.saved_modules: dict[str, dict[str, Tensor]] = {
            name: {key: _copy_for_training(p) for key, p in module.named_parameters()}
            for name, module in modules.items()
        }
        """Weights of those modules: the base model's while the adapter is on the model, otherwise the adapter's."""
        self.casts = Casts(model, modules.values())

    def put_on(self, model: PreTrainedModel) -> None:
        """Make the model run and train with this adapter."""
        self.check_untouched(model)
        if self.freeze_peft or self.merged:
            self.frozen.freeze(model, own=self.method.parameters())
        self._exchange_weights(model, trained=True)
        self.casts.install()
        for name in self.saved_modules:
            model.get_submodule(name).requires_grad_(not self.merged)
        method = self.method if is_sharded(self.method) else self.method.to(find_device(model))
        model.add_module(MODULE, method.train(model.training))
        for part in method.parts if isinstance(method, Composition) else [method]:
            shard_like(model, part)
        self.mark(model)
        self.hooks.install(model)

    def mark(self, model: PreTrainedModel) -> None:
        """Write the adapter's options into the model's configuration, for checkpoints of the whole model.

        With a merged adapter the model refuses to be saved: ``save_pretrained`` would write weights that are read as
        another model's.
        """
        setattr(model.config, OPTIONS, self.config.to_dict())
        if self.merged:
            vars(model)["save_pretrained"] = _refuse_saving
            self.guard = model.register_forward_hook(_refuse_training)

    def take_off(self, model: PreTrainedModel) -> None:
        """Restore the model without the adapter. It stays frozen."""
        self.hooks.remove()
        delattr(model, MODULE)
        vars(model.config).pop(OPTIONS, None)
        vars(model).pop("save_pretrained", None)
        if self.guard is not None:
            self.guard.remove()
        for name in self.saved_modules:
            model.get_submodule(name).requires_grad_(False)
        self._exchange_weights(model, trained=False)
        self.casts.remove()
        self.frozen.release(model)

    def check_untouched(self, model: PreTrainedModel) -> None:
        """Refuse to go on if PEFT has put its layers into what this adapter consists of.

        Raises:
            ValueError: it has.
        """
        inside, taken = has_tuner_layers(self.method), find_taken_by_peft(model, self.saved_modules)
        if inside or taken:
            what = "the adapter's own network" if inside else f"{taken}, which the adapter trains"
            raise ValueError(
                f"`model` has layers of PEFT in {what}. Name other modules in PEFT's options, or add PEFT's layers "
                "before fastprefix.attach."
            )

    def train_again(self) -> None:
        """Let be trained what PEFT has frozen in adding its layers."""
        for name in self.trained:
            self.method.get_parameter(name).requires_grad_()

    def drop_gradients(self, model: PreTrainedModel) -> None:
        """Drop the gradients of the modules that the adapter trained: they are not for the next one."""
        for name in self.saved_modules:
            model.get_submodule(name).zero_grad()

    def _exchange_weights(self, model: PreTrainedModel, trained: bool) -> None:
        """Exchange ``data``: a graph that was made before the adapter was taken off is good once it is on again."""
        for name, weights in self.saved_modules.items():
            for key, parameter in model.get_submodule(name).named_parameters():
                if key in weights:
                    weight = self.casts.fit_weight(weights[key], trained).to(parameter.device)
                    if isinstance(parameter, DTensor):  # whoever sharded it keeps its memory
                        weights[key] = parameter.detach().clone()
                        write_whole(parameter, weight)
                    else:
                        weights[key], parameter.data = parameter.data, _fit_shape(weight, parameter.data)


def _fit_shape(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the shape of another, which has since been resized, with what the other has beyond it."""
    if tensor.shape == other.shape:
        return tensor
    grown = other.to(tensor.dtype, copy=True)
    common = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, other.shape, strict=True))
    grown[common] = tensor[common]
    return grown


def _refuse_saving(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        "`save_pretrained` cannot save a model with a merged adapter, whose weights would be read as another model's: "
        "keep the adapter (fastprefix.save_adapter, before merging) beside the base model, load it and merge again."
    )


def _refuse_training(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Have the outputs that a training loop would differentiate raise an error then (a forward hook).

    These are losses, and while the model is in training mode all floating tensors.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return output

    trains = any(each.parameter.requires_grad for each in list_tuner_parameters(module))  # PEFT unfreezes by itself

    def guard_value(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or (value.requires_grad and not trains):
            return value
        if value.ndim > 0 and not module.training:
            return value
        return _Untrainable.apply(value, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]

    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = guard_value(value)
        return output
    return tuple(map(guard_value, output)) if type(output) is tuple else guard_value(output)


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
        added = {each.name for each in list_tuner_parameters(model)}
        named = model.named_parameters()
        self.requires_grad = {name: parameter.requires_grad for name, parameter in named if name not in added}
        self.had_tuners = has_tuner_layers(model)
        self.user = User(type(model).__name__)
        self.configurations = OwnConfigurations(model, self.user)
        self.quantized: bool = getattr(model, "is_quantized", False)
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.routing: Any = None  # decides for each call which adapters its rows have
        if not self.had_tuners:  # or PEFT has frozen the model, but for what it trains
            model.requires_grad_(False)
        if self.quantized:
            vars(model)["is_quantized"] = (
                False  # Trainer refuses to train quantised weights, and these it does not train
            )

    def release(self, model: PreTrainedModel) -> None:
        """Make the model, which has no adapters any more, what it was before; what it gained since stays as it is."""
        if self.had_tuners or not has_tuner_layers(model):  # a model that PEFT has frozen since stays frozen
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        self.configurations.release()
        if self.quantized:
            vars(model)["is_quantized"] = True

    @property
    def adapter(self) -> Adapter:
        """Return the adapter in use.

        Raises:
            ValueError: there is none in use.
        """
        if self.active is None:
            names = ", ".join(map(repr, self.adapters))
            raise ValueError(f"model has none of its adapters in use, which are {names}: see fastprefix.set_adapter")
        return self.adapters[self.active]

    def check_known(self, name: str) -> str:
        """Return a name if one of the adapters has it.

        Raises:
            ValueError: none has it.
        """
        if name not in self.adapters:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, self.adapters))}, but is {name!r}.")
        return name

    @property
    def config(self) -> MethodConfig:
        """Return the configuration of the adapter in use."""
        return self.adapter.config

    @property
    def hooks(self) -> Hooks:
        """Return the hooks of the adapter in use."""
        return self.adapter.hooks
