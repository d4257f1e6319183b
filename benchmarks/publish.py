"""Results as a page, plots and a table; the tables of a Markdown file filled in."""

import argparse
import csv
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import figures, floors, page, results
from .errors import BenchmarkError
from .options import DEFAULT_OUT
from .report import write_text
from .results import Device, Run
from .summaries import SNIPPETS, Table

DESCRIPTION = "Results as one HTML page, plots (PNG) and a CSV table; with --readme, a Markdown file's tables too."
MARKER = re.compile(r"(<!-- results: (\S+)/(\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
HEADLINE = "headline.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="folders of JSON files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "report", help="folder for page, plots and table")
    parser.add_argument(
        "--readme", type=Path, help="fill the tables of this file, and draw its plots beside the results"
    )


def run(options: argparse.Namespace) -> int:
    """Write it all."""
    devices = results.read_devices(options.results)
    table = csv_text(devices)
    write_text(table, options.out / "results.csv")
    write_text(page.html(devices, table), options.out / "index.html")
    for device in devices:
        draw_plots(device, options.out / device.name)
    if options.readme:
        write_text(filled(options.readme.read_text(encoding="utf-8"), devices), options.readme)
        for device in devices:
            draw_headline(device, device.folder)
    print(f"page, plots and table in {options.out}")
    return 0


def csv_text(devices: Sequence[Device]) -> str:
    """All cells as one table: a row each, a column for every parameter of any case."""
    rows = [row for device in devices for of_suite in device.runs for row in _flat(device, of_suite)]
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(device: Device, of_suite: Run) -> Iterator[dict[str, Any]]:
    names = ("date", "commit", "dirty", "fastprefix", "torch", "device_name", "cpu_capability", "threads")
    facts = {name: of_suite.environment.get(name) for name in names}
    rates = of_suite.settings.get("rates", {})
    for cell in of_suite.cells:
        record = {name: value for name, value in cell.record().items() if name not in ("case", "samples")}
        floor = floors.of(of_suite, cell)
        least: dict[str, Any] = {}
        if floor:
            seconds = floor.seconds(rates, str(cell.case["dtype"]))
            least = {"least_flops": floor.flops, "least_bytes": floor.bytes, "least_seconds": seconds}
        ratio = {"times_floor": of_suite.times_floor(cell)}
        yield {"folder": device.name, "suite": of_suite.suite, **facts, **record, **ratio, **least, **cell.case}


def draw_plots(device: Device, folder: Path) -> None:
    """The PNGs of each run."""
    for of_suite in device.runs:
        for name, figure in figures.OF_SUITE.get(of_suite.suite, {}).items():
            parts = filter(None, (of_suite.suite, name, (of_suite.instructions or "").lower()))
            figures.draw(figure(of_suite), folder / f"{'-'.join(parts)}.png")


def draw_headline(device: Device, folder: Path) -> None:
    """The plot for a README: small, with its figures written into the file."""
    for of_suite in device.runs:
        if of_suite.suite == "main":
            figures.draw(figures.main_job(of_suite), folder / HEADLINE, dpi=100)


def filled(text: str, devices: Sequence[Device]) -> str:
    """The text with what stands between ``<!-- results: DEVICE/NAME -->`` and ``<!-- /results -->`` computed anew."""
    of_name = {device.name: device for device in devices}

    def fill(match: re.Match[str]) -> str:
        begin, device, name, end = match.groups()
        if device not in of_name or name not in SNIPPETS:
            raise BenchmarkError(f"results: {device}/{name}: devices {list(of_name)}, names {list(SNIPPETS)}")
        return f"{begin}{_markdown(SNIPPETS[name](of_name[device]))}\n{end}"

    return MARKER.sub(fill, text)


def _markdown(snippet: Table | str) -> str:
    """A table stands by itself; a sentence goes on in its paragraph."""
    return f"\n{snippet.markdown()}\n" if isinstance(snippet, Table) else textwrap.fill(snippet, 120)
