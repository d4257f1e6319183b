"""Results as data: one tidy row for each measured figure, whichever suite it comes from.

A suite's JSON holds a ``Run``: the environment, the suite's settings and its cells. A cell says what was measured (the
case's parameters, the competitor and its role, the direction, the quantity) and what came out (median, p20, p80).
Nothing that follows from the cells is kept with them: ratios, means and floors are computed where they are shown.
"""

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from . import report
from .errors import BenchmarkError
from .timing import Failure, Samples

Role = Literal["floor", "ours", "peer"]
Quantity = Literal["seconds", "bytes", "parameters", "loss"]
Value = str | int | float | bool
Case = Mapping[str, Value]

FOLDER = Path(__file__).parent / "results"
MOST_SAMPLES = 50
"""Raw times are kept with a cell that has no more of them."""


@dataclass(frozen=True)
class Cell:
    """A measured figure: seconds of one call or step, bytes at the peak, ...; what was not kept is None."""

    case: Case
    competitor: str
    role: Role
    direction: str
    quantity: Quantity
    p50: float
    p20: float | None = None
    p80: float | None = None
    rounds: int | None = None
    samples: list[float] | None = None

    @classmethod
    def timed(cls, case: Case, competitor: str, role: Role, direction: str, samples: Samples) -> "Cell":
        """The seconds of all rounds."""
        quantiles = {f"p{percent}": samples.percentile(percent) for percent in (20, 50, 80)}
        few = len(samples.seconds) <= MOST_SAMPLES
        raw = [round(seconds, 7) for seconds in samples.seconds] if few else None
        return cls(case, competitor, role, direction, "seconds", **quantiles, rounds=len(samples.seconds), samples=raw)

    @property
    def place(self) -> tuple[Any, ...]:
        """What competitors must share to be compared, but for the direction."""
        return (self.quantity, *sorted(self.case.items()))

    def record(self) -> dict[str, Any]:
        """What the JSON keeps."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Fault:
    """A competitor that failed, and in which case."""

    case: Case
    competitor: str
    failure: Failure


@dataclass(frozen=True)
class Run:
    """All that one run of a suite measured."""

    suite: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    cells: Sequence[Cell]
    faults: Sequence[Fault] = ()

    @property
    def instructions(self) -> str | None:
        """The CPU's best that were used, where it ran on one."""
        environment = self.environment
        return environment.get("cpu_capability") if environment.get("device") == "cpu" else None

    def select(self, quantity: Quantity = "seconds", case: Case | None = None, **more: Value) -> list[Cell]:
        """The cells of a quantity that have the case's values, and these of competitor, role, direction or case."""
        wanted = {**(case or {}), **more}

        def matches(cell: Cell) -> bool:
            values = {"competitor": cell.competitor, "role": cell.role, "direction": cell.direction, **cell.case}
            return all(values.get(name) == value for name, value in wanted.items())

        return [cell for cell in self.cells if cell.quantity == quantity and matches(cell)]

    def one(self, quantity: Quantity = "seconds", case: Case | None = None, **more: Value) -> Cell:
        """The only cell that ``select`` finds."""
        found = self.select(quantity, case, **more)
        if len(found) != 1:
            raise BenchmarkError(f"{self.suite}: {len(found)} cells of {quantity} {dict(case or {})} {more}")
        return found[0]

    def beside(self, cell: Cell, competitor: str) -> Cell | None:
        """Another competitor's cell of the same case, direction and quantity, where it came through."""
        return self._cells.get((competitor, cell.direction, *cell.place))

    def floor_of(self, cell: Cell) -> Cell | None:
        """The floor's cell to compare with: in the same direction; the forward one where the floor trains nothing."""
        return self._floors.get((cell.direction, *cell.place)) or self._floors.get(("forward", *cell.place))

    def times_floor(self, cell: Cell) -> float | None:
        """The cell's median as a multiple of the floor's."""
        floor = self.floor_of(cell)
        return cell.p50 / floor.p50 if floor and floor.p50 else None

    @functools.cached_property
    def _cells(self) -> dict[tuple[Any, ...], Cell]:
        return {(cell.competitor, cell.direction, *cell.place): cell for cell in self.cells}

    @functools.cached_property
    def _floors(self) -> dict[tuple[Any, ...], Cell]:
        return {(cell.direction, *cell.place): cell for cell in self.cells if cell.role == "floor"}


@dataclass(frozen=True)
class Device:
    """The runs whose files lie in one folder, which has the device's name."""

    folder: Path
    runs: list[Run]

    @property
    def name(self) -> str:
        """What the device goes by."""
        return self.folder.name

    def run(self, suite: str, **environment: object) -> Run:
        """The one of a suite, among several the one with these facts."""
        found = [
            run
            for run in self.runs
            if run.suite == suite and all(run.environment.get(name) == value for name, value in environment.items())
        ]
        if len(found) != 1:
            raise BenchmarkError(f"{self.name}: {len(found)} results of {suite} {environment or ''}, one is needed")
        return found[0]


