"""Time AdapterHub's methods in their own environment: ``python -m benchmarks.adapterhub_worker PLAN RESULTS``.

Neither fastprefix nor its transformers are installed there, so nothing that needs them is imported.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers

from .measure import Role, Row
from .steps import ModelWork, measure_models


def freeze(model: Any, P: int) -> None:
    """Freeze the model. A gradient reaches the embeddings, and the head of a classifier is trained."""
    model.requires_grad_(False)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))


def tune_prefix(model: Any, P: int) -> None:
    """Add a free prefix to every layer."""
    adapters.init(model)
    model.add_adapter("tuned", config=adapters.PrefixTuningConfig(flat=True, prefix_length=P))
    model.train_adapter("tuned")


PEERS: dict[str, tuple[Role, Callable[[Any, int], None]]] = {
    "frozen floor": ("floor", freeze),
    "adapters prefix tuning": ("theirs", tune_prefix),
}


def build(configuration: dict[str, Any]) -> Any:
    kind = configuration.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **configuration)
    auto = transformers.AutoModelForSequenceClassification if kind == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model: Any = auto.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    return model


def main(plan_path: Path, results_path: Path) -> None:
    plan = json.loads(plan_path.read_text(encoding="utf-8"))
    if plan["threads"] is not None:
        torch.set_num_threads(plan["threads"])
    device, rows, faults = torch.device(plan["device"]), list[Row](), list[Row]()
    for shape in plan["shapes"]:
        batch, works = {name: torch.tensor(of, device=device) for name, of in shape["batch"].items()}, {}
        for name, (role, prepare) in PEERS.items():
            model = build(dict(shape["configuration"]))
            prepare(model, plan["P"])
            works[name] = ModelWork(model.to(device), batch, role)
        count, N = batch["input_ids"].shape
        case = {"model": shape["name"], "N": N, "P": plan["P"], "rows": count, "dtype": "float32"}
        measured = measure_models(works, case, plan["rounds"], device)
        rows += measured[0]
        faults += measured[1]
    versions = {module.__name__: module.__version__ for module in (adapters, transformers, torch)}
    results_path.write_text(json.dumps({"versions": versions, "rows": rows, "faults": faults}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
