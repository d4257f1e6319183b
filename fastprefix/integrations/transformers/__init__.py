"""The methods on ``transformers`` models: attach, detach, save, load, merge."""

from .attachment import attach, detach
from .checkpoint import load_adapter, save_adapter
from .merging import export_cache, merge
from .parameters import parameter_groups

__all__ = ["attach", "detach", "export_cache", "load_adapter", "merge", "parameter_groups", "save_adapter"]
