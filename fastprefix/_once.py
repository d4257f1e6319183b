"""Questions about the machine that are asked once, and that ``torch.compile`` takes as answered."""

import functools
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def once(question: Callable[[], T]) -> Callable[[], T]:
    """The function, run at its first call; a trace takes its answer as a constant.

    ``torch.compiler.assume_constant_result`` says the same by the same attribute, but imports the compiler to say it.
    """
    answer = functools.cache(question)

    @functools.wraps(question)
    def ask() -> T:
        return answer()

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask
