"""The fused prompt embedding of PT, DePT and ADePT. ``api`` documents it, and ``reference`` has the formula."""

from .api import prompt_embedding

__all__ = ["prompt_embedding"]
