"""Cache the results of functions that query the machine. ``torch.compile`` treats them as constants."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def once(question: Callable[P, T]) -> Callable[P, T]:
    """Cache the results of a function by its arguments, and let ``torch.compile`` treat them as constants.

    ``torch.compiler.assume_constant_result`` sets the same attribute, but it imports the compiler.
    """
    answer = functools.cache(question)

    @functools.wraps(question)
    def ask(*arguments: P.args, **named: P.kwargs) -> T:
        return answer(*arguments, **named)  # type: ignore[arg-type]

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask
