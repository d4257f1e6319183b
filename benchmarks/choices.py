"""Write the table of calls for which ``backend=None`` chooses the composed backend.

    python -m benchmarks choices gpu.json

The input is a result of ``python -m benchmarks gpu``. Each measured size becomes a row of
``composed_backend/choices.json``. The row contains the fastest plan of each pass, and whether it is faster than the
Triton backend for inference and for training.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastprefix.ops.prefix_attention.composed_backend import plans
from fastprefix.ops.targets import name_architecture

from . import results
from .measure import BenchmarkError, Row
from .results import Record, write_text

KINDS = {"none": "plain", "row": "plain", "query": "own prefix", "segments": "segments"}
"""The kind of a call in ``choices.json``, by the benchmark's ``gate``."""
COMPOSED = "composed, "
TRITON = "fused"

Seconds = dict[str, dict[str, float]]  # the passes of each peer
Key = tuple[str, bool, int, int, int]  # kind, is_causal, D, P, N


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, metavar="GPU.json", help="a result of `python -m benchmarks gpu`")
    parser.add_argument("--margin", type=float, default=0.0, help="the share of the time that composition must save")
    parser.add_argument("--out", type=Path, default=plans.CHOICES, help="default: the table of the package")


def collect_times(record: Record) -> dict[Key, list[Seconds]]:
    """Return the seconds of the Triton backend and of every plan, for each key and each of its measured calls."""
    cases: dict[str, Seconds] = defaultdict(lambda: defaultdict(dict))
    keys: dict[str, Key] = {}
    for row in record.rows:
        if row["quantity"] != "seconds" or row.get("gate") not in KINDS or row["N"] == 1:
            continue
        if row["peer"] != TRITON and not row["peer"].startswith(COMPOSED):
            continue
        case = json.dumps(results.case_of(row), sort_keys=True)
        keys[case] = (KINDS[row["gate"]], row["causal"], row["D"], row["P"], row["N"])
        cases[case][row["peer"].removeprefix(COMPOSED)][row["direction"]] = row["p50"]
    collected: dict[Key, list[Seconds]] = defaultdict(list)
    for case, peers in cases.items():
        complete = {name: of for name, of in peers.items() if {"forward", "forward+backward"} <= of.keys()}
        if TRITON in complete and len(complete) > 1:
            collected[keys[case]].append({name: split_passes(of) for name, of in complete.items()})
    return collected


def split_passes(of: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of the forward and the backward pass. The backward pass is the difference of two times."""
    return {"forward": of["forward"], "backward": max(of["forward+backward"] - of["forward"], 1e-9)}


def choose(key: Key, calls: list[Seconds], device: str, margin: float = 0.0) -> Row | None:
    """Return the row of a key in the table, or None if no plan was measured in all of its calls.

    The fastest plan is the one with the lowest geometric mean over the calls. Composition is chosen only if it takes
    less than ``1 - margin`` of the Triton backend's time in every call.
    """
    names = set.intersection(*(set(call) for call in calls)) - {TRITON}
    if not names:
        return None
    kind, is_causal, D, P, N = key

    def find_fastest(direction: str) -> str:
        return min(sorted(names), key=lambda name: sum(math.log(call[name][direction]) for call in calls))

    forward, backward = find_fastest("forward"), find_fastest("backward")
    share = 1 - margin
    inference = all(call[forward]["forward"] < share * call[TRITON]["forward"] for call in calls)
    training = all(
        call[forward]["forward"] + call[backward]["backward"] < share * sum(call[TRITON].values()) for call in calls
    )
    about = {"architecture": device, "kind": kind, "is_causal": is_causal, "D": D, "P": P, "N": N}
    return about | {"forward": forward, "backward": backward, "inference": inference, "training": training}


def build_table(record: Record, margin: float = 0.0) -> list[Row]:
    """Return the rows of the table for the device of a run. ``margin`` is that of ``choose``."""
    capability = record.settings.get("capability")
    if capability is None:
        raise BenchmarkError("the results do not contain the compute capability of the device")
    device = name_architecture(tuple(capability))
    rows = (choose(key, calls, device, margin) for key, calls in sorted(collect_times(record).items()))
    return [row for row in rows if row is not None]


def merge_tables(old: Iterable[Mapping[str, Any]], new: list[Row]) -> list[Row]:
    """Return a table in which the new rows replace all old rows of the same architectures."""
    measured = {row["architecture"] for row in new}
    return [*(dict(row) for row in old if row["architecture"] not in measured), *new]


def run(options: argparse.Namespace) -> int:
    """Write the table, and print for how many of its calls the composed backend is chosen."""
    new = build_table(results.read(options.results), options.margin)
    if not new:
        raise BenchmarkError(f"{options.results}: no call was measured both on the Triton backend and with a plan")
    old = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    rows = merge_tables(old, new)
    plans.parse_choices(rows)
    write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", options.out)
    counts = ", ".join(f"{sum(row[name] for row in new)} for {name}" for name in ("inference", "training"))
    print(f"the composed backend is chosen for {counts} of {len(new)} measured calls. The table is in {options.out}")
    return 0
