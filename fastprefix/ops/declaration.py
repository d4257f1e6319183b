"""Declare an operation's arguments once and derive its schema, checks and gradients from the declaration.

An operation declares its canonical arguments as a ``NamedTuple`` whose tensor fields are annotated with a
:class:`Rule`. The operators' schema, the order of gradients, the fakes, the checks and the canonical form are derived
when the operation is imported. A call then reads plain tuples and uses no reflection.
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
    """The shape of a tensor argument, its dtype, and the backends that compute its gradient.

    A shape is written like ``"[1|B, Hq, N]"``, where ``1|B`` is a dimension that broadcasts. A second shape applies to
    tensors with that many dimensions.
    """

    shape: str
    second_shape: str | None = None
    gradient: Literal["every backend", "eager alone"] | None = None
    dtype: Literal["floating", "integer", "mask"] = "floating"  # a mask is bool or floating
    label: str | None = None  # the name in error messages; None: the field's name
    requirement: str | None = None  # the requirement in error messages; None: the shape

    @property
    def ndim(self) -> int:
        """The number of dimensions in canonical form, or the smaller number if there is a second shape."""
        return len(list_letters(self.shape))

    @property
    def broadcasts(self) -> bool:
        """Return whether dimensions may have size 1 and leading dimensions may be missing."""
        return "|" in self.shape

    def letters(self, ndim: int) -> tuple[str, ...]:
        """Return the letters of the shape for a tensor of ``ndim`` dimensions."""
        second = () if self.second_shape is None else list_letters(self.second_shape)
        return second if second and ndim == len(second) else list_letters(self.shape)


def list_letters(shape: str) -> tuple[str, ...]:
    """Return the letters of a shape, for example ``("B", "Hq")`` for ``"[1|B, Hq]"``."""
    return tuple(letter.strip().removeprefix("1|") for letter in shape.strip("[]").split(","))


class Declaration:
    """The schema, order of gradients and rules derived from the declared arguments of an operation."""

    def __init__(self, arguments: type[Any]) -> None:
        """Read the annotations of a ``NamedTuple``.

        Its tensors must come first, and the tensors that have a gradient must be consecutive.
        """
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
        """Return the names of the arguments whose gradients are requested."""
        return {name for name, needed in zip(self.differentiable, needs_grad, strict=True) if needed}


def accept(
    collect: Callable[P, CanonicalT],
) -> Callable[[Callable[[CanonicalT], ResultT]], Callable[P, ResultT]]:
    """Decorate a function of an argument tuple to accept the arguments of ``collect``, which makes the tuple."""

    def decorate(function: Callable[[CanonicalT], ResultT]) -> Callable[P, ResultT]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> ResultT:
            return function(collect(*args, **kwargs))

        returned = inspect.signature(function).return_annotation
        call.__signature__ = inspect.signature(collect).replace(return_annotation=returned)  # type: ignore[attr-defined]
        del call.__wrapped__
        return call

    return decorate
