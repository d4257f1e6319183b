"""Read and change the arguments of a forward call, and carry prefixes through reentrant gradient checkpointing.

Reentrant checkpointing runs the backward pass of each checkpointed layer by itself. A prefix that several layers get
from one network would then be differentiated once per layer, and the network's graph is gone after the first. So the
layers get leaves in place of such a prefix. A node below the first layer, whose backward pass comes after those of all
layers, hands the gradients of the leaves to the network, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from .attention import Prefix

_CACHE_NAMES = ("cache", "past_key_values")


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional forward arguments, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def refuse_replicas(module: nn.Module) -> None:
    """Refuse replicas of ``nn.DataParallel``, which share the state of an adapter.

    Raises:
        RuntimeError: the module is one.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError("nn.DataParallel takes a model without an adapter, whose state replicas share: use DDP")


def cache_parameter(names: Container[str]) -> str | None:
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
                raise TypeError(f"`{name}` must be a transformers Cache, got {type(given).__name__}")
        values = list(values.values())
    return next((value for value in values or () if isinstance(value, Cache)), None)


def past_length(arguments: Mapping[str, Any]) -> int:
    """Return how many tokens are in the key/value cache of a call."""
    cache = find_cache(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


class Positions(NamedTuple):
    """The way a model counts the positions of its tokens."""

    first: int
    """The position of the first token."""
    limit: int | None
    """The number of positions in a table of learned ones; None without such a table."""
    by_mask: bool
    """True if padding is not counted: positions follow from the attention mask (OPT)."""
    by_length: int | None
    """The longest row up to which rotary frequencies are the same; None if they never depend on the row's length."""
    reader: nn.Module
    """The module that reads ``position_ids``: the backbone, or the text model inside it."""

    @classmethod
    def of(cls, backbone: nn.Module) -> Positions:
        """Find out how a model counts, without running any of its layers.

        A text model inside a backbone gets positions from it, which may be more than a count (M-RoPE), or begin at 1.
        """
        reader = _text_model(backbone)
        table = _position_table(reader)
        first, limit = 0, None
        if table is not None:  # its rows up to the padding's are not for tokens, nor those before its offset
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            limit = table.num_embeddings - first - int(getattr(table, "offset", 0))
        if reader is not backbone:
            handed = _stopped(backbone, reader, _handed_positions)
            first = first if handed is None else int(handed.min())
        by_mask = table is not None and _counts_by_mask(backbone, table)
        return cls(first, limit, by_mask, _same_frequencies_up_to(reader), reader)

    def moved(self, arguments: Mapping[str, Any], shift: int) -> Tensor:
        """Return the position ids of a call moved up by ``shift``; where none are given, the model's own.

        Raises:
            ValueError: they exceed the model's table of positions.
        """
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments["inputs_embeds"]
        given, mask, past = arguments.get("position_ids"), arguments.get("attention_mask"), past_length(arguments)
        counted = False
        if given is not None:
            positions: Tensor = given + shift
        elif self.by_mask and isinstance(mask, Tensor) and mask.ndim == 2:
            seen = mask.long()
            positions = ((seen.cumsum(1) + shift) * seen - 1)[:, -tokens.shape[1] :]
        else:
            counted = True
            positions = self.first + shift + torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        self.check(None if counted else positions, past + tokens.shape[1] + shift, shift)
        return positions

    def check(self, positions: Tensor | None, rows: int, shift: int) -> None:
        """Refuse a call whose positions exceed the model's table.

        Args:
            positions: of all tokens, with the ``shift``; None: they are counted, and there are so many ``rows``. On a
                GPU they are only looked at where the rows themselves do not fit, and in a trace never.
            rows: the length of the row, with the ``shift``.
            shift: the number of virtual tokens.

        Raises:
            ValueError: they do.
        """
        if self.limit is None:
            return
        if positions is not None:
            if torch.compiler.is_compiling() or (positions.device.type != "cpu" and rows <= self.limit):
                return
            rows = int(positions.max()) + 1 - self.first
        if rows > self.limit:
            raise ValueError(
                f"`num_virtual_tokens` = {shift} moves an input of {rows - shift} tokens up to {rows} positions, but "
                f"the model has {self.limit} positions. Shorten the input or use fewer virtual tokens."
            )


class PositionShift:
    """Move up the positions that a model reads, be they given or the model's own."""

    def __init__(self, backbone: nn.Module) -> None:
        self.positions = Positions.of(backbone)
        self.inside = self.positions.reader is not backbone
        self.names = parameter_names(self.positions.reader)
        self.shift = 0  # of the call in progress

    def install(self) -> list[RemovableHandle]:
        """Set the hook on a text model inside the backbone."""
        if not self.inside:
            return []
        return [self.positions.reader.register_forward_pre_hook(self.move, with_kwargs=True)]

    def begin(self, arguments: dict[str, Any], shift: int) -> None:
        """Move a call of the backbone, given its arguments; a ``shift`` of 0 leaves it as it is."""
        self.shift = shift
        if shift > 0 and not self.inside:
            arguments["position_ids"] = self.positions.moved(arguments, shift)

    def move(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the text model: its positions are final here."""
        if self.shift == 0:
            return None
        arguments = by_name(self.names, args, kwargs)
        return (), {**arguments, "position_ids": self.positions.moved(arguments, self.shift)}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what lives only while a model runs."""
        return {**self.__dict__, "shift": 0}


def _text_model(backbone: nn.Module) -> nn.Module:
    """Return the innermost model inside a backbone that holds the input embeddings and reads ``position_ids``."""
    try:
        embedding = backbone.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return backbone
    models = (module for module in backbone.modules() if isinstance(module, PreTrainedModel))
    readers = [model for model in models if "position_ids" in parameter_names(model)]
    return next((m for m in reversed(readers) if any(child is embedding for child in m.modules())), backbone)


def _position_table(reader: nn.Module) -> nn.Embedding | None:
    """Return the table of learned positions of a text model, if it has one."""
    for name, module in reader.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and leaf in ("position_embeddings", "embed_positions", "wpe"):
            return module
    return None


class _Stopped(Exception):  # noqa: N818 (nothing is wrong)
    """End a run at a module."""

    def __init__(self, seen: Tensor | None) -> None:
        super().__init__()
        self.seen = seen


def _stopped(
    backbone: nn.Module, module: nn.Module, look: Callable[..., Tensor | None], mask: Sequence[int] = (1, 1, 1)
) -> Tensor | None:
    """Run a model on three tokens until it calls a module, and return what is seen there; None if it does not run."""
    device = next(backbone.parameters()).device
    padding = getattr(getattr(backbone, "config", None), "pad_token_id", None)
    ids = torch.full((1, 3), 1 if padding == 0 else 0, device=device)

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        raise _Stopped(look(module, args, kwargs, *output))

    after = look is _read_rows
    register = module.register_forward_hook if after else module.register_forward_pre_hook
    handle = register(stop, with_kwargs=True)
    options = {"attention_mask": torch.tensor([mask], device=device), "use_cache": False}
    options = {name: value for name, value in options.items() if name in parameter_names(backbone)}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            backbone(input_ids=ids, **options)
    except _Stopped as stopped:
        return stopped.seen
    except Exception:  # it takes no ids alone, and nothing can be seen
        return None
    finally:
        handle.remove()
    return None


def _handed_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the position ids that a text model is called with."""
    positions: Tensor | None = by_name(parameter_names(module), args, kwargs).get("position_ids")
    return positions


def _read_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return the rows that were read from a table."""
    return output


def _counts_by_mask(backbone: nn.Module, table: nn.Embedding) -> bool:
    """Tell whether padding before a token changes which row of the table it gets."""
    plain, padded = (_stopped(backbone, table, _read_rows, mask) for mask in ((1, 1, 1), (0, 1, 1)))
    return plain is not None and padded is not None and not torch.equal(plain[0, -1], padded[0, -1])


def _same_frequencies_up_to(reader: nn.Module) -> int | None:
    """Return the longest row up to which rotary frequencies do not depend on its length (LongRoPE, dynamic NTK)."""
    configs = [module.config for module in reader.modules() if isinstance(module, PreTrainedModel)]
    limits: list[int] = []
    for config in configs:
        rope = getattr(config, "rope_parameters", None)
        for each in (rope, *rope.values()) if isinstance(rope, dict) else ():
            if not isinstance(each, dict):
                continue
            kind, longest = str(each.get("rope_type", "default")), getattr(config, "max_position_embeddings", None) or 0
            if "dynamic" in kind:
                limits.append(longest)
            elif kind == "longrope" or "long_factor" in each:
                former = getattr(config, "original_max_position_embeddings", None)
                limits.append(each.get("original_max_position_embeddings") or former or longest)
    return min(limits, default=None)


class RouterMask:
    """Extend the attention mask by which a model's head counts the tokens of each expert.

    The load-balancing loss is computed of every token that the backbone saw, a prompt in every row included, with the
    mask that the model was called with.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        self.names = parameter_names(model)
        self.length = length
        self.given: Tensor | None = None
        self.extended: Tensor | None = None

    def extend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: extend its mask, if an auxiliary loss will be computed."""
        self.given = self.extended = None
        arguments = by_name(self.names, args, kwargs)
        mask = arguments.get("attention_mask")
        if not asks_for(arguments, module, "output_router_logits") or past_length(arguments) > 0:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        self.given, self.extended = mask, nn.functional.pad(mask, (self.length, 0), value=1)
        return (), {**arguments, "attention_mask": self.extended}

    def restore(self, arguments: dict[str, Any]) -> None:
        """Give a call of the backbone the caller's own mask back."""
        if self.extended is not None and arguments.get("attention_mask") is self.extended:
            arguments["attention_mask"] = self.given
        self.given = self.extended = None


def asks_for(arguments: Mapping[str, Any], module: nn.Module, name: str) -> bool:
    """Tell whether a call asks for an output by an argument, or by default its module's configuration does."""
    asked = arguments.get(name)
    return bool(getattr(getattr(module, "config", None), name, False) if asked is None else asked)


def is_packed(arguments: Mapping[str, Any], backbone: nn.Module) -> bool:
    """Tell whether a call's rows are packed sequences.

    This is the rule of ``transformers``: without mask and cache, positions that do not count on begin another
    sequence. Positions of several dimensions are ``[4, B, N]`` where the first is that of the text. In a trace, which
    cannot look at them, rows are taken for plain.
    """
    positions, use_cache = arguments.get("position_ids"), arguments.get("use_cache")
    cached = getattr(backbone.config, "use_cache", False) if use_cache is None else use_cache
    if cached and backbone.training and getattr(backbone, "gradient_checkpointing", False):
        cached = False  # `transformers` makes no cache then
    if positions is None or cached or torch.compiler.is_compiling():
        return False
    if positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]
    if positions.ndim != 2 or arguments.get("attention_mask") is not None or find_cache(arguments) is not None:
        return False
    return find_packed_sequence_indices(positions) is not None


def refuse_packed(arguments: Mapping[str, Any], backbone: nn.Module) -> None:
    """Refuse packed sequences: only the first would see a prompt in front of the row, or be counted right.

    Raises:
        ValueError: the rows are packed.
    """
    if is_packed(arguments, backbone):
        raise ValueError(
            "position_ids takes one sequence a row where a prompt runs in every row, or an offset or a sliding window "
            "counts from its beginning; got packed sequences"
        )


def refuse_one_row_masks(arguments: dict[str, Any]) -> None:
    """One row says "causal" here, and how many there should be differs between the halves of a model.

    Raises:
        ValueError: a 4-D mask of one row.
    """
    for name, tokens in (("attention_mask", None), ("decoder_attention_mask", arguments.get("decoder_input_ids"))):
        mask = arguments.get(name)
        several = tokens is None or tokens.shape[1] > 1
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == 1 and several:
            raise ValueError(f"{name} takes [B, N], or [B, 1, N, K] with all its rows, got {list(mask.shape)}")


def rows_for_masks(arguments: dict[str, Any]) -> dict[str, Any]:
    """Expand a caller's own one-row 4-D mask, since one row says "causal" here (see ``masks``)."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == 1:
        tokens = arguments.get("input_ids")
        length = (arguments["inputs_embeds"] if tokens is None else tokens).shape[1]
        arguments["attention_mask"] = mask.expand(-1, -1, length, -1)
    return arguments


class Cut:
    """The prefixes of the last call that was differentiable, cut off from the graph that they come from."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.tied = True

    def cut(self, prefixes: list[Prefix]) -> None:
        """Make leaves with the values of the prefixes; ``tie`` has to follow in the same call."""
        self.tensors = [tensor for prefix in prefixes for tensor in prefix]
        self.leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
        self.tied = False

    def clear(self) -> None:
        """The call that begins needs no leaves."""
        self.tensors, self.leaves, self.tied = [], [], True

    def prefix(self, index: int) -> Prefix | None:
        """A layer's leaves, if there are any and they are to be differentiated."""
        if not (self.leaves and torch.is_grad_enabled()):
            return None
        return self.leaves[2 * index], self.leaves[2 * index + 1]

    def tie(self, hidden: Tensor) -> Tensor:
        """What enters the first layer, tied to the prefixes that were cut off."""
        self.tied = True
        # It needs a gradient in any case: reentrant checkpointing gives none to a layer none of whose inputs needs one.
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        tied: Tensor = _Gather.apply(self, self.leaves, hidden, *self.tensors)  # type: ignore[no-untyped-call]
        return tied

    def __getstate__(self) -> dict[str, Any]:
        """What lives only while a model runs is not copied or pickled."""
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
        gathered = [_sum(_taken(leaf), _taken(last)) for leaf, last in zip(ctx.leaves, ctx.cut.leaves, strict=True)]
        return None, None, gradient, *gathered


def reentrant(backbone: nn.Module) -> bool:
    """Whether a backbone trains with reentrant gradient checkpointing."""
    if not backbone.training or torch.compiler.is_compiling():
        return False
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in _checkpointed(backbone))
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions if function)


@contextmanager
def not_checkpointed(backbone: nn.Module) -> Iterator[None]:
    """A context in which a backbone runs without gradient checkpointing."""
    modules = _checkpointed(backbone)
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def _checkpointed(backbone: nn.Module) -> list[Any]:
    """The modules of a backbone that run with gradient checkpointing."""
    return [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]


def _taken(leaf: Tensor) -> Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first + second
