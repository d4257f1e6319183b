"""Read and write files of results: the environment of a run, its settings, and one measured figure per line."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .measure import BenchmarkError, Row, describe_environment, explain, find_busyness

FOLDER = Path(__file__).parent / "results"
FIGURES = ("p50", "p20", "p80", "rounds", "samples", "steps", "launches", "clocks")
"""Columns with measured values. All other columns describe the case."""


@dataclass
class Record:
    """The results of one run of a suite."""

    suite: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    faults: list[Row] = field(default_factory=list)

    @classmethod
    def start(cls, suite: str, device: torch.device, quick: bool, **settings: Any) -> "Record":
        """Start an empty record with the environment of this machine."""
        return cls(suite, describe_environment(device), {"quick": quick, **settings})

    def add(self, rows: Iterable[Row], faults: Iterable[Row], path: Path) -> None:
        """Add rows and faults, and write the file."""
        self.rows += rows
        self.faults += faults
        self.write(path)

    def write(self, path: Path) -> Path:
        """Write the record to a file, or to the file of the suite in a folder, with one row per line."""
        path = path if path.suffix else path / f"{self.suite.replace('-', '_')}.json"
        head = {name: value for name, value in vars(self).items() if name != "rows"}
        text = json.dumps(head, indent=1, default=str).removesuffix("\n}")
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        write_text(f'{text},\n "rows": [\n{rows}\n ]\n}}\n', path)
        return path

    def conclude(self, folder: Path) -> int:
        """Write the record and print its faults. Return the exit status."""
        print(f"\nresults in {self.write(folder)}")
        return self.print_faults()

    def print_faults(self) -> int:
        """Print the faults of the record. Return the exit status."""
        for fault in self.faults:
            print(f"\n{describe_fault(fault)}\n{fault['traceback']}", file=sys.stderr)
        return 1 if self.faults else 0

    def find_objections(self) -> list[str]:
        """Return the reasons why these results must not be published."""
        objections = ["it was a quick run"] if self.settings.get("quick") else []
        if self.environment.get("dirty") is not False:
            objections.append("files differed from the commit, or git did not know")
        objections += filter(None, [find_busyness(self.environment)])
        return objections


def describe_fault(fault: Row) -> str:
    """Describe a failure in one line."""
    case = {name: value for name, value in fault.items() if name not in ("peer", "stage", "message", "traceback")}
    return f"{fault['peer']}, {describe_case(case)}: FAILED in {fault['stage']}: {fault['message']}"


def describe_case(case: Row) -> str:
    """Describe a case in one line."""
    return ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in case.items())


def case_of(row: Row) -> Row:
    """Return the parameters of a row's case."""
    return {k: v for k, v in row.items() if k not in (*FIGURES, "peer", "role", "direction", "quantity")}


def describe_times(rows: list[Row]) -> str:
    """Describe one case. For each direction, show the time of the floor and the ratios of its peers to the floor."""
    timed = [row for row in rows if row["quantity"] == "seconds"]
    lines = [describe_case(case_of(timed[0]))] if timed else []
    for direction in dict.fromkeys(row["direction"] for row in timed):
        chosen = [row for row in timed if row["direction"] == direction]
        # If the floor trains nothing, its forward pass is the unit.
        floor = next((row["p50"] for row in (*chosen, *timed) if row["role"] == "floor"), float("nan"))
        ratios = "  ".join(f"{row['peer']} {row['p50'] / floor:.2f}" for row in chosen)
        lines.append(f"  {direction:17} floor {1e3 * floor:.3f} ms; x floor: {ratios}")
    return "\n".join(lines)


def read(path: Path) -> Record:
    """Read the record of a file."""
    with explain(f"{path} must be a file of results of `python -m benchmarks`"):
        return Record(**json.loads(path.read_text(encoding="utf-8")))


def read_all(folder: Path) -> list[tuple[Path, Record]]:
    """Read all results in a folder and its subfolders, except studies, whose rows are not figures of peers.

    Other JSON files, such as those of models that the suite ``cartridge`` stores, are left out.
    """
    found = []
    for path in sorted(folder.resolve().rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"suite", "rows"} <= content.keys() and content["suite"] != "study":
            found.append((path, Record(**content)))
    if not found:
        raise BenchmarkError(f"{folder}: this folder and its subfolders contain no JSON files of results")
    return found


def write_text(text: str, path: Path) -> None:
    """Write a file under a temporary name and rename it, so that an interrupted run keeps the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
