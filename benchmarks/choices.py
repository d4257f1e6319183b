"""Write the table of calls for which ``backend=None`` chooses the composed backend, from results on a GPU.

    python -m benchmarks choices gpu.json

The input is a result of ``python -m benchmarks gpu``. Each measured size becomes a row of
``composed_backend/choices.json``. The row contains the fastest plan of each pass, and whether it is faster than the
Triton backend for inference and for training.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from fastprefix.ops.prefix_attention.composed_backend import plans
from fastprefix.ops.targets import architecture

from . import results
from .measure import BenchmarkError, Row
from .results import Record, write_text

KINDS = {"none": "plain", "row": "plain", "query": "own prefix", "segments": "segments"}
"""The kind of a call in ``choices.json``, by the benchmark's ``gate``."""
KEY = ["kind", "is_causal", "D", "P", "N"]
COMPOSED, TRITON = "composed, ", "fused"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, metavar="GPU.json", help="a result of `python -m benchmarks gpu`")
    parser.add_argument("--margin", type=float, default=0.0, help="the share of the time that composition must save")
    parser.add_argument("--out", type=Path, default=plans.CHOICES, help="default: the table of the package")


def build_table(record: Record, margin: float = 0.0) -> list[Row]:
    """Return the rows of the table for the device of a run.

    The fastest plan of a pass has the lowest geometric mean over the calls of a key, and was measured in all of them.
    Composition is chosen only if it takes less than ``1 - margin`` of the Triton backend's time in every call.
    """
    if "capability" not in record.settings:
        raise BenchmarkError("the results do not contain the compute capability of the device")
    rows = [row for row in record.rows if row["quantity"] == "seconds" and row.get("gate") in KINDS and row["N"] > 1]
    rows = [row for row in rows if row["peer"].startswith((COMPOSED, TRITON))]
    if not any(row["peer"] == TRITON for row in rows):
        return []
    frame = pd.DataFrame(rows)
    frame = frame.assign(kind=frame.gate.map(KINDS), is_causal=frame.causal, peer=frame.peer.str.removeprefix(COMPOSED))
    times = frame.pivot_table("p50", [*KEY, "B", "Hq", "Hkv", "M", "gate"], ["direction", "peer"], "last")
    table = []
    for key, of_key in times.groupby(KEY):
        both = of_key["forward+backward"].dropna(subset=TRITON).dropna(axis="columns")
        forward = of_key["forward"].loc[both.index].dropna(axis="columns")
        names = both.columns.intersection(forward.columns).drop(TRITON)
        if names.empty:
            continue
        backward = (both - forward).clip(lower=1e-9)
        first, second = (np.log(passes[names]).mean().idxmin() for passes in (forward, backward))
        share, triton = 1 - margin, forward[TRITON] + backward[TRITON]
        inference = (forward[first] < share * forward[TRITON]).all()
        training = (forward[first] + backward[second] < share * triton).all()
        about = {"architecture": architecture(tuple(record.settings["capability"])), **dict(zip(KEY, key, strict=True))}
        table.append(about | {"forward": first, "backward": second, "inference": inference, "training": training})
    return list(pd.DataFrame(table).to_dict("records"))


def run(options: argparse.Namespace) -> int:
    """Write the table, and print for how many of its calls the composed backend is chosen."""
    new = build_table(results.read(options.results), options.margin)
    if not new:
        raise BenchmarkError(f"{options.results}: no call was measured both on the Triton backend and with a plan")
    old = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    measured = {row["architecture"] for row in new}
    rows = [row for row in old if row["architecture"] not in measured] + new
    plans.parse_choices(rows)
    write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", options.out)
    counts = ", ".join(f"{sum(row[name] for row in new)} for {name}" for name in ("inference", "training"))
    print(f"the composed backend is chosen for {counts} of {len(new)} measured calls. The table is in {options.out}")
    return 0
