"""Run every cell of sharded models, and write the largest error of each to ``docs/devices.csv`` (tens of minutes).

``python -m tests.integrations.transformers.sharding.sharding_table`` exits with 1 if the results of a cell differ from
those of one process. Cells are in float64 and contain the largest relative error. Those of DeepSpeed, if it is
installed, are in float32 and contain the largest difference of a trained number.
"""

import argparse
import csv
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from .sharded_cells import METHODS
from .test_sharding import BOUND, launch

OUT = Path(__file__).parents[4] / "docs" / "devices.csv"
SCENARIOS = ["start", "cache", "merge", "switch", "compose"]
"""The scenarios of every model that is spread already when an adapter is attached."""
TABLE: dict[str, tuple[int, list[str]]] = {
    "ddp": (2, []),
    "tp": (2, [*SCENARIOS, "mixed_training", "checkpoint", "whole", "accelerate", "one_key_head"]),
    "fsdp2-attach-before": (2, ["compose_attached", "mixed"]),
    "fsdp2-attach-after": (2, [*SCENARIOS, "checkpoint", "mixed"]),
    "fsdp2-cpu-offload": (2, ["compose", "mixed"]),
    "fsdp2-loaded": (2, ["compose", "whole"]),
    "fsdp2-tp": (4, ["start", "merge", "switch", "compose", "mixed"]),
    "offload": (1, [*SCENARIOS, "checkpoint", "mixed_training"]),
}
"""The number of processes and the scenarios of each layout, beside all methods."""


def main() -> int:
    """Run all layouts, each in separate processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    options = parser.parse_args()
    rows, wrong = [], 0
    for layout, (processes, scenarios) in TABLE.items():
        cells = [*METHODS, *scenarios]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.json"
            launch("sharded_cells", processes, str(file), *[f"{layout}:{cell}" for cell in cells])
            results = json.loads(file.read_text())
        for cell in cells:
            error = results.get(f"{layout}:{cell}", "did not run")
            good = isinstance(error, float) and error < BOUND
            wrong += not good
            rows.append((layout, processes, cell, f"{error:.1e}" if isinstance(error, float) else "failed"))
            print(*rows[-1], "" if good else f"\n{error}", flush=True)
    if importlib.util.find_spec("deepspeed") is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.json"
            launch("deepspeed_training", 2, str(file))
            results = json.loads(file.read_text())
        rows += [("zero", 2, case, f"{e['saved']:.1e}") for case, e in results.items() if isinstance(e, dict)]
    with options.out.open("w", newline="") as file_:
        csv.writer(file_, lineterminator="\n").writerows([("layout", "processes", "cell", "largest error"), *rows])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
