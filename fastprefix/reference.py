"""The formulas in plain PyTorch, any floating dtype: the specification that every backend is tested against."""

from .ops.prefix_attention.reference import prefix_attention
from .ops.prompt_embedding.reference import prompt_embedding

__all__ = ["prefix_attention", "prompt_embedding"]
