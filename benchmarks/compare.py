"""Find what became slower: a new result against the committed one of the same suite and device.

Only ratios to the floor of the same run are compared, because a slow machine slows both down. A ratio has moved if its
range before, from p20 / (the floor's p80) to p80 / (the floor's p20), and its range now do not overlap, and the medians
differ by more than a tolerance. A figure without p20 and p80 has a range of one point.
"""

import argparse
from pathlib import Path

import pandas as pd

from . import results
from .measure import BenchmarkError, find_busyness
from .report import Table, number
from .results import FIGURES, Record, describe_case, describe_fault

DESCRIPTION = "Compare a new result with the committed one of the same suite and device: the ratios that moved."
SAME_DEVICE = ("device_name", "cpu_capability", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("new", type=Path, metavar="NEW.json", help="the file of a suite")
    parser.add_argument("--against", type=Path, default=results.FOLDER, metavar="DIR", help="the results to compare with")
    parser.add_argument("--tolerance", type=float, default=0.05, help="default: 0.05")


def find_same_device(new: Record, folder: Path) -> Record:
    """Return the record of the same suite, device, instructions and threads."""
    wanted = {name: new.environment.get(name) for name in SAME_DEVICE}
    found = [
        record
        for records in results.read_devices(folder).values()
        for record in records.values()
        if record.suite == new.suite and {name: record.environment.get(name) for name in wanted} == wanted
    ]
    if len(found) != 1:
        raise BenchmarkError(f"{len(found)} results of {new.suite} to compare with on {wanted}; one is needed")
    return found[0]


def load_ranges(record: Record) -> pd.DataFrame:
    """Return the ratios of a record with their ranges, indexed by what was measured."""
    frame = pd.DataFrame(record.rows).reindex(columns=list(dict.fromkeys([*record.rows[0], *FIGURES])))
    frame = frame[frame.quantity.isin(["seconds", "bytes"])]
    frame = frame.assign(p20=frame.p20.fillna(frame.p50), p80=frame.p80.fillna(frame.p50))
    about = [name for name in frame if name not in FIGURES]
    place = [name for name in about if name not in ("peer", "role", "direction")]
    floors = frame[frame.role == "floor"].set_index([*place, "direction"])[["p20", "p50", "p80"]]
    # Where the floor trains nothing, training is compared with its forward pass.
    forward = floors.groupby(level=place).transform("first")
    pairs = frame[frame.role != "floor"].join(floors.add_prefix("floor_"), on=[*place, "direction"])
    pairs = pairs.join(forward.groupby(level=place).first().add_prefix("forward_"), on=place)
    for name in ("p20", "p50", "p80"):
        pairs[f"floor_{name}"] = pairs[f"floor_{name}"].fillna(pairs[f"forward_{name}"])
    pairs = pairs[pairs.floor_p50 > 0]
    ranges = {"low": pairs.p20 / pairs.floor_p80, "mid": pairs.p50 / pairs.floor_p50, "high": pairs.p80 / pairs.floor_p20}
    return pairs.assign(**ranges).set_index(about)[list(ranges)]


def run(options: argparse.Namespace) -> int:
    """Print what moved. Return 1 if anything of this package became worse or failed."""
    new = results.read(options.new)
    old = find_same_device(new, options.against)
    both = load_ranges(new).join(load_ranges(old), how="inner", rsuffix="_old").reset_index()
    if both.empty:
        raise BenchmarkError(f"{options.new}: no case in common with the result of {old.environment['date']}")
    both["factor"] = both.mid / both.mid_old
    apart = (both.high < both.low_old) | (both.high_old < both.low)
    moved = both[apart & ((both.factor - 1).abs() > options.tolerance)].sort_values("factor", ascending=False)
    print(f"{new.suite}: {len(both)} ratios against those of {old.environment['date']}; {len(moved)} moved")
    if busy := find_busyness(new.environment):
        print(f"{busy}: measure again before you believe this")
    rows, worse = [], False
    for change in moved.to_dict("records"):
        ours = change["role"] == "ours"
        worse |= ours and change["factor"] > 1
        verdict = ("regression" if change["factor"] > 1 else "better") if ours else "a peer"
        names = [name for name in both if name in new.rows[0] and name not in ("peer", "role", "direction", "quantity")]
        case = describe_case({name: change[name] for name in names})
        what = [change["peer"], f"{change['direction']}, {change['quantity']}"]
        rows.append([case, *what, number(change["mid_old"]), number(change["mid"]), f"{change['factor'] - 1:+.0%}", verdict])
    if rows:
        print("\n" + Table(("case", "peer", "measured", "x floor before", "now", "change", "verdict"), rows).markdown())
    for fault in new.faults:
        print(describe_fault(fault))
    ours = {row["peer"] for row in old.rows if row["role"] == "ours"}
    return int(worse or any(fault["peer"] in ours for fault in new.faults))
