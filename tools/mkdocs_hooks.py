"""Add the committed figures of the benchmarks to the documentation's site, which otherwise holds docs/ alone.

Pages link to them as GitHub needs it, by a path out of docs/.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures under the path that they have in the repository."""
    for figure in sorted((ROOT / "benchmarks" / "results").rglob("*.png")):
        files.append(File.generated(config, figure.relative_to(ROOT).as_posix(), abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Let links to figures stay inside the site."""
    return markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
