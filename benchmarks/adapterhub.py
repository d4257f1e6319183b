"""AdapterHub's ``adapters``, which needs an older ``transformers``, in a separate environment.

Its times are multiples of its own frozen model's, of the same shape and in the same environment. These ratios can be
compared with those of the suite ``models``; seconds cannot. The other environment runs ``python -m
benchmarks.adapterhub PLAN RESULTS``. Neither fastprefix nor its ``transformers`` are installed there, so this module
imports what needs them only in ``run``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .measure import ROOT, BenchmarkError, Role, Row, Work, find_version, measure
from .results import Record, describe_times
from .suite import add_common, build_model_work, positive, set_up

DESCRIPTION = "AdapterHub's prefix tuning on whole models, in a separate environment."
ENVIRONMENT = ROOT / ".venv-adapterhub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--rows", type=positive, default=2, help="in a batch (default: 2)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, metavar="DIR", help="created if it is missing")


def run(options: argparse.Namespace) -> int:
    """Measure in the other environment, print, write."""
    from . import models, whole_models

    device = set_up(options)
    N, P = whole_models.QUICK_PLACES[0] if options.quick else whole_models.PLACES[0]
    plan = {"device": str(device), "threads": options.threads, "rounds": 1 if options.quick else options.rounds, "P": P}
    plan["models"] = {
        name: {
            "configuration": models.configure(kind, size).to_dict(),
            "batch": models.draw_batch(kind, size, N, torch.device("cpu")),
        }
        for name, kind, size in whole_models.choose_shapes(options)
    }
    measured = run_worker(plan, options.environment)
    record = Record.start("adapterhub", device, options.quick)
    record.environment |= {"fastprefix": None, "peft": None} | measured["versions"]
    record.rows, record.faults = measured["rows"], measured["faults"]
    for name in plan["models"]:
        print(describe_times([row for row in record.rows if row["model"] == name]))
    return record.conclude(options.out)


def run_worker(plan: dict[str, Any], environment: Path) -> Any:
    """Have the interpreter of another environment carry out a plan, and return what it measured."""
    python = prepare_environment(environment)
    with tempfile.TemporaryDirectory() as folder:
        plan_path, results_path = Path(folder) / "plan.pt", Path(folder) / "results.json"
        torch.save(plan, plan_path)
        command = [str(python), "-m", "benchmarks.adapterhub", str(plan_path), str(results_path)]
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


# ---- in the other environment --------------------------------------------------------------------------------------


def freeze(model: Any, P: int) -> None:
    """Freeze the model. A gradient reaches the embeddings, and the head of a classifier is trained."""
    model.requires_grad_(False)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))


def tune_prefix(model: Any, P: int) -> None:
    """Add a free prefix to every layer."""
    import adapters

    adapters.init(model)
    model.add_adapter("tuned", config=adapters.PrefixTuningConfig(flat=True, prefix_length=P))
    model.train_adapter("tuned")


PEERS: dict[str, tuple[Role, Callable[[Any, int], None]]] = {
    "frozen floor": ("floor", freeze),
    "adapters prefix tuning": ("theirs", tune_prefix),
}


def build(model_type: str, **configuration: Any) -> Any:
    """Build a model with random weights."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **configuration)
    classifies = model_type == "bert"
    auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model: Any = auto.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    return model


def carry_out(plan_path: Path, results_path: Path) -> None:
    """Measure the models of a plan, and write rows, faults and versions."""
    plan = torch.load(plan_path)
    if plan["threads"] is not None:
        torch.set_num_threads(plan["threads"])
    device, rows, faults = torch.device(plan["device"]), list[Row](), list[Row]()
    for model_name, about in plan["models"].items():
        batch, works = {name: tensor.to(device) for name, tensor in about["batch"].items()}, dict[str, Work]()
        for name, (role, prepare) in PEERS.items():
            model = build(**about["configuration"])
            prepare(model, plan["P"])
            works[name] = build_model_work(role, model.to(device), batch)
        count, N = batch["input_ids"].shape
        case = {"model": model_name, "N": N, "P": plan["P"], "rows": count, "dtype": "float32"}
        measured = measure(case, works, device, partial(range, plan["rounds"] + 1))
        rows += measured[0]
        faults += measured[1]
    versions = {name: find_version(name) for name in ("adapters", "transformers", "torch")}
    results_path.write_text(json.dumps({"versions": versions, "rows": rows, "faults": faults}), encoding="utf-8")


if __name__ == "__main__":
    carry_out(Path(sys.argv[1]), Path(sys.argv[2]))
