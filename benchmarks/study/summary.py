"""What came out: tables, JSON and plots, of a study that is finished or of what there is of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import plots, report
from ..plots import Panel
from .plan import Findings, Row
from .trials import Outcome

HEADER = (
    "method", "trainable", "rates", "seeds", "test %", "dev %", "best step", "ms a step", "peak MB",
)  # fmt: skip
COMPARED = (  # what the papers found: the first above the second
    ("DePT", "PT"), ("ADePT", "DePT"), ("ADePT", "PT"), ("APT", "prefix tuning"),
    ("APT, slow gates", "prefix tuning"),
    ("residual prefix + gate", "MLP prefix"), ("residual prefix + gate", "prefix tuning"),
)  # fmt: skip
NOTES = """\
Mean and standard deviation over the seeds. trainable: without the classifier's head, which every method trains too.
rates: of the prompt / of the rest, chosen on the dev split. best step: with the best dev accuracy, whose weights are
tested; where it is near the last step, more steps might have helped. ms a step: median of forward, backward and
optimizer. peak MB: what forward and backward of the longest batch add to the model, by PyTorch's allocators."""


def tables(findings: Findings) -> str:
    """The methods at their budgets, their differences and, where there are any, the prefix methods over lengths."""
    parts = [report.table(HEADER, [_cells(row) for row in findings.table if row.runs])]
    if compared := [cells for pair in COMPARED if (cells := _compared(findings, *pair))]:
        parts.append(report.table(("difference of test %", "mean", "of each seed"), compared))
    if lengths := _lengths(findings):
        header = ("test % with a prefix of", *map(str, lengths), "largest - least")
        parts.append(report.table(header, [_over_lengths(name, findings, lengths) for name in findings.lengths]))
    return "\n\n".join(parts)


def _cells(row: Row) -> list[str]:
    outcomes = list(row.runs.values())
    peaks = [outcome.peak_bytes for outcome in outcomes if outcome.peak_bytes is not None]
    return [
        title(row),
        report.number(outcomes[0].trainable, 0),
        str(row.rates),
        str(len(outcomes)),
        spread(tested(outcomes)),
        spread([outcome.dev_accuracy for outcome in outcomes]),
        report.number(statistics.mean(outcome.best_step for outcome in outcomes), 0),
        report.number(1e3 * statistics.median(outcome.seconds_a_step for outcome in outcomes), 0),
        report.number(max(peaks) / 1e6 if peaks else None),
    ]


def _compared(findings: Findings, above: str, below: str) -> list[str] | None:
    """Seed by seed: the same batches in the same order, and the same head at the start."""
    runs = {row.contestant.name: row.runs for row in findings.table}
    seeds = [seed for seed in runs.get(above, {}) if seed in runs.get(below, {})]
    pairs = [tested([runs[above][seed], runs[below][seed]]) for seed in seeds]
    differences = [100 * (pair[0] - pair[1]) for pair in pairs]
    if not differences:
        return None
    each = ", ".join(f"{difference:+.1f}" for difference in differences)
    return [f"{above} - {below}", f"{statistics.mean(differences):+.1f}", each]


def title(row: Row) -> str:
    """The method's name and its sizes."""
    config = row.contestant.config
    if config is None:
        return row.contestant.name
    sizes = {name: getattr(config, name, None) for name in ("rank", "bottleneck_dim", "hidden_dim")}
    reparameterised = getattr(config, "reparameterization", None) is not None
    shown = [f"{config.num_virtual_tokens}"]
    if sizes["rank"] is not None:
        shown.append(f"r={sizes['rank']}")
    elif reparameterised:
        shown.append(f"h={sizes['hidden_dim']}")
    elif row.contestant.group == "prompt" and sizes["bottleneck_dim"] is not None:
        shown.append(f"r={sizes['bottleneck_dim']}")
    return f"{row.contestant.name} ({', '.join(shown)})"


def tested(outcomes: Sequence[Outcome]) -> list[float]:
    """Accuracies on the test split."""
    return [outcome.test_accuracy for outcome in outcomes if outcome.test_accuracy is not None]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, of shares in percent."""
    if not values:
        return report.MISSING
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _lengths(findings: Findings) -> list[int]:
    return sorted({length for rows in findings.lengths.values() for length, row in rows.items() if row.runs})


def _over_lengths(name: str, findings: Findings, lengths: list[int]) -> list[str]:
    rows = findings.lengths[name]
    scores = {length: tested(list(rows[length].runs.values())) for length in lengths}
    means = [100 * statistics.mean(values) for values in scores.values() if values]
    range_of_means = max(means) - min(means) if means else None
    return [name, *(spread(scores[length]) for length in lengths), report.number(range_of_means)]


def record(findings: Findings) -> dict[str, Any]:
    """What the JSON keeps: every outcome."""
    return {
        "table": [_record(row) for row in findings.table],
        "lengths": {
            name: {length: _record(row) for length, row in rows.items()} for name, rows in findings.lengths.items()
        },
    }


def _record(row: Row) -> dict[str, Any]:
    config = row.contestant.config
    return {
        "method": row.contestant.name,
        "group": row.contestant.group,
        "config": config.to_dict() if config else None,
        "rates": asdict(row.rates) if row.rates else None,
        "search": [{"rates": asdict(rates), "dev_accuracy": o.dev_accuracy} for rates, o in row.search],
        "runs": {seed: asdict(outcome) for seed, outcome in row.runs.items()},
    }


def draw(findings: Findings, out: Path) -> None:
    """Accuracies by method, gates over the training, accuracies over lengths."""
    rows = {title(row): [100 * value for value in tested(list(row.runs.values()))] for row in findings.table}
    plots.dots(
        Panel("test accuracy, every seed and the mean", {name: v for name, v in rows.items() if v}),
        out / "study_accuracy.png",
        "% of the test texts",
    )
    if panels := [panel for row in findings.table for panel in _gate_panels(row)]:
        plots.curves(panels, out / "study_gates.png", None, "step", "gate, mean over dev texts")
    curves = {name: _curve(findings, name, _lengths(findings)) for name in findings.lengths}
    if curves := {name: curve for name, curve in curves.items() if curve}:
        panel = Panel("test accuracy over lengths", curves)
        plots.curves(
            [panel], out / "study_lengths.png", None, "prefix tokens", "% of the test texts, mean of the seeds"
        )


def _curve(findings: Findings, name: str, lengths: list[int]) -> list[tuple[int, float]]:
    scores = {length: tested(list(findings.lengths[name][length].runs.values())) for length in lengths}
    return [(length, 100 * statistics.mean(values)) for length, values in scores.items() if values]


def _gate_panels(row: Row) -> list[Panel[tuple[int, float]]]:
    """The gates of the first seed: where layers differ, by layer; where they do not, over the prefix tokens."""
    readings = next((outcome.gates for outcome in row.runs.values()), [])
    if not readings:
        return []
    if all(values == readings[-1].values[0] for values in readings[-1].values):
        summaries: dict[str, Callable[[list[float]], float]] = {"largest": max, "mean": statistics.mean, "least": min}
        series = {
            f"{name} of the tokens": [(reading.step, summary(reading.values[0])) for reading in readings]
            for name, summary in summaries.items()
        }
    else:
        layers = range(len(readings[-1].values))
        series = {
            f"layer {layer + 1}": [(reading.step, statistics.mean(reading.values[layer])) for reading in readings]
            for layer in layers
        }
    return [Panel(title(row), series)]
