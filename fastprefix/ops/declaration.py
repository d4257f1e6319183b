"""Declare an operation's arguments once, and derive from it whatever has to know all of them.

An operation declares its canonical arguments as a ``NamedTuple`` whose fields are annotated with a :class:`Rule`.
The operators' schema, the order of gradients, the fakes, the checks and the canonical form follow when the operation
is imported, so that a call reads plain tuples and nothing is looked up by reflection.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

P = ParamSpec("P")
CanonicalT = TypeVar("CanonicalT")
ResultT = TypeVar("ResultT")

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
}


@dataclass(frozen=True)
class Rule:
    """The shape of a tensor argument, its dtype, and who computes its gradient.

    A shape is written like ``"[1|B, Hq, N]"``: ``1|B`` is a dimension that broadcasts. An argument with a second shape
    takes that one where it has as many dimensions.
    """

    shape: str
    second_shape: str | None = None
    gradient: Literal["every backend", "eager alone"] | None = None
    dtype: Literal["floating", "integer", "mask"] = "floating"  # a mask is bool or floating
    label: str | None = None  # what errors call it; None: its name
    takes: str | None = None  # what errors say it takes; None: its shape

    @property
    def ndim(self) -> int:
        """The number of dimensions in canonical form, or the least where there is a second shape."""
        return len(list_letters(self.shape))

    @property
    def broadcasts(self) -> bool:
        """Return whether dimensions may be 1 or, leading ones, missing."""
        return "|" in self.shape

    def letters(self, ndim: int) -> tuple[str, ...]:
        """Return the letters of the shape for a tensor of ``ndim`` dimensions."""
        second = () if self.second_shape is None else list_letters(self.second_shape)
        return second if second and ndim == len(second) else list_letters(self.shape)


def list_letters(shape: str) -> tuple[str, ...]:
    """Return the letters of a shape, ``("B", "Hq")`` of ``"[1|B, Hq]"``."""
    return tuple(letter.strip().removeprefix("1|") for letter in shape.strip("[]").split(","))


class Declaration:
    """The rules that follow from the declared arguments of an operation."""

    def __init__(self, arguments: type[Any]) -> None:
        """Read the annotations of a ``NamedTuple``: tensors first, and those with gradients one after another."""
        self.rules: dict[str, Rule] = {}
        kinds = []
        for name, hint in get_type_hints(arguments, include_extras=True).items():
            if get_origin(hint) is Annotated:
                hint, self.rules[name] = get_args(hint)
            kinds.append(_SCHEMA_TYPES[hint])
        names = list(arguments._fields)
        self.schema = ", ".join(f"{kind} {name}" for kind, name in zip(kinds, names, strict=True))
        self.tensors = sum(kind.startswith("Tensor") for kind in kinds)
        self.optional = {name: self.rules[name] for name, kind in zip(names, kinds, strict=True) if kind == "Tensor?"}
        self.differentiable = tuple(name for name in names if name in self.rules and self.rules[name].gradient)
        self.eager_alone = tuple(name for name, rule in self.rules.items() if rule.gradient == "eager alone")
        first = names.index(self.differentiable[0])
        self.gradients = slice(first, first + len(self.differentiable))
        assert list(self.rules) == names[: self.tensors]
        assert self.differentiable == tuple(names[self.gradients])
        self.arity = len(names)

    def name_needs(self, needs_grad: Sequence[bool]) -> set[str]:
        """Return the arguments whose gradients are asked for."""
        return {name for name, needed in zip(self.differentiable, needs_grad, strict=True) if needed}


def accept(
    collect: Callable[P, CanonicalT],
) -> Callable[[Callable[[CanonicalT], ResultT]], Callable[P, ResultT]]:
    """Let a function of an operation's arguments as a tuple accept those of ``collect``, which makes the tuple."""

    def decorate(function: Callable[[CanonicalT], ResultT]) -> Callable[P, ResultT]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> ResultT:
            return function(collect(*args, **kwargs))

        returned = inspect.signature(function).return_annotation
        call.__signature__ = inspect.signature(collect).replace(return_annotation=returned)  # type: ignore[attr-defined]
        del call.__wrapped__
        return call

    return decorate
