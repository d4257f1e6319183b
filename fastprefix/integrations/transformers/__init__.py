"""The methods on ``transformers`` models: attach, detach, save, load, merge."""

from .attachment import attach, detach, disable_adapter, set_adapter
from .composition import compose, swap_prefix
from .initial import PrefixState
from .merging import export_cache, merge
from .parameters import ParameterCount, count_parameters, parameter_groups
from .saving import load_adapter, read_prefix, save_adapter
from .serving import AdapterStore, ResidentAdapters

__all__ = [
    "AdapterStore",
    "ParameterCount",
    "PrefixState",
    "ResidentAdapters",
    "attach",
    "compose",
    "count_parameters",
    "detach",
    "disable_adapter",
    "export_cache",
    "load_adapter",
    "merge",
    "parameter_groups",
    "read_prefix",
    "save_adapter",
    "set_adapter",
    "swap_prefix",
]
