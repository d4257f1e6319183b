"""Fused kernels for prefix tuning and prompt tuning."""

from . import reference
from ._version import __version__
from .ops.prefix_attention import prefix_attention
from .ops.prompt_embedding import prompt_embedding

__all__ = ["__version__", "prefix_attention", "prompt_embedding", "reference"]
