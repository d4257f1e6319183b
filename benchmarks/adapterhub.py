"""AdapterHub's ``adapters``, which needs an older ``transformers``, in a separate environment.

Its times are multiples of its own frozen model's, of the same shape and in the same environment. These ratios can be
compared with those of the suite ``models``; seconds cannot.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

from . import models
from .measure import ROOT, BenchmarkError, find_version
from .options import add_common, positive, set_up
from .results import Record, describe_times
from .whole_models import CLASSES, PREFIX, TOKENS, ModelShape, choose_shapes, draw_batch

DESCRIPTION = "AdapterHub's prefix tuning on whole models, in a separate environment."
ENVIRONMENT = ROOT / ".venv-adapterhub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--rows", type=positive, default=2, help="in a batch (default: 2)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, metavar="DIR", help="created if it is missing")


def run(options: argparse.Namespace) -> int:
    """Measure in the other environment, print, write."""
    device, shapes = set_up(options), choose_shapes(options)
    N, P, rounds = (16, 4, 1) if options.quick else (TOKENS, PREFIX, options.rounds)
    plan = {"device": str(device), "threads": options.threads, "rounds": rounds, "P": P}
    measured = run_worker(plan | {"shapes": [describe_model(shape, N) for shape in shapes]}, options.environment)
    record = Record.start("adapterhub", device, options.quick)
    record.environment |= {"fastprefix": None, "peft": None} | measured["versions"]
    record.rows, record.faults = measured["rows"], measured["faults"]
    for shape in shapes:
        print(describe_times([row for row in record.rows if row["model"] == shape.name]), flush=True)
    return record.conclude(options.out)


def describe_model(shape: ModelShape, N: int) -> dict[str, Any]:
    """Describe a model and its batch for a process without this package."""
    configuration = models.configure(shape.kind, shape.size, classes=CLASSES).to_dict()
    batch = {name: tensor.tolist() for name, tensor in draw_batch(shape, N, torch.device("cpu")).items()}
    return {"name": shape.name, "configuration": configuration, "batch": batch}


def run_worker(plan: dict[str, Any], environment: Path) -> Any:
    """Have the interpreter of another environment carry out a plan, and return what it measured."""
    python = prepare_environment(environment)
    with tempfile.TemporaryDirectory() as folder:
        plan_path, results_path = Path(folder) / "plan.json", Path(folder) / "results.json"
        plan_path.write_text(json.dumps(plan), encoding="utf-8")
        command = [str(python), "-m", "benchmarks.adapterhub_worker", str(plan_path), str(results_path)]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise BenchmarkError(f"--environment {environment}: the measurement failed, see above")
        return json.loads(results_path.read_text(encoding="utf-8"))


def prepare_environment(folder: Path) -> Path:
    """Return the interpreter of an environment with ``adapters``. The environment is created if it is missing."""
    python = folder / "bin" / "python"
    requirements = ("adapters==1.3.0", f"torch=={find_version('torch')}")
    if not python.exists():
        print(f"installing {', '.join(requirements)} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import adapters"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python
