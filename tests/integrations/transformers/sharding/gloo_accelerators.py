"""Make accelerate treat CPU processes with gloo as accelerators, because it supports FSDP and DeepSpeed only on those.

``test_launching`` runs ``python -m tests.integrations.transformers.sharding.gloo_accelerators SCRIPT OPTIONS`` in each
process.
"""

import runpy
import sys
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState

_prepare_backend = PartialState._prepare_backend


def prepare_backend(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> tuple[str | None, DistributedType]:
    """Return gloo, and a kind of accelerator that has FSDP."""
    if cpu:
        found: tuple[str | None, DistributedType] = _prepare_backend(self, cpu, *args, **kwargs)
        return found
    return "gloo", DistributedType.MULTI_GPU


def set_device(self: Any) -> None:
    """Stay on the CPU."""
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
