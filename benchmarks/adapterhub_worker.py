"""AdapterHub's methods timed in an environment of their own: ``python -m benchmarks.adapterhub_worker PLAN RESULTS``.

Neither fastprefix nor its transformers are there, so nothing that needs them is imported.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers

from .report import write_json
from .results import Cell, Fault, Role
from .steps import Work, side_by_side

Prepare = Callable[[Any, int], object]
NAME = "tuned"


def freeze(model: Any, P: int) -> None:
    """The frozen model: a gradient goes down to the embeddings, and a classifier's head is trained."""
    model.requires_grad_(False)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))


def tune_prefix(model: Any, P: int) -> None:
    """A free prefix in every layer."""
    adapters.init(model)
    model.add_adapter(NAME, config=adapters.PrefixTuningConfig(flat=True, prefix_length=P))
    model.train_adapter(NAME)


RIVALS: dict[str, tuple[Role, Prepare]] = {
    "frozen floor": ("floor", freeze),
    "adapters prefix tuning": ("peer", tune_prefix),
}


def build(configuration: dict[str, Any]) -> Any:
    """A model with random weights."""
    kind = configuration.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **configuration)
    auto = transformers.AutoModelForSequenceClassification if kind == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model: Any = auto.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    return model


def measure(shape: dict[str, Any], plan: dict[str, Any]) -> tuple[list[Cell], list[Fault]]:
    """All rivals on one model."""
    device, P = torch.device(plan["device"]), plan["P"]
    batch = {name: torch.tensor(rows, device=device) for name, rows in shape["batch"].items()}
    works = {}
    for name, (role, prepare) in RIVALS.items():
        model = build(dict(shape["configuration"]))
        prepare(model, P)
        works[name] = Work(model.to(device), batch, role)
    rows, N = batch["input_ids"].shape
    case = {"model": shape["name"], "N": N, "P": P, "rows": rows, "dtype": "float32"}
    return side_by_side(works, case, plan["rounds"], device)


def main(plan_path: Path, results_path: Path) -> None:
    """Carry out a plan."""
    plan = json.loads(plan_path.read_text(encoding="utf-8"))
    if plan["threads"] is not None:
        torch.set_num_threads(plan["threads"])
    cells: list[Cell] = []
    faults: list[Fault] = []
    for shape in plan["shapes"]:
        of_shape = measure(shape, plan)
        cells += of_shape[0]
        faults += of_shape[1]
    versions = {module.__name__: module.__version__ for module in (adapters, transformers, torch)}
    records = {"cells": [cell.record() for cell in cells], "faults": [asdict(fault) for fault in faults]}
    write_json({"versions": versions, **records}, results_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
