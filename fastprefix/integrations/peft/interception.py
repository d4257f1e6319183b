"""Replace methods of single objects, and restore them in any order."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


class Interception:
    """A method of one object that runs through a function, until it is removed.

    The function is given the former method and the arguments. A copy of the object has a copy of the interception.
    Whatever replaces the method later, such as a hook of ``accelerate``, keeps calling this object. It stays there
    without an effect if it is removed first.
    """

    def __init__(
        self, owner: Any, name: str, around: Callable[..., Any], default: Callable[..., Any] | None = None
    ) -> None:
        self.owner = owner
        self.name = name
        self.around: Callable[..., Any] | None = around
        self.default = default  # where the class has no such method
        self.before: Callable[..., Any] | None = vars(owner).get(name)
        setattr(owner, name, self)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Return the former method, whose signature ``inspect`` shows."""
        former = self.default if self.before is None else self.before
        if former is not None:
            return former
        return types.MethodType(getattr(type(self.owner), self.name), self.owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method through the function."""
        if self.around is None:
            return self.__wrapped__(*args, **kwargs)
        return self.around(self.__wrapped__, *args, **kwargs)

    def remove(self) -> None:
        """Restore the former method, or stay without an effect where another one was put over this one."""
        self.around = None
        if vars(self.owner).get(self.name) is not self:
            return
        before = self.before
        while isinstance(before, Interception) and before.around is None:
            before = before.before
        delattr(self.owner, self.name)
        if before is not None:
            setattr(self.owner, self.name, before)
