"""Run adapters on models that DeepSpeed's ZeRO-3 has partitioned, whose parameters are empty between calls.

DeepSpeed gathers the parameters of a module for that module's own forward and backward. Nothing calls the forward of an
adapter, so its parameters are registered with the backbone, which uses them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether DeepSpeed has partitioned a parameter."""
    return hasattr(parameter, "ds_id")


def any_partitioned(module: nn.Module) -> bool:
    """Return whether DeepSpeed has partitioned parameters of a module."""
    return any(map(is_partitioned, module.parameters()))


def gather_with(module: nn.Module, method: nn.Module) -> None:
    """Have DeepSpeed gather an adapter with a module whose forward is running, now and in each forward and backward."""
    parameters: list[Any] = [parameter for parameter in method.parameters() if is_partitioned(parameter)]
    if not parameters:
        return
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)
    missing = [parameter for parameter in parameters if parameter.ds_status.name != "AVAILABLE"]
    if missing:
        missing[0].all_gather(param_list=missing)


def copy_whole(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return copies of partitioned parameters, in full on each rank."""
    import deepspeed

    given = list(parameters)
    with deepspeed.zero.GatheredParameters(given):
        return [parameter.detach().clone() for parameter in given]
