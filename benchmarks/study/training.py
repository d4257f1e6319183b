"""One trial from its seed to its outcome."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from ..memory import added_peak
from ..methods import Prepared, attached, group_of
from ..models import head_parameters
from ..tasks import Batch
from ..timing import Clock
from . import batches, gates
from .batches import Encoded, EncodedTexts
from .trials import GateReading, Outcome, Point, Trial

WARMUP = 0.06  # of the steps; then the rate falls to 0 in a line
LARGEST_NORM = 1.0  # of all gradients together
EVALUATION_ROWS = 64

Load = Callable[[int], PreTrainedModel]
"""The pretrained model with a fresh head of the given seed."""


class EarlyStopping:
    """Remembers the best score, and says when there was none better for ``patience`` evaluations."""

    def __init__(self, patience: int) -> None:
        """Stop after so many evaluations that were no better than the best."""
        self._left = self._patience = patience
        self._best: tuple[float, float] | None = None

    def better(self, score: tuple[float, float]) -> bool:
        """Take note of a score; whether it is the best so far."""
        if self._best is None or score > self._best:
            self._best = score
            self._left = self._patience
            return True
        self._left -= 1
        return False

    @property
    def stop(self) -> bool:
        """Whether to wait no longer."""
        return self._left <= 0


@dataclass(frozen=True)
class Bench:
    """What trials are run with: the model, the texts, the device."""

    load: Load
    texts: EncodedTexts
    device: torch.device


def run(trial: Trial, bench: Bench, tick: Callable[[], object]) -> Outcome:
    """Train, stop early, and score the best weights; ``tick`` is called after every step."""
    torch.manual_seed(trial.seed)
    prepared = prepare(trial, bench.load(trial.seed))
    training = _Training(trial, prepared, bench)
    training.train(tick)
    return training.outcome()


def prepare(trial: Trial, model: PreTrainedModel) -> Prepared:
    """The model with what is trained, and its learning rates."""
    config, rates, head_rate = trial.contestant.config, trial.rates, trial.setting.head_rate
    if config is not None:
        # A rate that a method has nothing for goes unused.
        return attached(model, config, rates.main or 0.0, rates.prompt or 0.0, head_rate, rates.gate)
    assert rates.main is not None
    head = head_parameters(model)
    if trial.contestant.trains == "head":
        model.requires_grad_(False)
        for parameter in head:
            parameter.requires_grad_(True)
        return Prepared(model, group_of(head, rates.main))
    body = [p for p in model.parameters() if p not in set(head)]
    return Prepared(model, group_of(body, rates.main) + group_of(head, head_rate))


class _Training:
    def __init__(self, trial: Trial, prepared: Prepared, bench: Bench) -> None:
        self.trial, self.bench = trial, bench
        assert isinstance(prepared.model, PreTrainedModel)
        self.model: PreTrainedModel = prepared.model
        self.trainable = prepared.trainable()
        self.parameters = [p for group in prepared.groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(prepared.groups, weight_decay=0.0)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, round(WARMUP * trial.steps), trial.steps)
        self.clock = Clock(bench.device)
        self.seconds: list[float] = []
        self.curve: list[Point] = []
        self.gates: list[GateReading] = []
        self.best: tuple[Point, list[Tensor]] | None = None

    def train(self, tick: Callable[[], object]) -> None:
        """All steps, or fewer; afterwards the weights are the best ones."""
        stopping = EarlyStopping(self.trial.setting.patience)
        self._read_gates(0)
        setting, texts = self.trial.setting, self.bench.texts
        stream = batches.for_training(
            texts.train, texts.pad, setting.rows, self.trial.steps, self.trial.seed, self.bench.device
        )
        for step, batch in enumerate(stream, start=1):
            self.model.train()
            self.seconds.append(self.clock(lambda batch=batch: self._step(batch)))  # type: ignore[misc]
            tick()
            if step % setting.evaluate_every == 0 or step == self.trial.steps:
                self._evaluate(step, stopping)
            if stopping.stop:
                break
        self._restore()

    def _step(self, batch: Batch) -> None:
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, step: int, stopping: EarlyStopping) -> None:
        accuracy, loss = score(self.model, self.bench.texts.dev, self.bench)
        point = Point(step, accuracy, loss)
        self.curve.append(point)
        self._read_gates(step)
        if stopping.better((accuracy, -loss)):
            self.best = point, [p.detach().clone() for p in self.parameters]

    def _read_gates(self, step: int) -> None:
        if self.trial.search:
            return
        self.model.eval()
        dev = self.bench.texts.dev
        probe = batches.collate(
            dev, range(min(EVALUATION_ROWS, len(dev.rows))), self.bench.texts.pad, self.bench.device
        )
        if (values := gates.read(self.model, probe)) is not None:
            self.gates.append(GateReading(step, values))

    @torch.no_grad()
    def _restore(self) -> None:
        assert self.best is not None
        for parameter, value in zip(self.parameters, self.best[1], strict=True):
            parameter.copy_(value)

    def outcome(self) -> Outcome:
        assert self.best is not None
        point = self.best[0]
        head = sum(p.numel() for p in head_parameters(self.model))
        search = self.trial.search
        return Outcome(
            dev_accuracy=point.accuracy,
            dev_loss=point.loss,
            best_step=point.step,
            steps=len(self.seconds),
            test_accuracy=None if search else score(self.model, self.bench.texts.test, self.bench)[0],
            trainable=self.trainable - head,
            head=head,
            seconds_a_step=statistics.median(self.seconds),
            peak_bytes=None if search else self._peak(),
            curve=self.curve,
            gates=self.gates,
        )

    def _peak(self) -> int:
        self.model.train()
        texts = self.bench.texts
        chosen = batches.longest(texts.train, self.trial.setting.rows)
        batch = batches.collate(texts.train, chosen, texts.pad, self.bench.device)
        return added_peak(lambda: self.model(**batch).loss.backward(), self.bench.device)


@torch.no_grad()
def score(model: PreTrainedModel, part: Encoded, bench: Bench) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    correct, loss = 0, 0.0
    for batch in batches.for_evaluation(part, bench.texts.pad, EVALUATION_ROWS, bench.device):
        output = model(**batch)
        correct += int((output.logits.argmax(dim=-1) == batch["labels"]).sum())
        loss += float(output.loss) * len(batch["labels"])
    return correct / len(part.rows), loss / len(part.rows)
