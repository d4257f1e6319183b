"""The methods on ``transformers`` models: attach, detach, save, load, merge."""

from .attachment import attach, detach, disable_adapter, set_adapter
from .merging import export_cache, merge
from .parameters import ParameterCount, count_parameters, parameter_groups
from .saving import load_adapter, save_adapter

__all__ = [
    "ParameterCount",
    "attach",
    "count_parameters",
    "detach",
    "disable_adapter",
    "export_cache",
    "load_adapter",
    "merge",
    "parameter_groups",
    "save_adapter",
    "set_adapter",
]
