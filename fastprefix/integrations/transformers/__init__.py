"""The methods on ``transformers`` models: attach, detach, save, load."""

from .attachment import attach, detach
from .checkpoint import load_adapter, save_adapter
from .parameters import parameter_groups

__all__ = ["attach", "detach", "load_adapter", "parameter_groups", "save_adapter"]
