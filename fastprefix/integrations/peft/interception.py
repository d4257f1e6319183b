"""Replace methods of single objects, and restore them in any order."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


class Interception:
    """A method of one object that runs through a function, until it is removed.

    The function is given the former method and the arguments. A copy of the object has a copy of the interception.
    Whatever replaces the method later, such as a hook of ``accelerate``, keeps calling this object, which stays without
    an effect if it is removed first.
    """

    def __init__(
        self, owner: Any, name: str, around: Callable[..., Any], default: Callable[..., Any] | None = None
    ) -> None:
        self.owner = owner
        self.name = name
        self.around: Callable[..., Any] | None = around
        self.before: Callable[..., Any] | None = vars(owner).get(name)
        self.default = default  # where neither the object nor its class has one
        self.__wrapped__ = self._former()  # whose signature `inspect` shows
        setattr(owner, name, self)

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

    def _former(self) -> Callable[..., Any]:
        former = self.default if self.before is None else self.before
        return types.MethodType(getattr(type(self.owner), self.name), self.owner) if former is None else former

    def __getstate__(self) -> dict[str, Any]:
        """Leave the method of the class out: ``pickle`` would look it up on the object, where this object is."""
        return {name: value for name, value in vars(self).items() if name != "__wrapped__"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Look the method up again."""
        vars(self).update(state)
        self.__wrapped__ = self._former()
