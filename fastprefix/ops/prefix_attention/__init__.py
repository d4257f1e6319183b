"""Gated prefix attention. ``api`` documents it, and ``reference`` has the formula."""

from .api import prefix_attention

__all__ = ["prefix_attention"]
