"""All methods on one model and one task: trained and timed side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from .methods import FLOOR, Method
from .models import with_shared_weights
from .tasks import Task
from .timing import Clock, Failure, Samples, interleave
from .training import Trainee

Tick = Callable[[str], object]


@dataclass(frozen=True)
class Rounds:
    """How often: training steps, evaluations after the one that comes first, and steps whose time is dropped."""

    steps: int
    evaluations: int
    warmup: int

    def cuts(self) -> list[int]:
        """After how many steps to evaluate, from 0 to all of them."""
        parts = min(self.evaluations, self.steps)
        return [self.steps * k // parts for k in range(parts + 1)]

    def ticks(self, methods: int, task: Task) -> int:
        """How many ticks ``Contest.run`` gives for so many methods."""
        return methods * (self.steps + len(self.cuts()) * len(task.held_out))


@dataclass
class Result:
    """What became of one method; what was not measured, because the method failed before, is empty or None."""

    method: Method
    trainable: int | None = None
    forward: Samples = field(default_factory=Samples)
    step: Samples = field(default_factory=Samples)
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    losses: list[float] = field(default_factory=list)  # of every training step, each on its own batch
    held_out_losses: list[tuple[int, float]] = field(default_factory=list)  # (steps trained, mean loss)
    failure: Failure | None = None

    def finish(self, trainee: Trainee, cuts: list[int], task: Task) -> None:
        """Take over what the trainee knows at the end."""
        self.losses = trainee.losses
        self.held_out_losses = list(zip(cuts, trainee.held_out_curve(), strict=True))
        self.tokens_per_second = task.tokens_per_step() / self.step.median
        self.peak_bytes = trainee.peak_memory()

    def record(self, floor: "Result") -> dict[str, Any]:
        """What the JSON keeps."""
        times = {"forward": (self.forward, floor.forward), "forward_backward": (self.step, floor.step)}
        return {
            "method": self.method.name,
            "source": self.method.source,
            "trainable": self.trainable,
            **{name: samples.summary() if samples.seconds else None for name, (samples, _) in times.items()},
            **{f"{name}_times_floor": times_floor(*pair) for name, pair in times.items()},
            "tokens_per_second": self.tokens_per_second,
            "peak_bytes": self.peak_bytes,
            "losses": self.losses,
            "held_out_losses": self.held_out_losses,
            "failure": vars(self.failure) if self.failure else None,
        }


def times_floor(samples: Samples, floor: Samples) -> float | None:
    """The ratio of the medians, where both were measured."""
    return samples.median / floor.median if samples.seconds and floor.seconds else None


def floor_of(results: list[Result]) -> Result:
    """The frozen floor among the results."""
    return next(result for result in results if result.method.name == FLOOR)


class Contest:
    """Every method on its own copy of one model, on one task. A method that fails keeps its times until then."""

    def __init__(self, model: PreTrainedModel, task: Task, methods: Sequence[Method], seed: int) -> None:
        """Prepare all methods."""
        self._task = task
        self._clock = Clock(next(model.parameters()).device)
        self._results = {method.name: Result(method) for method in methods}
        self._trainees: dict[str, Trainee] = {}  # of the methods that have not failed
        for method in methods:
            torch.manual_seed(seed)
            with self._excused(method.name, "set-up"):
                self._prepare(method, with_shared_weights(model))

    def run(self, rounds: Rounds, tick: Tick) -> list[Result]:
        """Train the methods side by side, and evaluate them before, between and after equal parts of the training.

        Training and evaluation are what is timed: in round i every method does its step i, on the same batch, or its
        pass i over the held-out batches.
        """
        passes = len(self._task.held_out)
        cuts = rounds.cuts()
        for k, stop in enumerate(cuts):
            start = cuts[k - 1] if k else 0
            self._train(range(start, stop), min(rounds.warmup, rounds.steps - 1), tick)
            self._evaluate(range(k * passes, (k + 1) * passes), passes, tick)
        for name in list(self._trainees):
            with self._excused(name, "memory"):
                self._results[name].finish(self._trainees[name], cuts, self._task)
        return list(self._results.values())

    def _prepare(self, method: Method, model: PreTrainedModel) -> None:
        length = self._task.train[0]["input_ids"].shape[1]
        prepared = method.prepare(model, self._task.kind, length)
        self._results[method.name].trainable = prepared.trainable()
        self._trainees[method.name] = Trainee(prepared, self._task, self._clock)

    def _train(self, rounds: range, warmup: int, tick: Tick) -> None:
        jobs = {name: trainee.train_step for name, trainee in self._trainees.items()}
        samples, failures = interleave(jobs, rounds, warmup=warmup, stage="training", tick=tick)
        for name, of_method in samples.items():
            self._results[name].step.seconds += of_method.seconds
        self._drop(failures)

    def _evaluate(self, rounds: range, warmup: int, tick: Tick) -> None:
        jobs = {name: trainee.evaluate for name, trainee in self._trainees.items()}
        samples, failures = interleave(jobs, rounds, warmup=warmup, stage="evaluation", tick=tick)
        for name, of_method in samples.items():
            self._results[name].forward.seconds += of_method.seconds
        self._drop(failures)

    @contextmanager
    def _excused(self, name: str, stage: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a method's own fault must not lose the others' results
            self._drop({name: Failure.of(error, stage)})

    def _drop(self, failures: dict[str, Failure]) -> None:
        for name, failure in failures.items():
            self._results[name].failure = failure
            self._trainees.pop(name, None)  # and with it its memory
