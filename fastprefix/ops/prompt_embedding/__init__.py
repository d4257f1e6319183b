"""The fused prompt embedding of PT, DePT and ADePT. ``api`` says what it means, ``reference`` shows the formula."""

from .api import prompt_embedding

__all__ = ["prompt_embedding"]
