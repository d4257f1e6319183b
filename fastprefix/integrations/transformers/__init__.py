"""The methods on ``transformers`` models: attach, detach, save, load, merge."""

from .attachment import attach, detach, disable_adapter, set_adapter
from .composition import compose, swap_prefix
from .initial import PrefixState
from .merging import export_cache, merge
from .parameters import ParameterCount, count_parameters, parameter_groups
from .saving import load_adapter, read_prefix, save_adapter
from .vision_features import compute_bank, find_entered_layers

__all__ = [
    "ParameterCount",
    "PrefixState",
    "attach",
    "compose",
    "compute_bank",
    "count_parameters",
    "detach",
    "disable_adapter",
    "export_cache",
    "find_entered_layers",
    "load_adapter",
    "merge",
    "parameter_groups",
    "read_prefix",
    "save_adapter",
    "set_adapter",
    "swap_prefix",
]
