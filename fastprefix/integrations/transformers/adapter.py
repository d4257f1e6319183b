"""Hold the adapters of a model. Each adapter is a method under a name, and one adapter at a time is in use.

This module also finds the modules of the base model that stay trainable, and casts between their precision and the
model's.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Iterable
from typing import Any, NoReturn, Protocol
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ...methods import Composition, MethodConfig, PrefixMethod, PromptMethod, VisualMethod
from .models.attention import restore_checkpoints
from .models.discovery import find_embedding
from .models.switching import OPTIONS, OwnConfigurations, User, find_device
from .models.tuners import Frozen, find_taken_by_peft, has_tuner_layers, list_tuner_parameters
from .sharding.fully_sharded import shard_like
from .sharding.tensor_parallel import is_sharded, write_whole

_FRESH_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")


def find_trainable_modules(model: PreTrainedModel, names: list[str] | None) -> dict[str, nn.Module]:
    """Return the modules that stay trainable, by name.

    If ``names`` is None, these are the heads of a model for classification, question answering or multiple choice,
    except for a head that PEFT trains.

    Raises:
        ValueError: if the model has no module with one of the names, or PEFT trains or has added layers to a named
            module.
    """
    if names is not None:
        modules = dict(model.named_modules())
        if missing := [name for name in names if name not in modules or not name]:
            ends = tuple(f".{name}" for name in missing)
            close = [name for name in modules if name.endswith(ends)][:3]
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise ValueError(
                f"`modules_to_save` must name modules of {type(model).__name__}, which has no {missing}.{hint}"
            )
        if taken := find_taken_by_peft(model, names):
            raise ValueError(f"`modules_to_save` must name modules that PEFT does not train, but PEFT trains {taken}.")
        return {name: modules[name] for name in names}
    if not _FRESH_HEAD.search(type(model).__name__):
        return {}
    heads = {name: child for name, child in model.named_children() if not _is_pretrained(model, child)}
    taken = find_taken_by_peft(model, heads)
    return {name: head for name, head in heads.items() if name not in taken and list(head.parameters())}


def _is_pretrained(model: PreTrainedModel, child: nn.Module) -> bool:
    """Return whether a child of a classifier is or contains a part of the pretrained model."""
    parts = (model.base_model, find_embedding(model))
    return any(isinstance(module, PreTrainedModel) or module in parts for module in child.modules())


def find_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers of named modules, by their full names.

    If a tensor has several names in these modules, which may share it or contain each other, it has the first one.
    """
    found: dict[Tensor, str] = {}
    for name in names:
        for path, module in model.get_submodule(name).named_modules(prefix=name):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    found.setdefault(tensor, f"{path}.{key}")
    return {name: tensor for tensor, name in found.items()}


