"""Find what became slower: a new result against the committed one of the same suite and device.

Only ratios to the floor of the same run are compared, because a slow machine slows both down. A ratio has moved if its
range before, from p20 / (the floor's p80) to p80 / (the floor's p20), and its range now do not overlap, and the medians
differ by more than a tolerance. A figure without p20 and p80 has a range of one point.
"""

import argparse
from pathlib import Path

from . import results
from .measure import BenchmarkError, find_busyness
from .report import Table, load_frame, number
from .results import Record, case_of, describe_case, describe_fault

DESCRIPTION = "Compare a new result with the committed one of the same suite and device: the ratios that moved."
RATIOS = ["low", "x floor", "high"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new", type=Path, metavar="NEW.json", help="the file of a suite")
    parser.add_argument("--against", type=Path, default=results.FOLDER, metavar="DIR", help="folders of JSON files")
    parser.add_argument("--tolerance", type=float, default=0.05, help="default: 0.05")


def find_same_device(new: Record, folder: Path) -> Record:
    """Return the record of the same suite, device, instructions and threads."""
    names = ("device_name", "cpu_capability", "threads")
    wanted = {name: new.environment.get(name) for name in names}
    records = [record for of_device in results.read_devices(folder).values() for record in of_device.values()]
    found = [r for r in records if r.suite == new.suite and {name: r.environment.get(name) for name in names} == wanted]
    if len(found) != 1:
        raise BenchmarkError(f"{len(found)} results of {new.suite} to compare with on {wanted}; one is needed")
    return found[0]


def run(options: argparse.Namespace) -> int:
    """Print what moved. Return 1 if anything of this package became worse or failed."""
    new = results.read(options.new)
    old = find_same_device(new, options.against)
    about = [*case_of(new.rows[0]), "peer", "role", "direction", "quantity"]
    before, now = (load_frame(record).set_index(about)[RATIOS] for record in (old, new))
    both = now.join(before.add_suffix(" before"), how="inner").dropna().reset_index()
    both = both[(both.role != "floor") & both.quantity.isin(["seconds", "bytes"])]
    if both.empty:
        raise BenchmarkError(f"{options.new}: no case in common with the result of {old.environment['date']}")
    both["factor"] = both["x floor"] / both["x floor before"]
    apart = (both.high < both["low before"]) | (both["high before"] < both.low)
    moved = both[apart & ((both.factor - 1).abs() > options.tolerance)].sort_values("factor", ascending=False)
    print(f"{new.suite}: {len(both)} ratios against those of {old.environment['date']}; {len(moved)} moved")
    if busy := find_busyness(new.environment):
        print(f"{busy}: measure again before you believe this")
    rows, worse = [], False
    for change in moved.to_dict("records"):
        ours, factor = change["role"] == "ours", change["factor"]
        worse |= ours and factor > 1
        case = describe_case({name: change[name] for name in about[:-4]})
        verdict = ("regression" if factor > 1 else "better") if ours else "a peer"
        ratios = [number(change[name]) for name in ("x floor before", "x floor")]
        what = f"{change['direction']}, {change['quantity']}"
        rows.append([case, change["peer"], what, *ratios, f"{factor - 1:+.0%}", verdict])
    if rows:
        header = ("case", "peer", "measured", "x floor before", "now", "change", "verdict")
        print(f"\n{Table(header, rows).markdown()}")
    for fault in new.faults:
        print(describe_fault(fault))
    ours = {row["peer"] for row in old.rows if row["role"] == "ours"}
    return int(worse or any(fault["peer"] in ours for fault in new.faults))
