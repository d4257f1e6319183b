"""Read and change the arguments of a forward call, and carry prefixes through reentrant gradient checkpointing.

Reentrant checkpointing runs the backward pass of each checkpointed layer by itself. A prefix that several layers get
from one network would then be differentiated once per layer, and the network's graph is gone after the first. So the
layers get leaves in place of such a prefix. A node below the first layer, whose backward pass comes after those of all
layers, hands the gradients of the leaves to the network, once.
"""

from __future__ import annotations

import functools
import inspect
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

from .attention import Prefix

READ_ARGUMENTS = frozenset(
    {
        *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "use_cache"),
        *("decoder_input_ids", "decoder_attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    }
)
"""The arguments of models that are read or written by name. Caches are found by type instead."""

READ_SETTINGS = frozenset({"use_cache", "output_attentions", "output_router_logits"})
"""The attributes of configurations that stand for arguments that a call leaves out."""

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def read_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's positional forward arguments, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def check_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's positional forward arguments, provided that none has a name unknown here.

    Most models lack some of ``READ_ARGUMENTS``, so a missing argument proves nothing. A renamed one shows in one of
    three ways: the module itself translates the former name, the library's main models do not know the name any more,
    or the module takes a cache and none of its arguments has a cache's name.

    Raises:
        ValueError: an argument has been renamed.
    """
    names, model = read_parameter_names(module), type(module).__name__
    for old, new in _find_renamed(module.forward).items():
        if old in READ_ARGUMENTS:
            raise ValueError(f"`{old}` is called `{new}` in {model}, which this fastprefix does not know: {_ADVICE}")
    arguments, settings = _collect_vocabulary()
    if unknown := sorted(READ_ARGUMENTS - arguments - set(names)):
        raise ValueError(f"{_name_library()} has no argument `{unknown[0]}`, which {model} may need: {_ADVICE}")
    if unknown := sorted(READ_SETTINGS - settings):
        raise ValueError(f"{_name_library()} has no setting `{unknown[0]}`, which {model} may need: {_ADVICE}")
    caches = _find_cache_parameters(module.forward)
    if len(caches) == 1 and find_cache_parameter(names) is None:  # codecs have two, one for each half
        raise ValueError(
            f"`{caches[0]}` of {model} is a key/value cache under a name that this fastprefix does not know: {_ADVICE}"
        )
    return names


_ADVICE = "use a newer fastprefix, or a transformers version that this one supports"


def _name_library() -> str:
    return f"transformers {transformers.__version__}"


def _find_renamed(forward: Callable[..., Any]) -> dict[str, str]:
    """Return the deprecated argument names of a function with their new names.

    ``deprecate_kwarg`` of ``transformers`` keeps both in the closures of its wrappers.
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
    """Return the arguments and the settings that the main models of ``transformers``, one of each kind, know."""
    kinds = (transformers.LlamaModel, transformers.BertModel, transformers.BartModel)
    arguments = {name for kind in kinds for name in inspect.signature(kind.forward).parameters}
    settings = vars(transformers.MixtralConfig()).keys() | set(dir(transformers.MixtralConfig))
    decorated = {"return_dict"}  # a decorator's, which no signature shows
    return frozenset(arguments | TransformersKwargs.__annotations__.keys() | decorated), frozenset(settings)


def _find_cache_parameters(forward: Callable[..., Any]) -> list[str]:
    """Return the arguments of a function that are annotated as a cache."""
    try:
        hints = typing.get_type_hints(inspect.unwrap(forward))
    except (NameError, TypeError):  # a type that is imported for type checkers only, or no function
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


class Interception:
    """Run a module's ``forward`` inside another function, whether the module or its ``forward`` is called.

    It stands on the module as the instance attribute ``forward``, as accelerate's replacement does. Where accelerate
    has replaced ``forward`` already, it stands inside that replacement, so either can be removed first. It is copied
    and pickled with its module.
    """

    keyword: ClassVar[str | None] = None
    """An argument that it takes off the calls. It is in the signature, for ``generate`` and for Trainer's columns."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        self.module = module
        self.around: Around | None = around
        attributes: dict[str, Any] = vars(module)
        slot = next(name for name in _FORWARD_SLOTS if name in attributes or name == "forward")
        self.inner: Callable[..., Any] | None = attributes.get(slot)  # None: the forward of the module's class
        attributes[slot] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds what it unwraps to the module once more
            args = args[1:]
        if self.around is None:
            return self.forward(*args, **kwargs)
        return self.around(self.forward, args, kwargs)

    @property
    def forward(self) -> Callable[..., Any]:
        """Return the forward that would run without the interception."""
        if self.inner is None:
            return functools.partial(type(self.module).forward, self.module)
        return self.inner

    @property
    def is_innermost(self) -> bool:
        """Return whether the forward inside is that of the module's class."""
        return self.inner is None or getattr(self.inner, "__func__", None) is type(self.module).forward

    @property
    def __code__(self) -> types.CodeType:
        """Return the code of the module's own forward, whose file ``torch.export`` names."""
        code: types.CodeType = type(self.module).forward.__code__
        return code

    @property
    def __wrapped__(self) -> Forward:
        """Return the forward inside, for whoever looks through wrappers."""
        return self.forward

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the signature of the forward inside, with ``keyword`` if there is one, for ``inspect.signature``."""
        inside = inspect.signature(self.forward)
        if self.keyword is None:
            return inside
        own = inspect.Parameter(self.keyword, inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = [p for p in inside.parameters.values() if p.name != self.keyword]
        last = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        return inside.replace(parameters=[*(p for p in parameters if p not in last), own, *last])

    def remove(self) -> None:
        """Remove the interception, or make it pass every call on where something else holds it."""
        self.around = None
        attributes: dict[str, Any] = vars(self.module)
        for slot in _FORWARD_SLOTS:
            if attributes.get(slot) is self:
                if self.inner is not None:
                    attributes[slot] = self.inner
                elif slot == "forward":
                    del attributes[slot]
                else:  # accelerate calls it
                    attributes[slot] = types.MethodType(type(self.module).forward, self.module)
                return
            holder = attributes.get(slot)
            while isinstance(holder, Interception):
                if holder.inner is self:
                    holder.inner = self.inner
                    return
                holder = holder.inner


_FORWARD_SLOTS = ("_old_forward", "forward")
"""The attributes of a module that may hold a replaced forward: accelerate's name for what it calls comes first."""


def refuse_replicas(module: nn.Module) -> None:
    """Refuse replicas of ``nn.DataParallel``, which share the state of an adapter."""
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel cannot run a model with an adapter, whose state its replicas share: use DDP."
        )


