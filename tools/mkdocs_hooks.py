"""Add the committed figures of the benchmarks to the documentation site, and hide tables of contents without entries.

The site otherwise contains only docs/. Pages link to the figures by a path outside of docs/, which GitHub requires.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures at their paths in the repository."""
    for figure in sorted((ROOT / "benchmarks" / "results").rglob("*.png")):
        files.append(File.generated(config, figure.relative_to(ROOT).as_posix(), abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Change links to figures so that they stay inside the site."""
    return markdown.replace("](../benchmarks/results/", "](benchmarks/results/")


def on_page_context(context: Any, *, page: Any, **kwargs: Any) -> Any:
    """Give a page without sections the space of its table of contents."""
    if not any(heading.children for heading in page.toc):
        page.meta["hide"] = ["toc"]
    return context
