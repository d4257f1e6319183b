"""Finished trials, a file each, so that a study goes on where it was stopped."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from .. import report
from ..errors import BenchmarkError, first_line
from .trials import Outcome, Trial


class Store:
    """Outcomes in a folder, by the key of their trial."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, which need not be there yet."""
        self.folder = folder

    def get(self, trial: Trial) -> Outcome | None:
        """The outcome of exactly this trial, if it was finished once."""
        path = self._path(trial)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return Outcome.from_dict(record["outcome"]) if record["trial"] == trial.description() else None
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path}: not a finished run, delete it ({first_line(error)})") from error

    def put(self, trial: Trial, outcome: Outcome) -> None:
        """Keep an outcome; an interruption leaves either all of it or nothing."""
        report.write_json({"trial": trial.description(), "outcome": asdict(outcome)}, self._path(trial))

    def _path(self, trial: Trial) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", trial.contestant.name.lower()).strip("-")
        kind = "search" if trial.search else "run"
        return self.folder / f"{slug}-{kind}-seed{trial.seed}-{trial.key()}.json"
