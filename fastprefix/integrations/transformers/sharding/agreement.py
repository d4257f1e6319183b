"""Have the ranks of a sharded model agree before and after their joint operations.

If a rank is missing, fails or does something else, every rank must raise an error instead of waiting in a collective
forever. The ranks exchange short messages through the store of the process group, which needs no collective and works
with every backend. They wait for each other for a limited time.
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
"""The number of seconds that a rank waits for another rank."""
_BEAT = 5.0
"""The number of seconds between two heartbeats of a rank that works while other ranks wait."""
_LONGEST = 300  # maximum length of a message in an error
_FINE, _FAILED = "fine: ", "failed: "

Result = TypeVar("Result")


class Ranks:
    """The ranks of a distributed model. All of them call the same functions in the same order."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.own: int = distributed.get_rank()
        self.store: Any = distributed.distributed_c10d._get_default_store()

    @staticmethod
    def find(model: object) -> Ranks | None:
        """Return the ranks of a model, or None if it is on a single rank."""
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
        """Wait for all ranks, and check that they have the same message.

        Args:
            action: the operation that follows, such as "read an adapter". Error messages contain it.
            message: the text that must be equal on all ranks.

        Raises:
            RuntimeError: if a rank did not arrive within ``TIMEOUT``, or failed before.
            ValueError: if a rank has another message.
        """
        messages = self._exchange(action, _FINE + _digest(message))
        others = [rank for rank, text in messages.items() if text != messages[self.own]]
        if others:
            raise ValueError(
                f"to {action}, all ranks must use the same values, but rank {self.own} differs from rank "
                f"{', '.join(map(str, others))}: it has {textwrap.shorten(message, _LONGEST)}"
            )

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Run work in this context that may fail on one rank. A failure raises an error on all ranks.

        Raises:
            RuntimeError: if another rank failed or did not arrive within ``TIMEOUT``.
        """
        try:
            with self._beating():
                yield
        except Exception as error:
            self._exchange(action, f"{_FAILED}{type(error).__name__}: {error}", is_failing=True)
            raise
        self._exchange(action, _FINE)

    def _exchange(self, action: str, text: str, is_failing: bool = False) -> dict[int, str]:
        """Send a text to all ranks, and return the text of each rank."""
        round_ = _count_round(self.ranks)
        key = f"fastprefix/{'-'.join(map(str, self.ranks))}/{round_}"
        self.store.set(f"{key}/{self.own}", text)
        if is_failing:
            return {}
        messages = {}
        for rank in self.ranks:
            if not self._wait(f"{key}/{rank}", rank):
                raise RuntimeError(
                    f"rank {rank} of the model did not respond within {TIMEOUT:.0f} s, so the ranks cannot {action}. "
                    "All ranks must call the same functions of fastprefix in the same order. See the log of that rank."
                )
            messages[rank] = self.store.get(f"{key}/{rank}").decode()
        if failed := {rank: text for rank, text in messages.items() if text.startswith(_FAILED)}:
            rank, reason = next(iter(failed.items()))
            raise RuntimeError(f"rank {rank} failed to {action}: {reason.removeprefix(_FAILED)}")
        return messages

    def _wait(self, key: str, rank: int) -> bool:
        """Wait for a message while its rank sends heartbeats, and return whether the message arrived."""
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
        """Send heartbeats in this context."""
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
    """Run work on all ranks of a model, and return this rank's result. A failure on one rank is an error on all ranks.

    Raises:
        RuntimeError: if the work failed on another rank, or a rank did not arrive.
    """
    ranks = Ranks.find(model)
    if ranks is None:
        return work()
    with ranks.together(action):
        return work()


def agree(model: nn.Module, action: str, message: str) -> None:
    """Wait for all ranks of a model, and check that they have the same message.

    Raises:
        RuntimeError: if a rank did not arrive.
        ValueError: if a rank has another message.
    """
    ranks = Ranks.find(model)
    if ranks is not None:
        ranks.agree(action, message)


def leads(model: nn.Module) -> bool:
    """Return whether this is the first or only rank of a model."""
    ranks = Ranks.find(model)
    return ranks is None or ranks.leads


_ROUNDS: dict[tuple[int, ...], int] = {}


def _count_round(ranks: list[int]) -> int:
    """Return the number of the next exchange between these ranks."""
    key = tuple(ranks)
    _ROUNDS[key] = _ROUNDS.get(key, 0) + 1
    return _ROUNDS[key]


def _name_pulse(rank: int) -> str:
    return f"fastprefix/pulse/{rank}"


def _digest(message: str) -> str:
    return hashlib.sha256(message.encode()).hexdigest()
