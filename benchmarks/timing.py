"""Timing that competitors share: interleaved rounds, so that a machine's mood hits all of them alike."""

import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .errors import first_line

NOISE = 0.15
"""As a share of the median: times that spread further are marked."""

Job = Callable[[int], float]
"""Does its round of the given number and returns the seconds that its timed part took."""


@dataclass
class Samples:
    """Seconds, one a round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Half of the rounds were faster."""
        return statistics.median(self.seconds)

    def percentile(self, percent: int) -> float:
        """The seconds that ``percent`` of the rounds stayed within, interpolated."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    @property
    def noisy(self) -> bool:
        """Whether p20 or p80 is further from the median than noise should be."""
        return max(self.percentile(80) - self.median, self.median - self.percentile(20)) > NOISE * self.median

    def summary(self) -> dict[str, float | int | list[float]]:
        """What the JSON keeps, in milliseconds."""
        return {
            "median_ms": 1e3 * self.median,
            "p20_ms": 1e3 * self.percentile(20),
            "p80_ms": 1e3 * self.percentile(80),
            "rounds": len(self.seconds),
            "raw_ms": [round(1e3 * s, 4) for s in self.seconds],
        }


@dataclass(frozen=True)
class Failure:
    """A competitor that raised: one line for the table, the whole story for the JSON."""

    stage: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception, stage: str) -> "Failure":
        """The error that was just caught."""
        return cls(stage, first_line(error), "".join(traceback.format_exception(error)))


class Clock:
    """Seconds of work on a device: by the wall's clock; on a GPU by its events, from an empty queue to an empty one."""

    def __init__(self, device: torch.device) -> None:
        """Measure what runs on ``device``."""
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        """The seconds that ``work()`` takes."""
        if self.device.type == "cuda":
            return self._by_events(work)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _by_events(self, work: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def timed(work: Callable[[], object], clock: Clock) -> Job:
    """A job that does the same in every round, all of it timed."""
    return lambda _: clock(work)


def until(seconds: float, *, least: int, warmup: int) -> Iterator[int]:
    """Numbers for ``interleave``: ``warmup`` of them, then what begins within ``seconds``, and ``least`` anyway."""
    yield from range(warmup)
    end = time.perf_counter() + seconds
    for i in itertools.count():
        if i >= least and time.perf_counter() >= end:
            return
        yield warmup + i


def interleave(
    jobs: Mapping[str, Job],
    rounds: Iterable[int],
    *,
    warmup: int = 0,
    stage: str = "timing",
    tick: Callable[[str], object] = lambda _: None,
) -> tuple[dict[str, Samples], dict[str, Failure]]:
    """Every job once a round, each round beginning with another one.

    Rounds numbered below ``warmup`` run but are not kept. A job that raises is left out of the rounds after it.

    Args:
        jobs: by name.
        rounds: their numbers: ``range(n)``, or a part of it where other work comes in between.
        warmup: the number of the first round to keep.
        stage: what to call this in a failure.
        tick: called with the job's name after each job of each round, for a progress bar.

    Returns:
        The samples of the jobs that came through, and the failures of the others.
    """
    names = list(jobs)
    samples = {name: Samples() for name in names}
    failures: dict[str, Failure] = {}
    for i in rounds:
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            if name not in failures:
                try:
                    seconds = jobs[name](i)
                    if i >= warmup:
                        samples[name].seconds.append(seconds)
                except Exception as error:  # a competitor's own fault must not lose the others' results
                    failures[name] = Failure.of(error, stage)
            tick(name)
    return {name: samples[name] for name in names if name not in failures}, failures
