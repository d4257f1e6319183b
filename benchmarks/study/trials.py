"""One training, told in full: what it trains, how, and on what. Its key changes with anything that its outcome does."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .contestants import Contestant, Rates

FORMAT = 1  # of outcomes; counted up when the same trial would come out otherwise


@dataclass(frozen=True)
class Setting:
    """What all trainings of a study share."""

    steps: int  # at most; early stopping may end one before
    length_steps: int  # the same, in the comparison over lengths
    search_steps: int  # of a training that only scores learning rates
    evaluate_every: int
    patience: int  # evaluations without a better one before a training ends
    rows: int
    max_length: int
    head_rate: float  # of the classifier's head, with every method; the head alone has rates of its own


@dataclass(frozen=True)
class Subject:
    """What is trained on: fingerprints of the weights and of the encoded texts, and the software."""

    model: str
    texts: str
    software: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A contestant with its learning rates and a seed; ``search``: short, and never tested."""

    contestant: Contestant
    rates: Rates
    seed: int
    search: bool
    setting: Setting
    subject: Subject

    @property
    def steps(self) -> int:
        """How many steps it takes at most."""
        steps = self.setting.length_steps if self.contestant.group == "length" else self.setting.steps
        return min(self.setting.search_steps, steps) if self.search else steps

    def description(self) -> dict[str, Any]:
        """All that the outcome depends on, as plain data."""
        config = self.contestant.config
        shared = {k: v for k, v in asdict(self.setting).items() if k not in ("steps", "length_steps", "search_steps")}
        description = {
            "format": FORMAT,
            "method": self.contestant.name,
            "trains": self.contestant.trains,
            "config": config.to_dict() if config else None,
            "rates": asdict(self.rates),
            "seed": self.seed,
            "search": self.search,
            "steps": self.steps,
            **shared,
            **asdict(self.subject),
        }
        plain: dict[str, Any] = json.loads(json.dumps(description))
        return plain

    def key(self) -> str:
        """Short, and another one for another description."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Point:
    """An evaluation on the dev split in the course of a training."""

    step: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class GateReading:
    """The gates after so many steps: of every layer, for every prefix token, on average over some dev texts."""

    step: int
    values: list[list[float]]


@dataclass(frozen=True)
class Outcome:
    """What became of a trial; the test split is scored with the weights that were best on the dev split."""

    dev_accuracy: float
    dev_loss: float
    best_step: int
    steps: int
    test_accuracy: float | None
    trainable: int  # the classifier's head not among them
    head: int
    seconds_a_step: float  # median; forward, backward and optimizer
    peak_bytes: int | None
    curve: list[Point] = field(default_factory=list)
    gates: list[GateReading] = field(default_factory=list)

    @property
    def score(self) -> tuple[float, float]:
        """What learning rates are chosen by: the dev split's accuracy, then its loss."""
        return self.dev_accuracy, -self.dev_loss

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Outcome":
        """What ``dataclasses.asdict`` made of one."""
        curve = [Point(**point) for point in values["curve"]]
        gates = [GateReading(**reading) for reading in values["gates"]]
        return cls(**{**values, "curve": curve, "gates": gates})
