"""The methods on ``transformers`` models: attach, detach, save, load, merge."""

from .attachment import attach, detach, disable_adapter, set_adapter
from .composition import compose, swap_prefix
from .initial import PrefixState
from .merging import export_cache, merge
from .parameters import ParameterCount, count_parameters, parameter_groups
from .publishing import push_to_hub
from .reference_model import ReferenceModel
from .saving import load_adapter, read_prefix, save_adapter

__all__ = [
    "ParameterCount",
    "PrefixState",
    "ReferenceModel",
    "attach",
    "compose",
    "count_parameters",
    "detach",
    "disable_adapter",
    "export_cache",
    "load_adapter",
    "merge",
    "parameter_groups",
    "push_to_hub",
    "read_prefix",
    "save_adapter",
    "set_adapter",
    "swap_prefix",
]