def is_saved_by_transformers(model: nn.Module) -> bool:
    """Return whether ``add_adapter`` of ``transformers`` added PEFT's layers, which ``save_pretrained`` then saves."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def list_labels(model: PreTrainedModel) -> list[str]:
    """Return the names of the labels of a classifier, or an empty list."""
    return list((getattr(model.config, "id2label", None) or {}).values())


MODULE = "fastprefix"
"""The attribute of the model that holds the module of the adapter in use."""

TOGETHER = "fastprefix_together"
"""The attribute of the model that holds the modules of other adapters that are trained together with that one."""

Method = PromptMethod | PrefixMethod | VisualMethod


class Hooks(Protocol):
    """The changes that a method makes to the forward pass of a model."""

    def install(self, model: PreTrainedModel) -> None:
        """Make the changes. This may be called again after ``remove``."""

    def remove(self) -> None:
        """Undo the changes, also those of an ``install`` that raised an error."""


def _copy_for_training(parameter: Tensor) -> Tensor:
    """Return a trainable copy of a parameter, in float32 or higher, as optimizers and gradient scalers require.

    A shard of a parameter keeps its precision, because it is gathered together with other parameters.
    """
    weight = parameter.detach().clone()
    if isinstance(parameter, DTensor):
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) if weight.is_floating_point() else weight


_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Casts:
    """The hooks that let some modules train in float32 within a model of lower precision.

    The inputs of these modules are cast to their own precision, and their outputs to the precision of the model. Other
    modules that share one of their parameters, such as a tied embedding, get the same hooks. If other code replaces one
    of these modules, as ``resize_token_embeddings`` does, the next call of the model moves the hooks.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = list(names)
        self.handles: list[RemovableHandle] = []
        self.model_parameter: Tensor | None = None  # shows the current precision of the model
        self.find(model)
        self.precision = self.read_model_precision()

    def find(self, model: nn.Module) -> None:
        """Find the modules that get hooks, and their parameters."""
        called = [each for name in self.names for each in _list_called(model.get_submodule(name))]
        within = {each for module in called for each in module.modules() if each is not module}
        own = {p for module in called for p in module.parameters() if p.is_floating_point()}
        tied = [module for module in model.modules() if not own.isdisjoint(module._parameters.values())]
        chosen = {*called, *tied} - within
        self.modules = {name: module for name, module in model.named_modules() if module in chosen}
        self._find_parameters(model)

    def _find_parameters(self, model: nn.Module) -> None:
        """Find the parameters of these modules, and one that shows the precision of the rest of the model."""
        self.parameters = [p for of in self.modules.values() for p in of.parameters() if p.is_floating_point()]
        own = set(self.parameters)
        added = {each.parameter for each in list_tuner_parameters(model)}  # float32 in any model
        added |= {p for name, p in model.named_parameters() if name.startswith((f"{MODULE}.", f"{TOGETHER}."))}
        frozen = [p for p in model.parameters() if p not in own and p not in added and p.dtype in _PRECISIONS]
        precision = self.read_model_precision() or next((p.dtype for p in self.parameters), None)
        alike = [p for p in frozen if p.dtype is precision]
        self.model_parameter = next(iter(alike or frozen), None)

    def read_model_precision(self) -> torch.dtype | None:
        """Return the current precision of the model, or None if all of its parameters are trained."""
        return None if self.model_parameter is None else self.model_parameter.dtype

    def fit_weight(self, weight: Tensor, trained: bool) -> Tensor:
        """Return a stored weight in the current precision of the model, which may have changed since."""
        now = self.read_model_precision()
        if now is not None and now is not self.precision and weight.is_floating_point():
            weight = weight.to(torch.promote_types(now, torch.float32) if trained else now)
        return weight

    def install(self, model: nn.Module) -> None:
        """Register the hooks if the precisions differ."""
        self.precision = self.read_model_precision()
        self._register(model)

    def _register(self, model: nn.Module) -> None:
        if all(p.dtype is self.read_model_precision() for p in self.parameters):
            return
        self.handles.append(model.register_forward_pre_hook(self._renew))
        for module in self.modules.values():
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave))

    def remove(self) -> None:
        """Remove the hooks."""
        self._unregister()
        self.precision = self.read_model_precision()

    def _unregister(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _renew(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Move the hooks if other code has replaced modules (a forward pre-hook of the model)."""
        if torch.compiler.is_compiling():
            return
        found = {name: _find_module(model, name) for name in self.modules}
        if found != self.modules:
            # A replaced module may no longer share the parameter of another one, such as a tied head.
            self.modules = {name: module for name, module in found.items() if module is not None}
            self._find_parameters(model)
            self._unregister()
            self._register(model)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cast the inputs of a module to the precision of its parameters (a forward pre-hook)."""
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return _cast((args, kwargs), dtype)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Cast the outputs of a module to the precision of the model (a forward hook)."""
        precision = self.read_model_precision()
        return output if precision is None else _cast(output, precision)


def _find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module that a model has under a name, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _list_called(module: nn.Module) -> list[nn.Module]:
    """Return the module, or the modules inside it if it is a ``ModuleList`` or ``ModuleDict``."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [module] if list(module.parameters()) else []
    return [each for child in module.children() for each in _list_called(child)]


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Return nested values with all floating-point tensors cast to a dtype."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)


class Adapter:
    """An adapter: a method, its hooks, and its weights for the modules of the base model that it trains.

    The adapter in use is on the model. The others are stored.
    """

    def __init__(
        self, model: PreTrainedModel, config: MethodConfig, method: Method, hooks: Hooks, freeze_peft: bool = False
    ) -> None:
        self.config = config
        self.method = method
        self.hooks = hooks
        self.identity = uuid.uuid4().hex
        """Distinguishes this adapter from another one that gets its name later. Copies of the adapter keep it."""
        frozen = set(method.list_frozen()) if isinstance(method, Composition) else set()
        named = method.named_parameters()
        self.trained = [name for name, parameter in named if parameter.requires_grad and parameter not in frozen]
        self.freeze_peft = freeze_peft
        self.frozen = Frozen()  # the parameters of PEFT that this adapter freezes while it is on the model
        self.merged = False
        self.guard: RemovableHandle | None = None  # refuses training while the adapter is merged and on the model
        self.outside: str | None = None  # why a merged method cannot be saved: a part is not in its parameters
        self.saved_modules = list(find_trainable_modules(model, config.modules_to_save))
        """The names of the modules of the base model that the adapter trains."""
        if config.modules_to_save is None and has_tuner_layers(model):
            config.modules_to_save = list(self.saved_modules)  # the default would differ without PEFT's layers
        state = find_state(model, self.saved_modules)
        self.stored = {name: _copy_for_training(tensor) for name, tensor in state.items()}
        """The state of these modules that is not in use: the base model's or the adapter's."""
        self.casts = Casts(model, self.saved_modules)
        self.labels: list[str] | None = None
        """The names of the labels that are not in use: the base model's or those of the adapter's head."""

    def put_on(self, model: PreTrainedModel) -> None:
        """Install the adapter on the model, which then runs and trains with it. After an error, it is not installed."""
        self.check_untouched(model)
        method = self.method if is_sharded(self.method) else self.method.to(find_device(model))
        self._exchange_state(model, trained=True)
        if self.freeze_peft or self.merged:
            self.frozen.freeze(model, own=self.method.parameters())
        self._exchange_labels(model)
        self.casts.install(model)
        for name in self.saved_modules:
            model.get_submodule(name).requires_grad_(not self.merged)
        model.add_module(MODULE, method.train(model.training))
        try:
            for part in method.parts if isinstance(method, Composition) else [method]:
                shard_like(model, part)
            self.mark(model)
            self.hooks.install(model)
        except BaseException:
            self.take_off(model)
            raise

    def mark(self, model: PreTrainedModel) -> None:
        """Write the adapter's options into the model's configuration, for checkpoints of the whole model.

        With a merged adapter, ``save_pretrained`` and training of the model raise an error. The saved weights would
        be those of a different model. A model that saves only PEFT's layers also saves another adapter.
        """
        from .files.checkpoints import save_with_adapter

        setattr(model.config, OPTIONS, self.config.to_dict())
        if self.merged:
            vars(model)["save_pretrained"] = _refuse_saving
            self.guard = model.register_forward_hook(_refuse_training)
        elif is_saved_by_transformers(model):
            vars(model)["save_pretrained"] = functools.partial(save_with_adapter, model)

    def take_off(self, model: PreTrainedModel) -> None:
        """Remove the adapter from the model. The model stays frozen."""
        self.hooks.remove()  # first, since the hooks of a merged adapter can replace a module that is trained
        try:
            self._exchange_state(model, trained=False)
        except BaseException:
            self.hooks.install(model)
            raise
        delattr(model, MODULE)
        vars(model.config).pop(OPTIONS, None)
        vars(model).pop("save_pretrained", None)
        if self.guard is not None:
            self.guard.remove()
        for name in self.saved_modules:
            model.get_submodule(name).requires_grad_(False)
        self._exchange_labels(model)
        self.casts.remove()
        self.frozen.release(model)

    def check_untouched(self, model: PreTrainedModel) -> None:
        """Check that PEFT has not added layers to the modules of this adapter.

        Raises:
            ValueError: if PEFT has added layers to the method or to a module that the adapter trains.
        """
        inside, taken = has_tuner_layers(self.method), find_taken_by_peft(model, self.saved_modules)
        if inside or taken:
            what = "the adapter's own network" if inside else f"{taken}, which the adapter trains"
            raise ValueError(
                f"`model` has layers of PEFT in {what}. Name other modules in PEFT's configuration, or add PEFT's "
                "layers before fastprefix.attach."
            )

    def train_again(self) -> None:
        """Unfreeze the parameters that PEFT froze when it added its layers."""
        for name in self.trained:
            self.method.get_parameter(name).requires_grad_()

    def drop_gradients(self, model: PreTrainedModel) -> None:
        """Drop the gradients of the modules that the adapter trained, so that the next adapter starts without them."""
        for name in self.saved_modules:
            model.get_submodule(name).zero_grad()

    def name_labels(self, model: PreTrainedModel, labels: list[str] | None) -> None:
        """Give the model the names of the labels of the adapter's head, unless it already has names."""
        if labels is not None and all(re.fullmatch(r"LABEL_\d+", name) for name in list_labels(model)):
            self.labels = labels
            self._exchange_labels(model)

    def _exchange_labels(self, model: PreTrainedModel) -> None:
        if self.labels is not None:
            names, self.labels = self.labels, list_labels(model)
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: i for i, name in enumerate(names)}

    def _exchange_state(self, model: PreTrainedModel, trained: bool) -> None:
        """Exchange the stored state with the model's through ``data``.

        The modules keep their parameters, so optimizers and compiled code remain valid. A graph that was recorded
        before is valid again once this adapter is back on the model. Until then, ``BackwardGuard`` refuses its backward
        pass.

        All new tensors are made before the first exchange. Nothing changes if memory runs out.
        """
        if self.stored:
            self.casts.find(model)
        state = {name: each for name, each in find_state(model, self.saved_modules).items() if name in self.stored}
        former, new = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in state.items():
            weight = self.casts.fit_weight(self.stored[name], trained).to(tensor.device)
            if isinstance(tensor, DTensor):  # the memory belongs to FSDP2 or tensor parallelism
                former[name], new[name] = tensor.detach().clone(), weight
            else:
                former[name], new[name] = tensor.data, _fit_shape(weight, tensor.data)
        for name, tensor in state.items():
            if isinstance(tensor, DTensor):
                write_whole(tensor, new[name])
            else:
                tensor.data = new[name]
        self.stored |= former


def _fit_shape(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the shape of another one that was resized. Elements beyond it are those of the other one."""
    if tensor.shape == other.shape:
        return tensor
    grown = other.to(tensor.dtype, copy=True)
    common = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, other.shape, strict=True))
    grown[common] = tensor[common]
    return grown


def _is_tracing() -> bool:
    # PyTorch declares no types for ``torch.jit.is_tracing``.
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _refuse_saving(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        "`save_pretrained` cannot save a model with a merged adapter, since its weights would load as a different "
        "model. Save the adapter with fastprefix.save_adapter before merging, then load it and merge again."
    )


def _refuse_training(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Make the outputs that a training loop would differentiate raise an error in the backward pass (a forward hook).

    These outputs are losses. In training mode, they are all floating-point tensors.
    """
    if not torch.is_grad_enabled() or _is_tracing():
        return output

    trains = any(each.parameter.requires_grad for each in list_tuner_parameters(module))  # PEFT may unfreeze them

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
    """The identity, whose backward pass raises an error."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()  # not a view, since Trainer scales losses in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise RuntimeError(
            "the adapter on `model` is merged, so the model cannot be trained. Call fastprefix.detach, then attach or "
            "load the adapter again."
        )


def _name_module(name: str) -> str:
    """Return a name for a module of a ``ModuleDict``. Names of its methods, such as "keys", are not allowed there."""
    return "adapter_" + quote(name, safe="").replace(".", "%2E")


class BackwardGuard:
    """Refuse a backward pass while the modules that adapters train have other weights than in the forward pass.

    A graph refers to the parameters, whose values are exchanged with the adapter. Compiled calls are not guarded.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles: list[RemovableHandle] = []

    def install(self, model: PreTrainedModel) -> None:
        """Guard the outputs of a model and of the models inside it if any adapter trains modules."""
        self.remove()
        if any(adapter.saved_modules for adapter in self.attachment.adapters.values()):
            models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
            self.handles = [each.register_forward_hook(self.guard) for each in models]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def guard(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Make the backward pass of an output check whose weights are on the model (a forward hook)."""
        if not torch.is_grad_enabled() or _is_tracing():
            return
        owner, name = self._find_owner(), self.attachment.active

        def check(gradient: Tensor) -> None:
            if self._find_owner() is not owner:
                raise RuntimeError(_explain_other_weights(None if owner is None else name))

        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.register_hook(check)

    def _find_owner(self) -> Adapter | None:
        """Return the adapter whose weights the trained modules have now, or None for those of the base model."""
        active = self.attachment.active
        adapter = None if active is None else self.attachment.adapters[active]
        return adapter if adapter is not None and adapter.saved_modules else None


def _explain_other_weights(name: str | None) -> str:
    if name is None:
        return (
            "`backward` must run with the base model's weights of its trained modules, as the forward pass did, but an "
            "adapter that trains these modules is in use now. Call `backward` before you select that adapter."
        )
    return (
        f"`backward` must run with adapter {name!r} in use, as the forward pass did, since the modules that it trains "
        f"have other weights now. Call fastprefix.set_adapter(model, {name!r}) before `backward`."
    )


class Attachment:
    """The adapters of a frozen model, and the state of the model before."""

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
        self.together: set[str] = set()  # the names of adapters that are trained in the same batches
        self.routing: Any = None  # selects the adapters for the rows of each call
        self.backward_guard = BackwardGuard(self)
        self.carried = False  # True once a PEFT model around the model also saves and loads the adapter in use
        if not self.had_tuners:  # otherwise PEFT has already frozen the base model
            model.requires_grad_(False)
        if self.quantized:
            vars(model)["is_quantized"] = (
                False  # Trainer refuses quantized models, but the quantized weights are not trained here
            )

    def release(self, model: PreTrainedModel) -> None:
        """Restore the state of the model after its last adapter is removed. New parameters stay as they are."""
        if self.had_tuners or not has_tuner_layers(model):  # a model that PEFT has frozen since stays frozen
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        self.configurations.release()
        self.backward_guard.remove()
        restore_checkpoints(model)
        if self.quantized:
            vars(model)["is_quantized"] = True

    @property
    def adapter(self) -> Adapter:
        """Return the adapter in use.

        Raises:
            ValueError: if no adapter is in use.
        """
        if self.active is None:
            names = ", ".join(map(repr, self.adapters))
            raise ValueError(
                f"`model` has none of its adapters in use, which are {names}. Call fastprefix.set_adapter."
            )
        return self.adapters[self.active]

    def list_own_labels(self, model: PreTrainedModel) -> list[str]:
        """Return the names of the labels that a model has without the adapter in use."""
        exchanged = None if self.active is None else self.adapter.labels
        return list_labels(model) if exchanged is None else exchanged

    def register_together(self, model: PreTrainedModel) -> None:
        """Make the methods that are trained together with the one in use parts of the model.

        Trainer, DistributedDataParallel and checkpoints only see parameters that are parts of the model.
        """
        if TOGETHER in model._modules:
            delattr(model, TOGETHER)
        others = {name: each.method for name, each in self.adapters.items() if name in self.together - {self.active}}
        if others:
            model.add_module(TOGETHER, nn.ModuleDict({_name_module(name): each for name, each in others.items()}))

    def check_known(self, name: str) -> str:
        """Return a name if an adapter has this name.

        Raises:
            ValueError: if no adapter has this name.
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
