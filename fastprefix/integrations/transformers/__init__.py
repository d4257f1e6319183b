"""The methods on ``transformers`` models: attach, detach, save, load, merge."""

from .attachment import attach, detach, disable_adapter, set_adapter
from .exporting import encode_prompt_embeds, export_merged_base, export_prompt_embeds
from .files.publishing import push_to_hub
from .files.saving import load_adapter, read_prefix, save_adapter
from .merging import export_cache, merge
from .mixed_batches.serving import AdapterStore, ResidentAdapters
from .parameters import ParameterCount, count_parameters, parameter_groups
from .prefixes.composition import compose, swap_prefix
from .prefixes.initial import PrefixState
from .reference_model import ReferenceModel
from .vision.features import compute_bank, find_entered_layers

__all__ = [
    "AdapterStore",
    "ParameterCount",
    "PrefixState",
    "ReferenceModel",
    "ResidentAdapters",
    "attach",
    "compose",
    "compute_bank",
    "count_parameters",
    "detach",
    "disable_adapter",
    "encode_prompt_embeds",
    "export_cache",
    "export_merged_base",
    "export_prompt_embeds",
    "find_entered_layers",
    "load_adapter",
    "merge",
    "parameter_groups",
    "push_to_hub",
    "read_prefix",
    "save_adapter",
    "set_adapter",
    "swap_prefix",
]