def write(run: Run, folder: Path) -> Path:
    """Keep a run, a cell a line, in a file named after its suite."""
    path = folder / f"{run.suite.replace('-', '_')}.json"
    head = {
        "suite": run.suite,
        "environment": run.environment,
        "settings": run.settings,
        "faults": [asdict(fault) for fault in run.faults],
    }
    cells = ",\n".join(f"  {json.dumps(cell.record())}" for cell in run.cells)
    text = json.dumps(head, indent=1, default=str).removesuffix("\n}")
    report.write_text(f'{text},\n "cells": [\n{cells}\n ]\n}}\n', path)
    return path


def conclude(run: Run, folder: Path) -> int:
    """The end of a suite: its file written, its faults shown. Exit status 1 if there were any."""
    print(f"\nresults in {write(run, folder)}")
    for fault in run.faults:
        print(f"\n{fault.competitor} {dict(fault.case)} failed:\n{fault.failure.traceback}", file=sys.stderr)
    return 1 if run.faults else 0


class NoCellsError(BenchmarkError):
    """JSON of another kind."""


def read(path: Path) -> Run:
    """A suite's JSON, the main job's among them."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path}: could not be read ({error})") from error
    if not (isinstance(document, dict) and {"suite", "environment"} <= set(document)):
        raise NoCellsError(f"{path}: not the results of a suite of `python -m benchmarks`")
    if document["suite"] == "main":
        models = {subject["title"]: subject["description"] for subject in document["subjects"]}
        settings = {"corpus": document["corpus"], "models": models}
        return Run("main", document["environment"], settings, list(_main_cells(document)), list(_main_faults(document)))
    if "cells" not in document:
        raise NoCellsError(f"{path}: results of {document['suite']}, which has no cells")
    faults = [Fault(f["case"], f["competitor"], Failure(**f["failure"])) for f in document["faults"]]
    cells = [Cell(**cell) for cell in document["cells"]]
    return Run(document["suite"], document["environment"], document["settings"], cells, faults)


def read_devices(folder: Path) -> list[Device]:
    """The devices in a folder of results: a folder each; or the folder itself, where JSON lies in it directly."""
    folders = [folder] if list(folder.glob("*.json")) else sorted(path for path in folder.glob("*") if path.is_dir())
    devices = [Device(path.resolve(), list(_readable(sorted(path.glob("*.json"))))) for path in folders]
    if not any(device.runs for device in devices):
        raise BenchmarkError(f"{folder}: no results, neither JSON nor folders with JSON")
    return devices


def _readable(paths: Iterable[Path]) -> Iterator[Run]:
    """Raw figures of other tools may lie beside the results; that they are left out is said."""
    for path in paths:
        try:
            yield read(path)
        except NoCellsError as error:
            print(f"left out: {error}", file=sys.stderr)


_MAIN_DIRECTIONS = {"forward": "forward", "forward_backward": "forward+backward"}
_MAIN_ROLES: dict[str, Role] = {"floor": "floor", "fastprefix": "ours", "peft": "peer"}


def _main_cells(document: dict[str, Any]) -> Iterator[Cell]:
    """The main job keeps its story by model and method; here are its figures."""
    for subject in document["subjects"]:
        case = _main_case(subject)
        for method in subject["methods"]:
            name, role = method["method"], _MAIN_ROLES[method["source"]]
            for key, direction in _MAIN_DIRECTIONS.items():
                if method[key]:
                    yield _from_summary(case, name, role, direction, method[key])
            for what, quantity, value in _main_figures(method):
                if value is not None:
                    yield Cell(case, name, role, what, quantity, value)


def _main_faults(document: dict[str, Any]) -> Iterator[Fault]:
    for subject in document["subjects"]:
        for method in subject["methods"]:
            if method["failure"]:
                yield Fault(_main_case(subject), method["method"], Failure(**method["failure"]))


def _main_case(subject: dict[str, Any]) -> Case:
    return {"model": subject["title"], "tokens": subject["tokens_per_step"]}


def _main_figures(method: dict[str, Any]) -> Iterator[tuple[str, Quantity, float | None]]:
    yield "forward+backward", "bytes", method["peak_bytes"]
    yield "training", "parameters", method["trainable"]
    if method["held_out_losses"]:
        yield "before training", "loss", method["held_out_losses"][0][1]
        yield "after training", "loss", method["held_out_losses"][-1][1]


def _from_summary(case: Case, competitor: str, role: Role, direction: str, summary: dict[str, Any]) -> Cell:
    seconds = {name: summary[key] / 1e3 for name, key in (("p50", "median_ms"), ("p20", "p20_ms"), ("p80", "p80_ms"))}
    raw = [ms / 1e3 for ms in summary["raw_ms"]]
    return Cell(case, competitor, role, direction, "seconds", **seconds, rounds=summary["rounds"], samples=raw)
