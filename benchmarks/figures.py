"""The plots of results: which figures each suite shows, as panels of bars."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import plots
from .methods import FLOOR
from .plots import Panel
from .results import Case, Cell, Run, Value
from .summaries import DIRECTIONS, EMBEDDING_CASE, spaced, table_text

CURVES_TABLE: dict[str, Value] = {"V": 32_128, "d": 1024}
KINDS = ("forward", "forward + backward")
TIMES_FLOOR = "time, times the frozen floor (dashed)"


@dataclass(frozen=True)
class Bars:
    """A plot of ratios: its panels, the kinds of bars, and what the lengths mean."""

    panels: list[Panel[float]]
    kinds: tuple[str, ...]
    xlabel: str

    def single(self) -> Iterator["Bars"]:
        """A plot for each panel that has anything."""
        return (replace(self, panels=[panel]) for panel in self.panels if panel.series)


@dataclass(frozen=True)
class Curves:
    """A plot of figures over a length: its panels, the competitor to draw in grey, what the axes mean."""

    panels: list[Panel[tuple[int, float]]]
    grey: str
    xlabel: str
    ylabel: str

    def single(self) -> Iterator["Curves"]:
        """A plot for each panel that has anything."""
        return (replace(self, panels=[panel]) for panel in self.panels if panel.series)


Figure = Bars | Curves


def draw(figure: Figure, path: Path, dpi: int = 150, width: float = plots.WIDTH) -> None:
    """As a PNG; ``width`` in inches, of each panel."""
    if isinstance(figure, Curves):
        plots.curves(figure.panels, path, figure.grey, figure.xlabel, figure.ylabel, dpi=dpi, width=width)
    else:
        plots.ratio_bars(figure.panels, figure.kinds, path, figure.xlabel, dpi, width)


def main_job(run: Run) -> Bars:
    """Every method on every model, in units of the floor."""
    models = dict.fromkeys(str(cell.case["model"]) for cell in run.cells)
    return Bars([Panel(model, _series(run, DIRECTIONS, {"model": model})) for model in models], KINDS, TIMES_FLOOR)


def embedding(run: Run) -> Bars:
    """Every competitor that trains, table by table, in units of the lookup."""
    cases = [cell.case for cell in run.select(case=EMBEDDING_CASE, role="floor")]
    panels = [Panel(f"table of {table_text(case)}", _series(run, DIRECTIONS, case)) for case in cases]
    return Bars(panels, KINDS, "time, times the lookup (dashed)")


def shared_prompt(run: Run) -> Bars:
    """Training steps and prefills at every length, in units of the floor."""
    lengths = dict.fromkeys(cell.case["S"] for cell in run.cells)
    panels = [Panel(f"{S} prompt tokens", _series(run, ("step", "prefill"), {"S": S})) for S in lengths]
    return Bars(panels, ("training step", "prefill"), TIMES_FLOOR)


def attention(run: Run) -> Bars:
    """How many times faster than concatenation, case by case, a panel for each type."""
    panels = []
    for dtype in dict.fromkeys(str(cell.case["dtype"]) for cell in run.cells):
        forward = run.select(competitor="fused", direction=DIRECTIONS[0], dtype=dtype)
        panels.append(Panel(dtype, {_attention_label(cell.case): _over_concat(run, cell) for cell in forward}))
    return Bars(panels, KINDS, "times faster than concatenation")


def whole_models(run: Run) -> Curves:
    """Training steps of each model over the length of the input, and over that of the prefix."""
    panels = []
    for model in dict.fromkeys(str(cell.case["model"]) for cell in run.cells):
        cross = run.select(model=model, direction="step")[0].case
        for x, fixed in (("N", "P"), ("P", "N")):
            series = _over(run, x, {"model": model, fixed: cross[fixed]}, "step")
            panels.append(Panel(f"{model}, {fixed} = {cross[fixed]}, over {x}", series))
    return Curves(panels, FLOOR, "tokens of the input (N), or of prompt and prefix (P)", "training step, x floor")


def embedding_curves(run: Run) -> Curves:
    """Every competitor in one table, over the length of the input."""
    table = run.select(case={**EMBEDDING_CASE, **CURVES_TABLE}, role="floor")[:1]
    panels = []
    for direction in DIRECTIONS if table else ():
        same = {name: value for name, value in table[0].case.items() if name != "N"}
        panels.append(Panel(spaced(direction), _over(run, "N", same, direction)))
    return Curves(panels, "lookup", "tokens of a row (N)", "time, times the lookup")


def _over(run: Run, x: str, case: Case, direction: str) -> dict[str, list[tuple[int, float]]]:
    """Every competitor's ratio to the floor, by the values of one parameter."""
    series: dict[str, list[tuple[int, float]]] = {}
    for cell in run.select(case=case, direction=direction):
        ratio = run.times_floor(cell)
        if ratio is not None:
            series.setdefault(cell.competitor, []).append((int(cell.case[x]), ratio))
    return {name: sorted(points) for name, points in series.items()}


OF_SUITE: dict[str, dict[str, Callable[[Run], Figure]]] = {
    "main": {"": main_job},
    "attention": {"": attention},
    "embedding": {"": embedding, "lengths": embedding_curves},
    "shared-prompt": {"": shared_prompt},
    "models": {"": whole_models},
}
"""The plots of each suite; the names of all but the first are part of their files' names."""


def _series(run: Run, directions: tuple[str, ...], case: Case) -> dict[str, list[float]]:
    """The competitors that have all directions."""
    series: dict[str, list[float]] = {}
    for direction in directions:
        for cell in run.select(case=case, direction=direction):
            ratio = run.times_floor(cell)
            if ratio is not None:
                series.setdefault(cell.competitor, []).append(ratio)
    return {name: ratios for name, ratios in series.items() if len(ratios) == len(directions)}


def _attention_label(case: Case) -> str:
    B, Hq, Hkv, N, M, D, P = (case[name] for name in ("B", "Hq", "Hkv", "N", "M", "D", "P"))
    return f"{B}x{Hq}/{Hkv}x{N}x{M}x{D}, P {P}{', causal' if case['causal'] else ''}"


def _over_concat(run: Run, forward: Cell) -> list[float]:
    """In both directions; not a number where one of the two failed."""
    fused = [run.beside(replace(forward, direction=direction), "fused") for direction in DIRECTIONS]
    return [
        concat.p50 / cell.p50 if cell and concat else math.nan
        for cell, concat in ((cell, run.beside(cell, "concat") if cell else None) for cell in fused)
    ]
