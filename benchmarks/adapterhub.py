"""AdapterHub's ``adapters``, which needs an older ``transformers`` and so an environment without fastprefix.

Its times are multiples of its own frozen model's, of the same shape and in the same environment. These ratios can be
compared with those of the suite ``models``; seconds cannot.
"""

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch

from . import models
from .measure import BenchmarkError, find_version
from .results import Record
from .suite import Problem, add_common, build_model_work, positive, run_suite, set_up

DESCRIPTION = "AdapterHub's prefix tuning on whole models; run it in an environment with `adapters`."


def freeze(model: Any) -> Any:
    """Freeze the model. A gradient reaches the embeddings, and the head of a classifier is trained."""
    model.requires_grad_(False)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    return model


def tune_prefix(model: Any, P: int) -> Any:
    """Add a free prefix to every layer."""
    import adapters

    adapters.init(model)
    model.add_adapter("tuned", config=adapters.PrefixTuningConfig(flat=True, prefix_length=P))
    model.train_adapter("tuned")
    return model.to(model.device)


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Build the floor and the tuned model at the first pair of lengths of each shape."""
    for case, _, base, batch in models.list_published(options, device, places=1):
        tuned = tune_prefix(copy.deepcopy(base), case["P"])
        yield (
            case,
            {
                "frozen floor": build_model_work("floor", freeze(base), batch),
                "adapters prefix tuning": build_model_work("theirs", tuned, batch),
            },
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=3)
    parser.add_argument("--rows", type=positive, default=2, help="in a batch (default: 2)")


def run(options: argparse.Namespace) -> int:
    if find_version("adapters") is None:
        raise BenchmarkError("the package `adapters` is not installed; benchmarks/README.md says how to install it")
    device = set_up(options)
    record = Record.start("adapterhub", device, options.quick)
    record.environment["adapters"] = find_version("adapters")
    return run_suite(record, list_problems(options, device), options, device)
