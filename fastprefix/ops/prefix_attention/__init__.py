"""Gated prefix attention. ``api`` says what it means, ``reference`` how it is computed on paper."""

from .api import prefix_attention

__all__ = ["prefix_attention"]
