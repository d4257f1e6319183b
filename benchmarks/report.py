"""Results as a table for the terminal and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MISSING = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right.

    A row shorter than the header is a remark: its last cell runs over the columns that it lacks.
    """
    full = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(len(row[column]) for row in full) for column in range(len(header))]
    widths[0] = max([widths[0], *(len(row[0]) for row in rows)])

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=False))]
        if len(row) < len(header):
            # The cells that a remark runs over keep their bars, so that it stays a Markdown table.
            cells[-1] = row[-1]
            return "| " + " | ".join(cells) + " " + "|" * (len(header) - len(row) + 1)
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def number(value: float | None, digits: int = 1, suffix: str = "") -> str:
    """A cell: the value with so many decimals, or the mark of a missing one."""
    return MISSING if value is None else f"{value:,.{digits}f}{suffix}"


def write_json(results: dict[str, Any], path: Path) -> None:
    """Keep the results."""
    write_text(json.dumps(results, indent=1, default=str) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a file by way of a second one, so that a run that is killed leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
