"""Cache the results of functions that query the machine. ``torch.compile`` treats them as constants."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def constant_in_traces(question: Callable[P, T]) -> Callable[P, T]:
    """Let ``torch.compile`` treat the results of a function as constants.

    ``torch.compiler.assume_constant_result`` sets the same attribute, but it imports the compiler.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


def once(question: Callable[P, T]) -> Callable[P, T]:
    """Cache the results of a function by its arguments, and let ``torch.compile`` treat them as constants."""
    answer = functools.cache(question)

    @functools.wraps(question)
    def ask(*arguments: P.args, **named: P.kwargs) -> T:
        return answer(*arguments, **named)  # type: ignore[arg-type]

    return constant_in_traces(ask)
