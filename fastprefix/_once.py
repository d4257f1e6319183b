"""Questions about the machine that are asked once, and that ``torch.compile`` takes as answered."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def once(question: Callable[P, T]) -> Callable[P, T]:
    """Run a function at its first call with an argument only. A trace takes its answer as a constant.

    ``torch.compiler.assume_constant_result`` says the same by the same attribute, but imports the compiler to say it.
    """
    answer = functools.cache(question)

    @functools.wraps(question)
    def ask(*arguments: P.args, **named: P.kwargs) -> T:
        return answer(*arguments, **named)  # type: ignore[arg-type]

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask
