"""Formulas of the documentation, as MathML made while it is built: a page asks no server for a script or a font."""

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **kwargs: Any) -> str:
    """Return a ``math`` block of Markdown as MathML. The arguments are those of ``pymdownx.superfences``."""
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'
