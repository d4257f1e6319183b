"""Have the ranks of a sharded model agree before and after what they do together.

A rank that is missing, that fails, or that does something else must be an error on every rank, not a collective that
never ends. So ranks exchange short messages through the store of the process group, which works without a collective
and with every backend, and wait for each other for a limited time.
"""

from __future__ import annotations

import hashlib
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any, TypeVar

from torch import distributed, nn

from .partitioned import any_partitioned
from .tensor_parallel import find_whole_mesh

TIMEOUT = 30.0
"""The number of seconds that a rank waits for another one."""
_BEAT = 5.0
"""The number of seconds between two signs of life of a rank that works while others wait."""
_LONGEST = 300  # characters of a message in an error
_FINE, _FAILED = "fine: ", "failed: "

Result = TypeVar("Result")


class Ranks:
    """The ranks over which a model is spread, which all call the same functions in the same order."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.own: int = distributed.get_rank()
        self.store: Any = distributed.distributed_c10d._get_default_store()

    @staticmethod
    def find(model: object) -> Ranks | None:
        """Return the ranks of a model, or None for a model that is not spread over several."""
        if not isinstance(model, nn.Module):
            return None
        if any_partitioned(model):
            return Ranks(list(range(distributed.get_world_size())))
        mesh = find_whole_mesh(model)
        if mesh is None or mesh.size() == 1:
            return None
        return Ranks(sorted(mesh.mesh.flatten().tolist()))

    @property
    def leads(self) -> bool:
        """Return whether this rank is the first."""
        return self.own == self.ranks[0]

    def agree(self, action: str, message: str) -> None:
        """Go on where all ranks have the same message.

        Args:
            action: what they do next, for the errors.
            message: what has to be the same on all ranks.

        Raises:
            RuntimeError: a rank did not come, or failed before.
            ValueError: a rank has another message.
        """
        messages = self._exchange(action, _FINE + _digest(message))
        others = [rank for rank, text in messages.items() if text != messages[self.own]]
        if others:
            raise ValueError(
                f"what ranks {action} with must be the same on all of them, but rank {self.own} differs from rank "
                f"{', '.join(map(str, others))}: it has {textwrap.shorten(message, _LONGEST)}"
            )

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Do in this context what may fail on one rank, which then is an error on all of them.

        Raises:
            RuntimeError: another rank failed, or did not come.
        """
        try:
            with self._beating():
                yield
        except Exception as error:
            self._exchange(action, f"{_FAILED}{type(error).__name__}: {error}", is_failing=True)
            raise
        self._exchange(action, _FINE)

    def _exchange(self, action: str, text: str, is_failing: bool = False) -> dict[int, str]:
        """Return what each rank says."""
        round_ = _count_round(self.ranks)
        key = f"fastprefix/{'-'.join(map(str, self.ranks))}/{round_}"
        self.store.set(f"{key}/{self.own}", text)
        if is_failing:
            return {}
        messages = {}
        for rank in self.ranks:
            if not self._wait(f"{key}/{rank}", rank):
                raise RuntimeError(
                    f"rank {rank} of the model did not come to {action} within {TIMEOUT:.0f} s. All ranks must call "
                    "the same functions of fastprefix in the same order: see the log of that rank."
                )
            messages[rank] = self.store.get(f"{key}/{rank}").decode()
        if failed := {rank: text for rank, text in messages.items() if text.startswith(_FAILED)}:
            rank, reason = next(iter(failed.items()))
            raise RuntimeError(f"to {action} failed on rank {rank}: {reason.removeprefix(_FAILED)}")
        return messages

    def _wait(self, key: str, rank: int) -> bool:
        """Wait for a message as long as its rank gives signs of life; return whether it came."""
        pulse, end = self.store.add(_name_pulse(rank), 0), monotonic() + TIMEOUT
        while (left := end - monotonic()) > 0:
            try:
                self.store.wait([key], timedelta(seconds=min(_BEAT, left)))
            except distributed.DistStoreError:
                former, pulse = pulse, self.store.add(_name_pulse(rank), 0)
                if pulse != former:
                    end = monotonic() + TIMEOUT
            else:
                return True
        return False

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Give signs of life in this context."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(_BEAT):
                self.store.add(_name_pulse(self.own), 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def do_together(model: nn.Module, action: str, work: Callable[[], Result]) -> Result:
    """Do work on all ranks of a model, of which each may fail, and return its result.

    Raises:
        RuntimeError: it failed on another rank, or a rank did not come.
    """
    ranks = Ranks.find(model)
    if ranks is None:
        return work()
    with ranks.together(action):
        return work()


def agree(model: nn.Module, action: str, message: str) -> None:
    """Go on where all ranks of a model have the same message.

    Raises:
        RuntimeError: a rank did not come.
        ValueError: a rank has another message.
    """
    ranks = Ranks.find(model)
    if ranks is not None:
        ranks.agree(action, message)


def leads(model: nn.Module) -> bool:
    """Return whether this is the first rank of a model, or the only one."""
    ranks = Ranks.find(model)
    return ranks is None or ranks.leads


_ROUNDS: dict[tuple[int, ...], int] = {}


def _count_round(ranks: list[int]) -> int:
    """Return the number of the exchange that begins."""
    key = tuple(ranks)
    _ROUNDS[key] = _ROUNDS.get(key, 0) + 1
    return _ROUNDS[key]


def _name_pulse(rank: int) -> str:
    return f"fastprefix/pulse/{rank}"


def _digest(message: str) -> str:
    return hashlib.sha256(message.encode()).hexdigest()
