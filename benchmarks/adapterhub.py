"""AdapterHub's ``adapters``, which needs an older ``transformers``, in an environment of its own.

Its times are multiples of its own frozen model's, of the same shape and in the same environment: what its methods add
can be compared with what other methods add in ours (the suite ``models``), not its seconds with our seconds.
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

from . import environment, models, options, results, summaries
from .errors import BenchmarkError
from .report import write_json
from .results import Cell, Fault, Run
from .timing import Failure
from .whole_models import CLASSES, PREFIX, QUICK, SHAPES, TOKENS, Shape, batch_of, with_rows

NAME = "adapterhub"
DESCRIPTION = "AdapterHub's prefix and prompt tuning on whole models, in an environment of their own."
ENVIRONMENT = environment.ROOT / ".venv-adapterhub"
REQUIREMENTS = ("adapters==1.3.0", f"torch=={environment.version('torch')}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's options."""
    options.add_common(parser)
    options.add_threads(parser)
    parser.add_argument("--rounds", type=options.positive, default=3, help="default: 3")
    parser.add_argument("--rows", type=options.positive, default=2, help="in a batch (default: 2)")
    parser.add_argument(
        "--environment", type=Path, default=ENVIRONMENT, metavar="DIR", help="made and filled where it is missing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Have the other environment measure, print a line for each model, write."""
    device = options.device_for(arguments.device)
    N, P, shapes, rounds = TOKENS, PREFIX, SHAPES, arguments.rounds
    if arguments.quick:
        N, P, shapes, rounds = 16, 4, QUICK, 1
    described = [describe(shape, N) for shape in with_rows(shapes, arguments.rows)]
    plan = {"device": str(device), "threads": arguments.threads, "rounds": rounds, "P": P, "shapes": described}
    measured = carry_out(plan, ready(arguments.environment))
    facts = environment.describe(device) | {"fastprefix": None, "peft": None} | measured["versions"]
    cells = [Cell(**cell) for cell in measured["cells"]]
    faults = [Fault(f["case"], f["competitor"], Failure(**f["failure"])) for f in measured["faults"]]
    for shape in shapes:
        print(summaries.line([cell for cell in cells if cell.case["model"] == shape.name]), flush=True)
    return results.conclude(Run(NAME, facts, {}, cells, faults), arguments.out)


def describe(shape: Shape, N: int) -> dict[str, Any]:
    """A model and its batch as JSON, for a process without this package."""
    if shape.task == "causal_lm":
        configuration = models.decoder_config(shape.size, pad=0, end=1).to_dict()
    else:
        configuration = models.encoder_config(shape.size, pad=0).to_dict() | {"num_labels": CLASSES}
    batch = {name: tensor.tolist() for name, tensor in batch_of(shape, N, torch.device("cpu")).items()}
    return {"name": shape.name, "configuration": configuration, "batch": batch}


def carry_out(plan: dict[str, Any], python: Path) -> Any:
    """What the worker writes, run by another environment's interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        plan_path, results_path = Path(folder) / "plan.json", Path(folder) / "results.json"
        write_json(plan, plan_path)
        command = [str(python), "-m", "benchmarks.adapterhub_worker", str(plan_path), str(results_path)]
        if subprocess.run(command, cwd=environment.ROOT).returncode:
            raise BenchmarkError(f"--environment {python.parent.parent}: the measurement in it failed, see above")
        return json.loads(results_path.read_text(encoding="utf-8"))


def ready(folder: Path) -> Path:
    """The interpreter of an environment that has ``adapters``; it is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(REQUIREMENTS)} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import adapters"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python
