"""Read and change the arguments of a forward call, and carry prefixes through reentrant gradient checkpointing.

Reentrant checkpointing runs a separate backward pass for each checkpointed layer. A prefix that one network computes
for several layers would then be differentiated once per layer, but the network's graph is freed after the first time.
So the layers get leaf tensors instead of such a prefix. An autograd node below the first layer runs its backward after
all layers, and passes the accumulated gradients of the leaves to the network once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from .attention import CHECKPOINT_WRAPPER, Prefix

READ_ARGUMENTS = frozenset(
    {
        *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "use_cache"),
        *("decoder_input_ids", "decoder_attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    }
)
"""The arguments of models that this package reads or writes by name. Caches are found by type instead."""

READ_SETTINGS = frozenset({"use_cache", "output_attentions", "output_router_logits"})
"""The attributes of configurations that provide defaults for arguments that a call leaves out."""

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def read_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's positional forward arguments, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def check_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's positional forward arguments, after checking that none has been renamed.

    Most models lack some of ``READ_ARGUMENTS``, so a missing argument is not an error. A renamed argument is detected
    in one of three ways. The module itself translates the former name. Or the main models of ``transformers`` no longer
    have the name. Or the module accepts a cache, but none of its arguments has a known name for a cache.

    Raises:
        ValueError: if an argument has been renamed.
    """
    names, model = read_parameter_names(module), type(module).__name__
    for old, new in _find_renamed(module.forward).items():
        if old in READ_ARGUMENTS:
            raise ValueError(
                f"`{old}` is called `{new}` in {model}, which this version of fastprefix does not support. {_ADVICE}"
            )
    arguments, settings = _collect_vocabulary()
    if unknown := sorted(READ_ARGUMENTS - arguments - set(names)):
        raise ValueError(f"{_name_library()} has no argument `{unknown[0]}`, which {model} may need. {_ADVICE}")
    if unknown := sorted(READ_SETTINGS - settings):
        raise ValueError(f"{_name_library()} has no setting `{unknown[0]}`, which {model} may need. {_ADVICE}")
    caches = _find_cache_parameters(module.forward)
    if len(caches) == 1 and find_cache_parameter(names) is None:  # codecs have two caches, one for each half
        raise ValueError(
            f"`{caches[0]}` of {model} is a key/value cache with a name that this version of fastprefix does not "
            f"support. {_ADVICE}"
        )
    return names


_ADVICE = "Use a newer version of fastprefix, or a version of transformers that this one supports."


def _name_library() -> str:
    return f"transformers {transformers.__version__}"


def _find_renamed(forward: Callable[..., Any]) -> dict[str, str]:
    """Return the deprecated argument names of a function, mapped to their new names.

    ``deprecate_kwarg`` of ``transformers`` stores both names in the closures of its wrappers.
    """
    renamed: dict[str, str] = {}
    function: Any = forward
    while function is not None:
        code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
        if code is not None and cells:
            closure = {n: c for n, c in zip(code.co_freevars, cells, strict=True) if n in ("old_name", "new_name")}
            if len(closure) == 2 and closure["new_name"].cell_contents is not None:
                renamed[closure["old_name"].cell_contents] = closure["new_name"].cell_contents
        function = getattr(function, "__wrapped__", None)
    return renamed


@functools.cache
def _collect_vocabulary() -> tuple[frozenset[str], frozenset[str]]:
    """Return the arguments and settings of one decoder, one encoder and one encoder-decoder of ``transformers``."""
    kinds = (transformers.LlamaModel, transformers.BertModel, transformers.BartModel)
    arguments = {name for kind in kinds for name in inspect.signature(kind.forward).parameters}
    settings = vars(transformers.MixtralConfig()).keys() | set(dir(transformers.MixtralConfig))
    decorated = {"return_dict"}  # read by a decorator, so it is in no signature
    return frozenset(arguments | TransformersKwargs.__annotations__.keys() | decorated), frozenset(settings)


