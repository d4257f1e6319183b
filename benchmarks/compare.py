"""Compare a new result with the committed result of the same suite and device, and report what became slower.

Only ratios to the floor of the same run are compared, because a slow machine slows both down. A ratio has moved if its
old and new ranges do not overlap and the medians differ by more than a tolerance. A range is from
p20 / (the floor's p80) to p80 / (the floor's p20).
"""

import argparse
from pathlib import Path

from . import results
from .measure import BenchmarkError, find_busyness
from .report import load_frame
from .results import FIGURES, Record, describe_fault

SAME = ("device_name", "cpu_capability", "threads", "adapters")
SINCE = ("kernels", "lowered")
"""Facts about the environment that older results lack."""
SIZES = ("length", "rows", "tokens", "data", "dataset", "model")
"""The settings of the main job that its cases do not name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new", type=Path, metavar="NEW.json", help="the result of a suite")
    parser.add_argument("--against", type=Path, default=results.FOLDER, metavar="DIR", help="committed results")
    parser.add_argument("--tolerance", type=float, default=0.05, help="relative change to ignore (default: 0.05)")


def find_same_device(new: Record, folder: Path) -> Record:
    """Return the record with the same suite, device, instruction set, number of threads and sizes."""
    if new.settings.get("quick"):
        raise BenchmarkError("a quick run measures tiny models, which no result can be compared with")

    def agrees(old: Record) -> bool:
        same = all(new.environment.get(name) == old.environment.get(name) for name in SAME)
        pairs = [(new.environment.get(name), old.environment.get(name)) for name in SINCE]
        pairs += [(new.settings.get(name), old.settings.get(name)) for name in SIZES]
        return old.suite == new.suite and same and all(None in pair or pair[0] == pair[1] for pair in pairs)

    found = [record for _, record in results.read_all(folder) if agrees(record)]
    if len(found) != 1:
        wanted = [new.suite, *(new.environment.get(name) for name in (*SAME, *SINCE))]
        wanted += [new.settings[name] for name in SIZES if name in new.settings]
        raise BenchmarkError(f"there must be one result of {wanted} to compare with, got {len(found)}")
    return found[0]


def run(options: argparse.Namespace) -> int:
    """Print the ratios that moved. Return 1 if anything of this package became worse or failed."""
    new = results.read(options.new)
    old = find_same_device(new, options.against)
    before, now = (load_frame(r, "role != 'floor' and quantity in ['seconds', 'bytes']") for r in (old, new))
    ratios = ["low", "x floor", "high"]
    about = [name for name in now if name in before and name not in (*FIGURES, *ratios)]
    both = before[[*about, *ratios]].merge(now[[*about, *ratios]], on=about, suffixes=(" before", "")).dropna()
    lost = before[before.role == "ours"].merge(now[about], on=about, how="left", indicator=True)
    lost = lost[lost._merge == "left_only"]
    if both.empty:
        raise BenchmarkError(f"{options.new}: no case in common with the result of {old.environment['date']}")
    both["factor"] = both["x floor"] / both["x floor before"]
    apart = (both.high < both["low before"]) | (both["high before"] < both.low)
    moved = both[apart & ((both.factor - 1).abs() > options.tolerance)].sort_values("factor", ascending=False)
    print(f"{new.suite}: {len(both)} ratios against those of {old.environment['date']}; {len(moved)} moved")
    if busy := find_busyness(new.environment):
        print(f"{busy}. Measure again before you rely on this")
    print(moved[[*about, "x floor before", "x floor", "factor"]].to_string(index=False, float_format="%.2f"))
    if len(lost):
        print(f"not measured now: {len(lost)} ratios of {', '.join(sorted(set(lost.peer)))}")
    print("\n".join(map(describe_fault, new.faults)))
    failed = before[before.role == "ours"].peer.isin([fault["peer"] for fault in new.faults]).any()
    return int(failed or ((moved.role == "ours") & (moved.factor > 1)).any())
