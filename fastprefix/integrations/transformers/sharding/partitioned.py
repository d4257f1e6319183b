"""Run adapters on models that DeepSpeed's ZeRO-3 has partitioned, whose parameters are empty between calls.

DeepSpeed gathers the parameters of a module for that module's own forward and backward pass. Nothing calls the forward
of an adapter, so its parameters are registered with the backbone, which uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations import deepspeed as integration


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether DeepSpeed has partitioned a parameter."""
    return hasattr(parameter, "ds_id")


def any_partitioned(module: nn.Module) -> bool:
    """Return whether DeepSpeed has partitioned parameters of a module."""
    return any(map(is_partitioned, module.parameters()))


def runs_in_engine(model: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 engine already wraps a model, and gathers the parameters it contained then."""
    return any_partitioned(model) and hasattr(model, "ds_id")


def find_whole_shape(parameter: Any) -> tuple[int, ...]:
    """Return the full shape of a parameter, which DeepSpeed may have partitioned."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


@contextmanager
def gathering_modules(model: nn.Module) -> Iterator[None]:
    """Gather each module of a partitioned model for its forward in this context, as the engine does later.

    Models that are created in this context are not partitioned.
    """
    if not any_partitioned(model) or runs_in_engine(model):
        yield
        return
    former = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    handles = []
    for module in model.modules():
        if any(map(is_partitioned, module.parameters(recurse=False))):
            handles.append(module.register_forward_pre_hook(_gather))
            handles.append(module.register_forward_hook(_partition, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        integration._hf_deepspeed_config_weak_ref = former


def _gather(module: nn.Module, args: Any) -> None:
    """Gather the parameters of a module (a forward pre-hook)."""
    _gather_missing(filter(is_partitioned, module.parameters(recurse=False)))


def _gather_missing(parameters: Iterable[Any]) -> None:
    """Gather the partitioned parameters that are not gathered yet."""
    missing = [parameter for parameter in parameters if parameter.ds_status.name != "AVAILABLE"]
    if missing:
        missing[0].all_gather(param_list=missing)


def _partition(module: nn.Module, args: Any, output: Any) -> None:
    """Partition the parameters of a module again (a forward hook)."""
    parameters: list[Any] = [each for each in module.parameters(recurse=False) if is_partitioned(each)]
    parameters[0].partition(param_list=parameters)


def gather_with(module: nn.Module, method: nn.Module) -> None:
    """Have DeepSpeed gather an adapter with a running module, now and in each forward and backward pass."""
    parameters: list[Any] = [parameter for parameter in method.parameters() if is_partitioned(parameter)]
    if not parameters:
        return
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)
    _gather_missing(parameters)


def copy_whole(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return full copies of partitioned parameters on each rank."""
    import deepspeed

    given = list(parameters)
    with deepspeed.zero.GatheredParameters(given):
        return [parameter.detach().clone() for parameter in given]