def _find_cache_parameters(forward: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a function that are annotated as a cache."""
    try:
        hints = typing.get_type_hints(inspect.unwrap(forward))
    except (NameError, TypeError):  # a type that is imported only for type checkers, or not a function
        return []
    kinds = {name: typing.get_args(hint) or (hint,) for name, hint in hints.items() if name != "return"}
    return [n for n, types in kinds.items() if any(isinstance(t, type) and issubclass(t, Cache) for t in types)]


def name_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


Forward = Callable[..., Any]
"""The function that runs a module."""

Around = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
"""A function that runs a call: ``around(forward, args, kwargs)`` returns what the module returns."""


class CallState(threading.local):
    """The state of the call in progress, which differs by thread. It is neither copied nor pickled."""

    def __reduce__(self) -> Any:
        return type(self), ()


class _Owned:
    """A callable on a module that acts for the ``owners``, models around the module.

    A copy of a part of a model, which PEFT makes of the modules that it trains, must not copy the whole model. So a
    copy of the module without one of the owners does not act: its ``around`` is None.
    """

    module: nn.Module
    owners: tuple[nn.Module, ...]
    around: Callable[..., Any] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Owned:
        copied = memo[id(self)] = object.__new__(type(self))
        alone = not any(id(owner) in memo for owner in self.owners)
        for name, value in vars(self).items():
            if not alone or name in ("module", "inner"):
                vars(copied)[name] = copy.deepcopy(value, memo)
        if alone:
            copied.around, copied.owners = None, (copied.module,)
        return copied


class Interception(_Owned):
    """A callable that runs a module's ``forward`` inside another function.

    It works for calls of the module and for direct calls of its ``forward``. It is stored in the instance attribute
    ``forward`` of the module, like accelerate's replacement. If accelerate has already replaced ``forward``, it is
    stored inside that replacement, so either can be removed first. It is copied and pickled with its module.

    The only owner by default is the module itself.
    """

    keyword: ClassVar[str | None] = None
    """An argument that it removes from calls. It is added to the signature for ``generate`` and Trainer's columns."""

    def __init__(self, module: nn.Module, around: Around, owners: Sequence[nn.Module] = ()) -> None:
        self.module = module
        self.owners = tuple(owners) or (module,)
        self.around: Around | None = around
        attributes: dict[str, Any] = vars(module)
        slot = next(name for name in _FORWARD_SLOTS if name in attributes or name == "forward")
        self.inner: Callable[..., Any] | None = attributes.get(slot)  # None: the forward of the module's class
        attributes[slot] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds an unwrapped forward to the module again
            args = args[1:]
        if self.around is None:
            return self.forward(*args, **kwargs)
        return self.around(self.forward, args, kwargs)

    @property
    def forward(self) -> Callable[..., Any]:
        """Return the forward that runs without the interception."""
        if self.inner is None:
            return functools.partial(type(self.module).forward, self.module)
        return self.inner

    @property
    def is_innermost(self) -> bool:
        """Return whether the inner forward is the one of the module's class."""
        return self.inner is None or getattr(self.inner, "__func__", None) is type(self.module).forward

    @property
    def __code__(self) -> types.CodeType:
        """Return the code of the module's own forward, which ``torch.export`` reads the file name from."""
        code: types.CodeType = type(self.module).forward.__code__
        return code

    @property
    def __wrapped__(self) -> Forward:
        """Return the inner forward, for functions that unwrap wrappers."""
        return self.forward

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the signature of the inner forward, plus ``keyword`` if it is set, for ``inspect.signature``."""
        inside = inspect.signature(self.forward)
        if self.keyword is None:
            return inside
        own = inspect.Parameter(self.keyword, inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = [p for p in inside.parameters.values() if p.name != self.keyword]
        last = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        return inside.replace(parameters=[*(p for p in parameters if p not in last), own, *last])

    def remove(self) -> None:
        """Remove the interception. If another object still holds it, it passes every call to the inner forward."""
        self.around = None
        attributes: dict[str, Any] = vars(self.module)
        for slot in _FORWARD_SLOTS:
            if attributes.get(slot) is self:
                if self.inner is not None:
                    attributes[slot] = self.inner
                elif slot == "forward":
                    del attributes[slot]
                else:  # accelerate calls this attribute
                    attributes[slot] = types.MethodType(type(self.module).forward, self.module)
                return
            holder = attributes.get(slot)
            while isinstance(holder, Interception):
                if holder.inner is self:
                    holder.inner = self.inner
                    return
                holder = holder.inner


class PartHook(_Owned):
    """A forward hook on a part of a model."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], owners: Sequence[nn.Module]) -> None:
        self.module = module
        self.owners = tuple(owners)
        self.around = function

    def __call__(self, *args: Any) -> Any:
        return None if self.around is None else self.around(*args)


class MethodReplacement:
    """A replacement for a method of a model, as an attribute of the model until ``remove``.

    It runs ``around(former, args, kwargs)``. Other code may have replaced the method before. If other code still holds
    this replacement afterwards, it only calls the former method.
    """

    def __init__(self, model: nn.Module, name: str, around: Around) -> None:
        self.model = model
        self.name = name
        self.around: Around | None = around
        self.former: Callable[..., Any] | None = vars(model).get(name)
        vars(model)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:
            return self.call_former(*args, **kwargs)
        return self.around(self.call_former, args, kwargs)

    def call_former(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method that the model had before."""
        if self.former is not None:
            return self.former(*args, **kwargs)
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Restore the former method, unless other code has replaced it again."""
        self.around = None
        attributes = vars(self.model)
        if attributes.get(self.name) is self:
            del attributes[self.name]
            if self.former is not None:
                attributes[self.name] = self.former


_FORWARD_SLOTS = ("_old_forward", "forward")
"""The attributes of a module that may hold a replaced forward. The one that accelerate calls comes first."""


def refuse_replicas(module: nn.Module) -> None:
    """Raise RuntimeError for replicas of ``nn.DataParallel``, which share the state of an adapter."""
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel cannot run a model with an adapter, since its replicas would share the adapter's state. "
            "Use DistributedDataParallel."
        )


def refuse_names(kwargs: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse ``adapter_names`` in a call of a part of a model, where its ``**kwargs`` would ignore them."""
    if "adapter_names" in kwargs:
        raise ValueError(
            "`adapter_names` must be passed to the model that the adapters are attached to, not to "
            f"{type(module).__name__} inside it."
        )


def find_cache_parameter(names: Container[str]) -> str | None:
    """Return the name of the cache among the arguments of a module, or None if the module accepts no cache.

    ``transformers`` 5.24 renamed ``past_key_values`` to ``cache``.
    """
    return next((name for name in _CACHE_NAMES if name in names), None)


def find_cache(values: Mapping[str, Any] | Sequence[Any] | None) -> Cache | None:
    """Return the key/value cache among the arguments or the outputs of a call, found by its type.

    Raises:
        TypeError: if an argument with a cache's name is not a ``transformers`` cache.
    """
    if isinstance(values, Mapping):
        for name, given in values.items():  # ``get`` of an output warns of names from before 5.24
            if name in _CACHE_NAMES and not isinstance(given, Cache | None):
                raise TypeError(f"`{name}` must be a transformers Cache, but is {type(given).__name__}.")
        values = list(values.values())
    return next((value for value in values or () if isinstance(value, Cache)), None)


def count_past(arguments: Mapping[str, Any]) -> int:
    """Return the number of tokens in the key/value cache of a call."""
    cache = find_cache(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def count_tokens(arguments: Mapping[str, Any]) -> int:
    """Return the number of tokens per row of a call, which may be ids or embeddings."""
    ids, rows = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return int(ids.shape[-1])
    return int(rows.shape[-2]) if isinstance(rows, Tensor) else 0


def asks_for(arguments: Mapping[str, Any], module: nn.Module, name: str) -> bool:
    """Return whether a call requests an output by an argument, or else by its module's configuration."""
    asked = arguments.get(name)
    return bool(getattr(getattr(module, "config", None), name, False) if asked is None else asked)


def check_mask_length(mask: Any, tokens: int, length: int) -> None:
    """Refuse a padding mask whose length is not the number of the caller's tokens."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != tokens:
        hint = f" Leave out the {length} columns of the adapter." if mask.shape[1] == tokens + length else ""
        raise ValueError(f"`attention_mask` must be [B, {tokens}], but is {list(mask.shape)}.{hint}")


def is_own_mask(mask: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether the attention mask of a call is the caller's own, rather than one that ``generate`` has made.

    ``generate`` makes 4-D masks before the call only for caches that can be compiled. They are bool, or a mapping of
    several masks.
    """
    if isinstance(mask, Tensor) and (mask.ndim != 4 or mask.dtype is not torch.bool):
        return True
    return not getattr(find_cache(arguments), "is_compileable", False)


def _is_own_row(mask: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Return whether a mask is the caller's own 4-D mask with one query row.

    A mask of ``generate`` can also have one query row, which means "causal".
    """
    return mask.ndim == 4 and mask.shape[2] == 1 and is_own_mask(mask, arguments)


def refuse_one_row_masks(arguments: dict[str, Any]) -> None:
    """Refuse 4-D masks with one query row in an encoder-decoder, where it is unclear whether they mean "causal".

    Raises:
        ValueError: if a mask is 4-D and has one query row.
    """
    for name, tokens in (("attention_mask", None), ("decoder_attention_mask", arguments.get("decoder_input_ids"))):
        mask = arguments.get(name)
        several = tokens is None or tokens.shape[1] > 1
        if isinstance(mask, Tensor) and _is_own_row(mask, arguments) and several:
            raise ValueError(
                f"`{name}` must be [B, N], or [B, 1, N, K] with all N query rows, but is {list(mask.shape)}."
            )


def expand_one_row_mask(arguments: dict[str, Any]) -> dict[str, Any]:
    """Expand a caller's own one-row 4-D mask, since one row means "causal" here (see ``attention``)."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and _is_own_row(mask, arguments):
        arguments["attention_mask"] = mask.expand(-1, -1, count_tokens(arguments), -1)
    return arguments


def read_state(*modules: nn.Module) -> object:
    """Return an object that compares equal as long as no parameter is changed or moved and autocast stays the same.

    Return None if that cannot be known. PyTorch counts the in-place changes of a tensor, except for those through
    ``.data``.
    """
    parameters = [p for module in modules for p in module.parameters()]
    if any(p.is_inference() for p in parameters):
        return None
    kind = parameters[-1].device.type  # the adapter's, since offloaded weights are on the meta device between calls
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return autocast, *((p.data_ptr(), p._version, p.dtype, p.device) for p in own)


class Cut:
    """Leaf tensors with the values of a call's prefixes. ``tie`` must be called in the same call."""

    def __init__(self, prefixes: list[Prefix]) -> None:
        self.tensors = [tensor for prefix in prefixes for tensor in prefix]
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.tensors]
        self.tied = False

    def get_prefix(self, index: int) -> Prefix:
        """Return the leaves of a layer."""
        return self.leaves[2 * index], self.leaves[2 * index + 1]

    def tie(self, hidden: Tensor) -> Tensor:
        """Connect the input of the first layer to the prefixes in the autograd graph."""
        self.tied = True
        # Reentrant checkpointing computes no gradients for a layer unless one of its inputs requires a gradient.
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        tied: Tensor = _Gather.apply(self.leaves, hidden, *self.tensors)  # type: ignore[no-untyped-call]
        return tied


class _Gather(torch.autograd.Function):
    """The identity. Its backward also passes the gradients that the leaves have accumulated to the prefixes."""

    @staticmethod
    def forward(ctx: Any, leaves: list[Tensor], hidden: Tensor, *tensors: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient, *map(_take_gradient, ctx.leaves)


def checkpoints_reentrantly(backbone: nn.Module) -> bool:
    """Return whether a layer of a backbone is checkpointed reentrantly, by ``transformers`` or by PyTorch's wrapper."""
    if torch.compiler.is_compiling():
        return False
    for module in backbone.modules():
        attributes = vars(module)
        if getattr(attributes.get(CHECKPOINT_WRAPPER), "keywords", {}).get("use_reentrant"):
            return True
        function = attributes.get("_gradient_checkpointing_func")
        checkpoints = backbone.training and function is not None and attributes.get("gradient_checkpointing", False)
        if checkpoints and getattr(function, "keywords", {}).get("use_reentrant", True):
            return True
    return False


@contextmanager
def suspend_checkpointing(backbone: nn.Module) -> Iterator[None]:
    """Run a backbone without gradient checkpointing in this context."""
    modules = _list_checkpointed(backbone)
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def _list_checkpointed(backbone: nn.Module) -> list[Any]:
    """Return the modules of a backbone that run with gradient checkpointing."""
    # The attribute of the instance: to find that an attribute is missing takes PyTorch's modules long.
    return [module for module in backbone.modules() if vars(module).get("gradient_checkpointing", False)]


def _take_gradient(leaf: Tensor) -> Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient
