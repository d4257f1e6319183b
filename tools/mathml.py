"""Convert formulas of the documentation to MathML during the build, so that pages load no scripts or fonts."""

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **kwargs: Any) -> str:
    """Convert a ``math`` block of Markdown to MathML. The signature is that of ``pymdownx.superfences`` formatters."""
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'
