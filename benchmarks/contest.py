"""All methods on one model and one task: trained and timed side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .methods import FLOOR, Method
from .models import with_shared_weights
from .report import ratio
from .tasks import Task
from .timing import Clock, Failure, Samples, interleave
from .training import Trainee

Tick = Callable[[str], object]


@dataclass(frozen=True)
class Rounds:
    """How often: training steps (each a sample of forward + backward), forward passes, and warm-up of either."""

    steps: int
    forward: int
    warmup: int

    def ticks(self, methods: int) -> int:
        """How many ticks ``Contest.run`` gives for so many methods."""
        return methods * (self.steps + self.forward + self.warmup)


@dataclass
class Result:
    """What became of one method; whatever was not measured, because the method failed before, is None."""

    method: Method
    trainable: int | None = None
    forward: Samples | None = None
    step: Samples | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    losses: list[float] | None = None
    failure: Failure | None = None

    def record(self, floor: "Result") -> dict[str, Any]:
        """What the JSON keeps."""
        times = {"forward": (self.forward, floor.forward), "forward_backward": (self.step, floor.step)}
        return {
            "method": self.method.name,
            "source": self.method.source,
            "trainable": self.trainable,
            **{name: samples.summary() if samples else None for name, (samples, _) in times.items()},
            **{f"{name}_times_floor": times_floor(*pair) for name, pair in times.items()},
            "tokens_per_second": self.tokens_per_second,
            "peak_bytes": self.peak_bytes,
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
            "losses": self.losses,
            "failure": vars(self.failure) if self.failure else None,
        }


def times_floor(samples: Samples | None, floor: Samples | None) -> float | None:
    """The ratio of the medians."""
    return ratio(samples.median if samples else None, floor.median if floor else None)


def floor_of(results: list[Result]) -> Result:
    """The frozen floor among the results."""
    return next(result for result in results if result.method.name == FLOOR)


class Contest:
    """Every method on its own copy of one model, on one task. A method that fails keeps what was measured before."""

    def __init__(self, model: PreTrainedModel, task: Task, methods: Sequence[Method], seed: int) -> None:
        """Prepare all methods and take their losses before training."""
        self._task = task
        self._clock = Clock(next(model.parameters()).device)
        self._results = {method.name: Result(method) for method in methods}
        self._trainees: dict[str, Trainee] = {}  # of the methods that have not failed
        for method in methods:
            torch.manual_seed(seed)
            with self._excused(method.name, "set-up"):
                self._prepare(method, with_shared_weights(model))

    def run(self, rounds: Rounds, tick: Tick) -> list[Result]:
        """Train and time the methods side by side.

        Training is what is timed: in round i every method does its step i, on the same batch. Passes without gradients
        follow, then memory and the losses after training, one method after another.
        """
        for name, samples in self._interleaved("training", Trainee.train_step, rounds.steps, rounds, tick).items():
            self._results[name].step = samples
            self._results[name].tokens_per_second = self._task.tokens_per_step() / samples.median
        passes = rounds.forward + rounds.warmup
        for name, samples in self._interleaved("forward", Trainee.forward, passes, rounds, tick).items():
            self._results[name].forward = samples
        for name in list(self._trainees):
            with self._excused(name, "evaluation"):
                self._finish(self._results[name], self._trainees[name])
        return list(self._results.values())

    def _prepare(self, method: Method, model: PreTrainedModel) -> None:
        length = self._task.train[0]["input_ids"].shape[1]
        trainee = Trainee(method.prepare(model, self._task.kind, length), self._task, self._clock)
        self._results[method.name].trainable = trainee.prepared.trainable()
        self._results[method.name].loss_first = trainee.held_out_loss()
        self._trainees[method.name] = trainee

    def _finish(self, result: Result, trainee: Trainee) -> None:
        result.losses = trainee.losses
        result.loss_last = trainee.held_out_loss()
        result.peak_bytes = trainee.peak_memory()

    def _interleaved(
        self, stage: str, job: Callable[[Trainee, int], float], count: int, rounds: Rounds, tick: Tick
    ) -> dict[str, Samples]:
        jobs = {name: partial(job, trainee) for name, trainee in self._trainees.items()}
        warmup = min(rounds.warmup, count - 1)  # at least one round is kept
        samples, failures = interleave(jobs, count, warmup=warmup, stage=stage, tick=tick)
        for name, failure in failures.items():
            self._drop(name, failure)
        return samples

    @contextmanager
    def _excused(self, name: str, stage: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a method's own fault must not lose the others' results
            self._drop(name, Failure.of(error, stage))

    def _drop(self, name: str, failure: Failure) -> None:
        self._results[name].failure = failure
        self._trainees.pop(name, None)  # and with it its memory