def refuse_names(kwargs: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse ``adapter_names`` in a call of a part of a model, which would be lost in its ``**kwargs``."""
    if "adapter_names" in kwargs:
        raise ValueError(
            "`adapter_names` must be given to the model that the adapters are attached to, not to "
            f"{type(module).__name__} inside it."
        )


def find_cache_parameter(names: Container[str]) -> str | None:
    """Return the name of the cache among the parameters of a module, or None if the module takes no cache.

    ``transformers`` 5.24 renamed ``past_key_values`` to ``cache``.
    """
    return next((name for name in _CACHE_NAMES if name in names), None)


def find_cache(values: Mapping[str, Any] | Sequence[Any] | None) -> Cache | None:
    """Return the key/value cache among the arguments or the outputs of a call, found by its type.

    Raises:
        TypeError: an argument that has a cache's name is something else.
    """
    if isinstance(values, Mapping):
        for name in _CACHE_NAMES:
            if not isinstance(given := values.get(name), Cache | None):
                raise TypeError(f"`{name}` must be a transformers Cache, but is {type(given).__name__}.")
        values = list(values.values())
    return next((value for value in values or () if isinstance(value, Cache)), None)


def count_past(arguments: Mapping[str, Any]) -> int:
    """Return how many tokens are in the key/value cache of a call."""
    cache = find_cache(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def count_tokens(arguments: Mapping[str, Any]) -> int:
    """Return how many tokens a row of a call has, be they given as ids or as embeddings."""
    ids, rows = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return int(ids.shape[-1])
    return int(rows.shape[-2]) if isinstance(rows, Tensor) else 0


def asks_for(arguments: Mapping[str, Any], module: nn.Module, name: str) -> bool:
    """Tell whether a call asks for an output by an argument, or by default its module's configuration does."""
    asked = arguments.get(name)
    return bool(getattr(getattr(module, "config", None), name, False) if asked is None else asked)


def check_mask_length(mask: Any, tokens: int, length: int) -> None:
    """Refuse a padding mask that is not about the caller's tokens."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != tokens:
        hint = f" Leave out the {length} columns of the adapter." if mask.shape[1] == tokens + length else ""
        raise ValueError(f"`attention_mask` must be [B, {tokens}], but is {list(mask.shape)}.{hint}")


def _is_own_row(mask: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Return whether a mask is a caller's own 4-D mask of one row.

    For a static cache, ``generate`` has the mask made beforehand, and where the prompt fills the cache, it has one row
    too, which means "causal".
    """
    if mask.ndim != 4 or mask.shape[2] > 1:
        return False
    cache = find_cache(arguments)
    return not (cache is not None and cache.is_compileable and mask.dtype is torch.bool)


def refuse_one_row_masks(arguments: dict[str, Any]) -> None:
    """Refuse 4-D masks of one row in a model with two halves, which would not know whether "causal" is meant.

    Raises:
        ValueError: a 4-D mask of one row.
    """
    for name, tokens in (("attention_mask", None), ("decoder_attention_mask", arguments.get("decoder_input_ids"))):
        mask = arguments.get(name)
        several = tokens is None or tokens.shape[1] > 1
        if isinstance(mask, Tensor) and _is_own_row(mask, arguments) and several:
            raise ValueError(f"`{name}` must be [B, N], or [B, 1, N, K] with all its rows, but is {list(mask.shape)}.")


def expand_one_row_mask(arguments: dict[str, Any]) -> dict[str, Any]:
    """Expand a caller's own one-row 4-D mask, since one row says "causal" here (see ``masks``)."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and _is_own_row(mask, arguments):
        arguments["attention_mask"] = mask.expand(-1, -1, count_tokens(arguments), -1)
    return arguments


def read_state(*modules: nn.Module) -> object:
    """Return an object that is equal while no parameter is changed or moved, nor autocast, or None if that is unknown.

    PyTorch counts a tensor's in-place changes; only those through ``.data`` it does not see.
    """
    parameters = [p for module in modules for p in module.parameters()]
    if any(p.is_inference() for p in parameters):
        return None
    kind = parameters[-1].device.type  # the adapter's, since offloaded weights are on the meta device between calls
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return autocast, *((p.data_ptr(), p._version, p.dtype, p.device) for p in own)


class Cut:
    """The prefixes of the last call that was differentiable, cut off from the graph that they come from."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.tied = True

    def cut(self, prefixes: list[Prefix]) -> None:
        """Make leaves with the values of the prefixes; ``tie`` has to follow in the same call."""
        self.tensors = [tensor for prefix in prefixes for tensor in prefix]
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.tensors]
        self.tied = False

    def clear(self) -> None:
        """Drop the leaves: the call that begins needs none."""
        self.tensors, self.leaves, self.tied = [], [], True

    def get_prefix(self, index: int) -> Prefix | None:
        """Return a layer's leaves if they are to be differentiated, otherwise None."""
        if not (self.leaves and torch.is_grad_enabled()):
            return None
        return self.leaves[2 * index], self.leaves[2 * index + 1]

    def tie(self, hidden: Tensor) -> Tensor:
        """Tie what enters the first layer to the prefixes that were cut off."""
        self.tied = True
        # It needs a gradient in any case: reentrant checkpointing gives none to a layer none of whose inputs needs one.
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        tied: Tensor = _Gather.apply(self, self.leaves, hidden, *self.tensors)  # type: ignore[no-untyped-call]
        return tied

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what lives only while a model runs."""
        return vars(Cut())


class _Gather(torch.autograd.Function):
    """The identity; its backward also gives the prefixes the gradients that their leaves have gathered."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, leaves: list[Tensor], hidden: Tensor, *tensors: Tensor) -> Tensor:
        ctx.cut, ctx.leaves = cut, leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # A layer that is run again takes the leaves of the last call, be it differentiated for that call or another.
        gathered = [
            _add_gradients(_take_gradient(leaf), _take_gradient(last))
            for leaf, last in zip(ctx.leaves, ctx.cut.leaves, strict=True)
        ]
        return None, None, gradient, *gathered


def checkpoints_reentrantly(backbone: nn.Module) -> bool:
    """Return whether a backbone trains with reentrant gradient checkpointing."""
    if not backbone.training or torch.compiler.is_compiling():
        return False
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in _list_checkpointed(backbone))
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions if function)


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
    return [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]


def _take_gradient(leaf: Tensor) -> Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient


def _add_gradients(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first + second
