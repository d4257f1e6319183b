"""Whether something became slower: a new result against the committed one of the same suite and device.

Only ratios are compared, to the floor of the same run: a slow or a throttled machine slows both down. A busy one does
not slow all alike, and this says so. A ratio has moved when its range before, from p20 / (the floor's p80) to p80 /
(the floor's p20), and its range now do not overlap, and the medians differ by more than a tolerance; a figure without
p20 and p80 is a range of one point.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import environment, results
from .errors import BenchmarkError
from .report import number, table
from .results import Cell, Run
from .summaries import case_text, fault_text

DESCRIPTION = "A new result against the committed one of the same suite and device: which ratios moved, and whither."
SAME_DEVICE = ("device_name", "cpu_capability", "threads")
QUANTITIES = ("seconds", "bytes")
TOLERANCE = 0.05


@dataclass(frozen=True)
class Span:
    """A ratio to the floor: of the medians, and the range that p20 and p80 allow."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, run: Run, cell: Cell) -> "Span | None":
        """A cell's, where there is a floor to compare with."""
        floor = run.floor_of(cell)
        if floor is None or not floor.p50:
            return None
        low = (cell.p20 or cell.p50) / (floor.p80 or floor.p50)
        high = (cell.p80 or cell.p50) / (floor.p20 or floor.p50)
        return cls(low, cell.p50 / floor.p50, high)

    def apart(self, other: "Span") -> bool:
        """Whether the ranges have nothing in common."""
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True)
class Change:
    """One cell's ratio, before and now."""

    cell: Cell
    before: Span
    now: Span

    @property
    def factor(self) -> float:
        """Above 1: more time or memory than before."""
        return self.now.median / self.before.median

    def moved(self, tolerance: float) -> bool:
        """By more than noise."""
        return self.before.apart(self.now) and abs(self.factor - 1) > tolerance

    @property
    def regression(self) -> bool:
        """Worse, and of this package; for a change that moved."""
        return self.factor > 1 and self.cell.role == "ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("new", type=Path, metavar="NEW.json", help="what a suite has written")
    parser.add_argument(
        "--against", type=Path, default=results.FOLDER, metavar="DIR", help="the results to compare with"
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"default: {TOLERANCE}")


def run(options: argparse.Namespace) -> int:
    """Print what moved; 1 if anything of this package became worse, or failed."""
    new = results.read(options.new)
    old = same_device(new, [of for device in results.read_devices(options.against) for of in device.runs])
    both = list(changes(old, new))
    if not both:
        raise BenchmarkError(f"{options.new}: no case in common with the result of {old.environment['date']}")
    moved = sorted((change for change in both if change.moved(options.tolerance)), key=lambda change: -change.factor)
    print(f"{new.suite}: {len(both)} ratios against those of {old.environment['date']}; {len(moved)} moved")
    if busy := environment.busy(new.environment):
        print(busy)
    if moved:
        header = ("case", "competitor", "what", "x floor before", "now", "change", "")
        print("\n" + table(header, [_row(change) for change in moved]))
    for fault in new.faults:
        print(fault_text(fault))
    ours = {cell.competitor for cell in old.cells if cell.role == "ours"}
    failed = any(fault.competitor in ours for fault in new.faults)
    return int(failed or any(change.regression for change in moved))


def same_device(new: Run, runs: Sequence[Run]) -> Run:
    """The run of the suite on the same device, instructions and threads."""
    wanted = {name: new.environment.get(name) for name in SAME_DEVICE}
    found = [
        of for of in runs if of.suite == new.suite and {name: of.environment.get(name) for name in wanted} == wanted
    ]
    if len(found) != 1:
        raise BenchmarkError(f"{len(found)} results of {new.suite} to compare with on {wanted}, one is needed")
    return found[0]


def changes(old: Run, new: Run) -> Iterator[Change]:
    """Every ratio that both runs have."""
    before = {(cell.competitor, cell.direction, cell.place): cell for cell in old.cells}
    for cell in new.cells:
        other = before.get((cell.competitor, cell.direction, cell.place))
        if other is None or cell.role == "floor" or cell.quantity not in QUANTITIES:
            continue
        spans = Span.of(old, other), Span.of(new, cell)
        if spans[0] and spans[1]:
            yield Change(cell, spans[0], spans[1])


def _row(change: Change) -> list[str]:
    verdict = "regression" if change.regression else "better" if change.cell.role == "ours" else "a peer"
    return [
        case_text(change.cell.case),
        change.cell.competitor,
        f"{change.cell.direction}, {change.cell.quantity}",
        number(change.before.median, 2),
        number(change.now.median, 2),
        f"{change.factor - 1:+.0%}",
        verdict,
    ]
