"""Results as one HTML page that needs nothing else: plots inside it, no script, no request, light and dark."""

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import figures, plots, summaries
from .figures import Figure
from .results import Device, Run
from .summaries import Table

TEMPLATE = Path(__file__).parent / "page.html"
FACTS = {
    "date": "date",
    "commit": "commit",
    "device_name": "device",
    "cpu_capability": "instructions",
    "threads": "threads",
    "fastprefix": "fastprefix",
    "torch": "PyTorch",
    "transformers": "transformers",
    "peft": "PEFT",
    "python": "Python",
}
"""What the table of environments shows, and under which name."""
THEMES: dict[str, tuple[str, ...]] = {"light": (), "dark": ("dark_background",)}
CLEAR = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}


@dataclass(frozen=True)
class Picture:
    """A plot, drawn for light and for dark pages, as data URIs."""

    title: str
    light: str
    dark: str


@dataclass(frozen=True)
class Section:
    """One run: what it compares, its tables and plots, and every cell."""

    title: str
    text: str
    faults: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    everything: Table


@dataclass(frozen=True)
class Part:
    """A device: its headline, its runs and their environments."""

    title: str
    headline: Sequence[Picture]
    sections: Sequence[Section]
    environments: Table


TEXTS = {
    "main": (
        "Methods on whole models",
        "Every method and its peers train on the same batches, by turns. The floor is the frozen model without a "
        "prompt or a prefix, its gradient taken down to the embeddings. Models have random weights: losses show that "
        "training works, not how good a method is.",
    ),
    "attention": (
        "Prefix attention",
        "fused is prefix_attention; concat is gated concatenation and then PyTorch's attention; tokens, the floor, is "
        "PyTorch's attention without any prefix. Labels: batch x heads of query / key x queries x keys x head size, "
        "prefix tokens. Means and extremes are over all shapes but that of one query; the share is fused / (tokens "
        "x (1 + P / M)), so 1 is what PyTorch's attention would take for as many keys.",
    ),
    "attention-dropout": (
        "Prefix attention with dropout",
        "The same, where every competitor drops probabilities.",
    ),
    "embedding": (
        "Prompt embedding",
        "prompt_embedding (pt, dept, adept, merged) and the same in PyTorch, in units of a plain lookup that writes "
        "the same output. Token ids have the frequencies of real text, except where a case says uniform.",
    ),
    "shared-prompt": (
        "A prompt shared by the batch",
        "A soft prompt on a decoder, run once for the whole batch (shared), in every row (textbook, PEFT) or merged "
        "into keys and values, in units of the frozen model without a prompt.",
    ),
    "models": (
        "Whole models at published shapes",
        "Training steps and inference over lengths of the input (N) and of prompt and prefix (P), in units of the "
        "frozen model without them. eager: as the methods' authors write them.",
    ),
    "adapterhub": (
        "AdapterHub's prefix tuning",
        "The same models in an environment of their own, with the older transformers that adapters needs, in units "
        "of the frozen model there.",
    ),
}


def html(devices: Sequence[Device], table: str) -> str:
    """The page; ``table`` is the text of the CSV that it offers for download."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    parts = [_part(device) for device in devices]
    return template.render(parts=parts, table=_data_uri(table.encode(), "text/csv"))


def _part(device: Device) -> Part:
    headline = [_pictures(figures.main_job(run)) for run in device.runs if run.suite == "main"]
    sections = [_section(run) for run in sorted(device.runs, key=_order)]
    return Part(device.name, [picture for of in headline for picture in of], sections, _environments(device))


def _order(run: Run) -> tuple[int, int]:
    """As in ``TEXTS``, the plainest run of a suite last."""
    names = list(TEXTS)
    return (names.index(run.suite) if run.suite in names else len(names), -len(run.cells))


def _section(run: Run) -> Section:
    title, text = TEXTS.get(run.suite, (run.suite, ""))
    return Section(
        title + (f" ({run.instructions})" if run.instructions else ""),
        text,
        [summaries.fault_text(fault) for fault in run.faults],
        list(TABLES.get(run.suite, _no_tables)(run)),
        [picture for figure in _own_figures(run) for picture in _pictures(figure(run))],
        summaries.everything(run),
    )


def _own_figures(run: Run) -> Iterable[Callable[[Run], Figure]]:
    """The main job's are the headline."""
    return figures.OF_SUITE.get(run.suite, {}).values() if run.suite != "main" else ()


def _main_tables(run: Run) -> Iterator[Table]:
    for model in dict.fromkeys(str(cell.case["model"]) for cell in run.cells):
        table = summaries.main_job(run, model)
        yield replace(table, header=(model, *table.header[1:]))


def _shared_tables(run: Run) -> Iterator[Table]:
    for S in dict.fromkeys(cell.case["S"] for cell in run.cells):
        yield summaries.shared_prompt(run, int(S))


def _model_tables(run: Run) -> Iterator[Table]:
    for model in dict.fromkeys(str(cell.case["model"]) for cell in run.cells):
        yield summaries.whole_model(run, model)


def _no_tables(run: Run) -> Iterator[Table]:
    return iter(())


TABLES: dict[str, Callable[[Run], Iterator[Table]]] = {
    "main": _main_tables,
    "attention": lambda run: iter([summaries.attention(run)]),
    "attention-dropout": lambda run: iter([summaries.attention(run)]),
    "embedding": lambda run: iter([summaries.embedding(run)]),
    "shared-prompt": _shared_tables,
    "models": _model_tables,
    "adapterhub": _model_tables,
}


def _environments(device: Device) -> Table:
    """A column for each run."""
    rows = [[name, *(_fact(run, key) for run in device.runs)] for key, name in FACTS.items()]
    return Table(("", *(run.suite for run in device.runs)), rows)


def _fact(run: Run, key: str) -> str:
    value: Any = run.environment.get(key)
    if key == "commit" and value:
        return str(value)[:10] + (" + changes" if run.environment.get("dirty") else "")
    return "not recorded" if value is None else str(value)


def _pictures(figure: Figure) -> list[Picture]:
    """A picture for each panel: a narrow page stacks them, a wide one sets them side by side."""
    return [Picture(one.panels[0].title, *(_drawn(one, theme) for theme in THEMES)) for one in figure.single()]


def _drawn(figure: Figure, theme: str) -> str:
    with plots.style(THEMES[theme], CLEAR), TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        figures.draw(figure, path, dpi=110, width=4.6)
        return _data_uri(path.read_bytes(), "image/png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
