"""Plots of results, drawn without a display."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#332288", "#882255")  # Okabe-Ito first
GREY = "#8c8c8c"
WIDTH = 6.2
"""Inches, of a panel."""

T = TypeVar("T")


@dataclass(frozen=True)
class Panel(Generic[T]):
    """One set of axes: a title, and for each competitor the points of its curve or the lengths of its bars."""

    title: str
    series: Mapping[str, Sequence[T]]


def curves(
    panels: Sequence[Panel[tuple[int, float]]],
    path: Path,
    grey: str | None,
    xlabel: str,
    ylabel: str,
    logarithmic: bool = False,
    dpi: int = 150,
    width: float = WIDTH,
) -> None:
    """Points joined by lines; the competitor named ``grey``, if any, is dashed. The file says what was drawn."""
    figure, all_axes = _figure(len(panels), width, 4.2)
    colours = _colours(panels, grey)
    for axes, panel in zip(all_axes, panels, strict=True):
        for name, points in panel.series.items():
            style = "--o" if name == grey else "-o"
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=colours[name], label=name, linewidth=1.8, markersize=3.5)
        axes.set(title=panel.title, xlabel=xlabel, ylabel=ylabel)
        if logarithmic:
            axes.set(xscale="log", yscale="log")
    _shared_legend(figure, all_axes, columns=4 if width * len(panels) > 6 else 3)
    _save(figure, path, dpi, {"Description": described(panels)})


def ratio_bars(
    panels: Sequence[Panel[float]],
    kinds: Sequence[str],
    path: Path,
    xlabel: str,
    dpi: int = 150,
    width: float = WIDTH,
) -> None:
    """For each competitor a bar of each kind, with its number; a dashed line at 1. The file says what was drawn."""
    rows = max((len(panel.series) * len(kinds) for panel in panels), default=0)
    figure, all_axes = _figure(len(panels), width, max(2.4, 1.4 + 0.2 * rows))
    thickness = 0.8 / len(kinds)
    for axes, panel in zip(all_axes, panels, strict=True):
        names = list(panel.series)
        for k, kind in enumerate(kinds):
            values = [panel.series[name][k] for name in names]
            places = [i + (k - (len(kinds) - 1) / 2) * thickness for i in range(len(names))]
            bars = axes.barh(places, values, 0.92 * thickness, color=COLOURS[k], label=kind)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(panel.title)
        axes.set_xlabel(xlabel, loc="right")  # it may be longer than the axes, but not than these and their labels
    _shared_legend(figure, all_axes, columns=len(kinds))
    _save(figure, path, dpi, {"Description": described(panels)})


def dots(panel: Panel[float], path: Path, xlabel: str) -> None:
    """For each competitor its values as dots, and their mean as a line with its number."""
    names = list(panel.series)
    figure, (axes,) = _figure(1, 7.2, max(2.4, 0.36 * len(names) + 1.2))
    for i, name in enumerate(names):
        values = panel.series[name]
        mean = statistics.mean(values)
        axes.plot(values, [i] * len(values), "o", color=COLOURS[0], alpha=0.6, markersize=5)
        axes.plot([mean, mean], [i - 0.3, i + 0.3], color=COLOURS[1], linewidth=2)
        axes.annotate(f"{mean:.1f}", (mean, i - 0.32), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.08)
    axes.set(title=panel.title, xlabel=xlabel)
    _save(figure, path)


def _figure(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, all_axes


def _shared_legend(figure: Any, all_axes: list[Any], columns: int) -> None:
    """One legend for all panels, a label once, whichever panels have it."""
    entries = {label: h for axes in all_axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        entries.values(), entries.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=columns
    )


def _colours(panels: Sequence[Panel[Any]], grey: str | None) -> dict[str | None, str]:
    """The same colour for a competitor in every panel, whether or not all panels have it."""
    names = dict.fromkeys(name for panel in panels for name in panel.series if name != grey)
    return {grey: GREY, **{name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}}


def _save(figure: Any, path: Path, dpi: int = 150, metadata: Mapping[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata=metadata)


def described(panels: Sequence[Panel[Any]]) -> str:
    """The figures of a plot as text, which its file keeps."""
    return json.dumps([asdict(panel) for panel in panels])


@contextmanager
def style(names: Sequence[str], settings: Mapping[str, str]) -> Iterator[None]:
    """What is drawn inside has Matplotlib's styles of these names, and these settings."""
    import matplotlib.style

    with matplotlib.style.context([*names, dict(settings)]):
        yield
