"""The operations in plain PyTorch, for any floating-point dtype. Every backend is tested against them."""

from .ops.prefix_attention.reference import prefix_attention
from .ops.prompt_embedding.reference import prompt_embedding

__all__ = ["prefix_attention", "prompt_embedding"]
