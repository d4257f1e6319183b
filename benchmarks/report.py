"""Results as tables, plots and CSV. The tables of the README are filled in with cog."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from . import limits, results
from .measure import BenchmarkError
from .options import DEFAULT_OUT
from .results import FIGURES, Record, describe_fault

DESCRIPTION = "Write results as tables (Markdown, CSV) and plots (PNG). With --readme, update the tables of a file."
FORWARD, BOTH = "forward", "forward+backward"
HEADLINE = "headline.png"
MISSING = "-"
NOISY = "~"
NOISE = 0.15
"""As a share of the median: times that spread further are marked."""
TEXT_CASE = "B == 32 and N == 256 and r == 19 and ids == 'text'"
"""The cases of the embedding's summary. The CSV file has all cases."""


class Table(NamedTuple):
    """Hold the texts of a table: the first column is aligned to the left, the others to the right."""

    header: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table for a file or a terminal."""
        rows = [row + [""] * (len(self.header) - len(row)) for row in self.rows]  # a failure has one cell
        align = ("left", *["right"] * (len(self.header) - 1))
        return tabulate(rows, self.header, tablefmt="pipe", disable_numparse=True, colalign=align if rows else None)


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Format a value, or mark it as missing."""
    return MISSING if value is None or pd.isna(value) else f"{value:,.{digits}f}{unit}"


def geometric_mean(values: Any) -> float:
    """Return the geometric mean of ratios."""
    return float(np.exp(np.log(values).mean()))


def load_frame(record: Record) -> pd.DataFrame:
    """Return the rows of a record, with the ratio of each to the floor of its case and direction.

    Where the floor trains nothing, training is compared with its forward pass.
    """
    frame = pd.DataFrame(record.rows)
    case = [name for name in frame if name not in (*FIGURES, "peer", "role", "direction")]
    floors = frame[frame.role == "floor"][[*case, "direction", "p50"]].rename(columns={"p50": "floor"})
    frame = frame.merge(floors, how="left", on=[*case, "direction"])
    forward = floors[floors.direction == FORWARD].drop(columns="direction").rename(columns={"floor": "forward floor"})
    frame = frame.merge(forward, how="left", on=case)
    frame["x floor"] = frame.p50 / frame.pop("floor").fillna(frame.pop("forward floor")).replace(0, np.nan)
    return frame


# ---- tables --------------------------------------------------------------------------------------------------------


def tabulate_methods(record: Record, model: str, in_detail: bool = False) -> Table:
    """Show every method of the main job on the model whose title begins with ``model``.

    Args:
        record: The results of the main job.
        model: The beginning of the title.
        in_detail: Also show milliseconds, and mark what is noise.
    """
    faults = [[fault["peer"], *describe_fault(fault).split(": ")[1:]] for fault in record.faults]
    times = ("forward, x floor", "fwd + bwd, x floor")
    if in_detail:
        times = ("forward ms", "x floor", "fwd + bwd ms", "x floor")
    header = ("method", "trainable", *times, "tokens/s", "peak MB", "loss first", "last")
    frame = load_frame(record)
    frame = frame[frame.model.str.startswith(model)]
    tokens = record.settings["models"][frame.model.iloc[0]]["tokens_per_step"]
    at, rows = frame.set_index(["peer", "quantity", "direction"]), []
    noisy = {name for name, row in at.iterrows() if is_noisy(row)}
    for peer in frame.peer.unique():
        cells = []
        for direction in (FORWARD, BOTH):
            time = at.loc[(peer, "seconds", direction)]
            marks = [(name, "seconds", direction) in noisy for name in (peer, frame.peer[frame.role == "floor"].iloc[0])]
            cells += [NOISY * marks[0] + number(1e3 * time.p50, 1)] if in_detail else []
            cells.append(NOISY * (in_detail and any(marks)) + number(time["x floor"]))
        losses = at.loc[(peer, "loss", "held out")].samples
        rows.append([
            peer,
            number(at.p50[peer, "parameters", "training"], 0),
            *cells,
            number(tokens / at.p50[peer, "seconds", BOTH], 0),
            number(at.p50[peer, "bytes", BOTH] / 1e6, 1),
            *(number(loss, 3) for loss in (losses[0], losses[-1])),
        ])  # fmt: skip
    return Table(header, rows + faults)


def is_noisy(row: Any) -> bool:
    """Return whether p20 or p80 is further from the median than noise should be."""
    return bool(max(row.p80 - row.p50, row.p50 - row.p20) > NOISE * row.p50)


def pair_attention(record: Record, peer: str = "concat", decoding: bool | None = False) -> pd.DataFrame:
    """Return for each case how much faster ``fused`` is than a peer, and its time as a share of scaled plain SDPA."""
    frame = pd.DataFrame(record.rows).query("quantity == 'seconds'")
    if decoding is not None:
        frame = frame[(frame.N == 1) == decoding]
    case = [name for name in frame if name not in (*FIGURES, "peer", "role")]
    times = frame.pivot(index=case, columns="peer", values="p50").reset_index()
    times["over"] = times[peer] / times.fused
    times["share"] = times.fused / ((1 + times.P / times.M) * times.tokens)
    return times.dropna(subset="over")


def tabulate_attention(record: Record) -> Table:
    """Show means over the shapes, for each type and direction."""
    pairs = pair_attention(record)
    rows = [
        [
            f"{dtype} {direction.replace('+', ' + ')}",
            *map(number, (geometric_mean(of.over), of.over.min(), geometric_mean(of.share), of.share.max())),
        ]
        for (dtype, direction), of in group_in_order(pairs, record, "dtype", "direction")
    ]
    share = "share of plain SDPA, scaled"
    return Table(("prefix attention", "times faster than concatenation", "least", share, "most"), rows)


def group_in_order(frame: pd.DataFrame, record: Record, *columns: str) -> list[tuple[Any, pd.DataFrame]]:
    """Group the rows, in the order in which the record has the groups."""
    order = list(dict.fromkeys(tuple(row[column] for column in columns) for row in record.rows))
    return sorted(frame.groupby(list(columns)), key=lambda group: order.index(group[0]))


def tabulate_more_attention(records: dict[str, Record]) -> Table:
    """Show decoding, compiled FlexAttention, dropout and AVX2."""
    main, dropout = records["attention"], records["attention_dropout"]
    parts = [
        ("decoding, over concatenation", main, "concat", True),
        ("over concatenation and compiled FlexAttention", main, "flex", None),
        (f"dropout {dropout.settings['dropout']}, over concatenation", dropout, "concat", False),
        ("AVX2, over concatenation", records["attention_avx2"], "concat", False),
    ]
    rows = []
    for title, record, peer, decoding in parts:
        for (dtype, direction), of in group_in_order(
            pair_attention(record, peer, decoding), record, "dtype", "direction"
        ):
            figures = (geometric_mean(of.over), of.over.min(), of.over.max(), of.share.max())
            rows.append([f"{title}, {dtype} {direction.replace('+', ' + ')}", *map(number, figures)])
    return Table(("prefix attention", "times faster", "least", "most", "share of plain SDPA, scaled: most"), rows)


def tabulate_embedding(record: Record) -> Table:
    """Show ADePT and its eager peer in units of the lookup, for each table of the summary's cases."""
    frame = load_frame(record).query(f"quantity == 'seconds' and {TEXT_CASE}")
    rows = []
    for (V, d, dtype), of in frame.groupby(["V", "d", "dtype"]):
        ratios = of.set_index(["direction", "peer"])["x floor"]
        cells = [number(ratios.get((direction, peer))) for direction in (FORWARD, BOTH) for peer in ("adept", "adept_eager")]
        rows.append([name_table(V, d, dtype), *cells])
    return Table(("table", "ADePT forward: fused", "eager", "forward + backward: fused", "eager"), rows)


def name_table(V: int, d: int, dtype: str) -> str:
    """Name an embedding table. Its type is float32 unless it is named."""
    return f"{V:,} x {d:,}" + ("" if dtype == "float32" else f", {dtype}")


def tabulate_ratios(frame: pd.DataFrame, title: str, columns: dict[tuple[str, str], str]) -> Table:
    """Show every peer in units of the floor, and the floor in its own units."""
    at, rows = frame.set_index(["peer", "quantity", "direction"]), []
    for peer, role in frame[["peer", "role"]].drop_duplicates().itertuples(index=False):
        cells = []
        for quantity, direction in columns:
            scale, unit = {"seconds": (1e3, " ms"), "bytes": (1e-6, " MB")}[quantity]
            if (peer, quantity, direction) not in at.index:
                cells.append(MISSING)
            elif role == "floor":
                cells.append(number(scale * at.p50[peer, quantity, direction], 1, unit))
            else:
                cells.append(number(at["x floor"][peer, quantity, direction]))
        rows.append([peer, *cells])
    return Table((title, *columns.values()), rows)


def tabulate_shared_prompt(record: Record, S: int) -> Table:
    """Show every peer with a prompt of one length."""
    frame = load_frame(record).query("S == @S")
    prefill = frame[frame.direction == "prefill"].peer.unique()  # the order of the table: after merging nothing trains
    frame = frame.set_index("peer", drop=False).loc[prefill].reset_index(drop=True)
    columns = {
        ("seconds", "step"): "training step", ("bytes", "step"): "its memory", ("seconds", "prefill"): "prefill",
        ("bytes", "prefill"): "its memory", ("seconds", "decode"): "a token",
    }  # fmt: skip
    return tabulate_ratios(frame, f"{S} prompt tokens", columns)


MODEL_COLUMNS = {
    ("seconds", "step"): "training step", ("bytes", "step"): "its memory",
    ("seconds", "inference"): "inference", ("bytes", "inference"): "its memory",
}  # fmt: skip


def select_model(record: Record, model: str) -> pd.DataFrame:
    """Return the rows of one whole model at the lengths that were measured first."""
    frame = load_frame(record).query("model == @model")
    first = frame.iloc[0]
    return frame[(frame.N == first.N) & (frame.P == first.P)]


def tabulate_model(record: Record, model: str) -> Table:
    """Show every peer on one whole model."""
    frame = select_model(record, model)
    first = frame.iloc[0]
    title = f"{model}, {first['rows']} x {first.N} tokens, P = {first.P}"
    header, rows = tabulate_ratios(frame, title, MODEL_COLUMNS)
    seconds = frame.query("quantity == 'seconds' and direction == 'step'").set_index("peer").p50
    if record.suite == "adapterhub":
        return Table(header, rows)
    rows = [[*row, number(first["rows"] / seconds.get(row[0], np.nan), 1)] for row in rows]
    return Table((*header, "rows/s trained"), rows)


def tabulate_saved(record: Record) -> Table:
    """Show what three epochs over as many rows as SST-2 has cost here and with PEFT."""
    epochs, count = 3, 67_349
    model = record.rows[-1]["model"]
    frame = select_model(record, model).query("direction == 'step'")
    at, batch = frame.set_index(["peer", "quantity"]).p50, frame["rows"].iloc[0]
    rows = []
    for ours, theirs in (("PT", "PEFT PT"), ("prefix tuning", "PEFT prefix tuning")):
        hours = [number(epochs * count / batch * at[peer, "seconds"] / 3600, 1) for peer in (ours, theirs)]
        rows.append([ours, *hours, *(number(at[peer, "bytes"] / 1e6, 0) for peer in (ours, theirs))])
    return Table((f"{epochs} x {count:,} rows, {model}", "hours", "with PEFT", "MB", "with PEFT"), rows)


def tabulate_gpu(record: Record) -> Table:
    """Show the times of the kernels on a GPU, their rates, and the ratios to the best peer and to the best floor."""
    frame, rows = pd.DataFrame(record.rows), []
    if "B" not in frame:
        return Table(("case",), rows)
    frame = frame[(frame.quantity == "seconds") & frame.B.notna()]
    case = ["direction", "B", "Hq", "Hkv", "N", "M", "D", "P", "gate", "causal"]
    for key, of in frame.groupby(case, sort=False):
        best = of.groupby("role").p50.min()
        ours, values = best.get("ours", np.nan), dict(zip(case, key, strict=True))
        flops = limits.count_attention({**values, "role": "ours", "dtype": "bfloat16"}).flops
        shape = "x".join(f"{values[name]:.0f}" for name in case[1:7])
        title = f"{values['direction']}, {shape}, P {values['P']:.0f}, {values['gate']}{', causal' * values['causal']}"
        ratios = (best.get("theirs", np.nan) / ours, ours / best.get("floor", np.nan))
        rows.append([title, number(1e3 * ours, 3), number(flops / ours / 1e12, 0), *map(number, ratios)])
    return Table(("B x Hq x Hkv x N x M x D", "ms", "TFLOP/s", "x faster than the best peer", "x floor"), rows)


def models_of(record: Record) -> list[str]:
    """Return the models of a record, in order."""
    return list(dict.fromkeys(row["model"] for row in record.rows))


TABLES: dict[str, Callable[[Record], list[Table]]] = {
    "main-job": lambda record: [tabulate_methods(record, model) for model in models_of(record)],
    "attention": lambda record: [tabulate_attention(record)],
    "attention-dropout": lambda record: [tabulate_attention(record)],
    "embedding": lambda record: [tabulate_embedding(record)],
    "shared-prompt": lambda record: [
        tabulate_shared_prompt(record, S) for S in dict.fromkeys(row["S"] for row in record.rows)
    ],
    "models": lambda record: [tabulate_model(record, model) for model in models_of(record)],
    "adapterhub": lambda record: [tabulate_model(record, model) for model in models_of(record)],
    "gpu": lambda record: [tabulate_gpu(record)],
}
"""The tables of each suite."""

README_TABLES: dict[str, Callable[[dict[str, Record]], Table]] = {
    "decoder": lambda records: tabulate_methods(records["main_job"], "decoder"),
    "encoder": lambda records: tabulate_methods(records["main_job"], "encoder"),
    "attention": lambda records: tabulate_attention(records["attention"]),
    "attention-more": tabulate_more_attention,
    "shared-prompt": lambda records: tabulate_shared_prompt(records["shared_prompt"], 100),
    "shared-prompt-60": lambda records: tabulate_shared_prompt(records["shared_prompt"], 60),
    "embedding": lambda records: tabulate_embedding(records["embedding"]),
    "bert": lambda records: tabulate_model(records["models"], "BERT-base"),
    "llama": lambda records: tabulate_model(records["models"], "Llama, 12 x 768"),
    "saved": lambda records: tabulate_saved(records["models"]),
    "adapterhub-bert": lambda records: tabulate_model(records["adapterhub"], "BERT-base"),
    "adapterhub-llama": lambda records: tabulate_model(records["adapterhub"], "Llama, 12 x 768"),
}


def readme_table(name: str, folder: Path = results.FOLDER) -> str:
    """Return a table of committed results for cog: ``DEVICE/TABLE``.

    Raises:
        BenchmarkError: The results are unknown or must not be published.
    """
    device, _, table = name.partition("/")
    records = results.read_devices(folder / device).get(device, {}) if (folder / device).is_dir() else {}
    for stem, record in records.items():
        if objections := record.find_objections():
            raise BenchmarkError(f"{device}/{stem}.json is not published: {' and '.join(objections)}; measure again")
    try:
        return f"\n{README_TABLES[table](records).markdown()}\n\n"
    except KeyError as error:
        raise BenchmarkError(f"{name}: no {error}; tables are {', '.join(README_TABLES)}") from error


# ---- plots ---------------------------------------------------------------------------------------------------------

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#332288", "#882255")  # Okabe-Ito first


class Plot(NamedTuple):
    """Describe a plot: one panel per title, with a row per bar or per point, and a column per color."""

    panels: dict[str, pd.DataFrame]
    xlabel: str
    ylabel: str = ""
    kind: Literal["barh", "line", "dots"] = "barh"

    def describe(self) -> str:
        """Return the figures of the plot as text, which its file contains."""
        return json.dumps({title: json.loads(panel.to_json(double_precision=6)) for title, panel in self.panels.items()})

    def draw(self, path: Path, dpi: int = 150) -> None:
        """Write a PNG file."""
        from matplotlib.figure import Figure

        longest = max((panel.size for panel in self.panels.values()), default=0)
        height = max(2.4, 1.4 + 0.2 * longest) if self.kind == "barh" else 4.2
        figure = Figure(figsize=(6.2 * max(1, len(self.panels)), height), layout="constrained")
        for axes, (title, panel) in zip(figure.subplots(1, max(1, len(self.panels)), squeeze=False)[0],
                                        self.panels.items(), strict=False):  # fmt: skip
            style = {"kind": "barh", "width": 0.8} if self.kind == "barh" else {"kind": "line", "marker": "o"}
            if self.kind == "dots":
                style |= {"linestyle": "none", "alpha": 0.6}
            if panel.size:
                panel.plot(ax=axes, legend=False, color=COLORS[: panel.shape[1]] * 2, **style)
            if self.kind == "barh":
                for bars in axes.containers:
                    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
                axes.axvline(1.0, color="#8c8c8c", linestyle="--", linewidth=1)
                axes.invert_yaxis()
                axes.margins(x=0.12)
            axes.set(title=title, xlabel=self.xlabel, ylabel=self.ylabel)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
        labels = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, metadata={"Description": self.describe()})


def plot_bars(frame: pd.DataFrame, by: str | list[str], directions: Sequence[str], xlabel: str) -> Plot:
    """Plot the ratios to the floor: a panel for each value of ``by``, a bar for each peer and direction."""
    panels = {}
    for title, of in frame[frame.quantity == "seconds"].groupby(by, sort=False):
        table = of.pivot(index="peer", columns="direction", values="x floor")
        panel = table.reindex(index=of.peer.unique(), columns=list(directions)).dropna()
        panels[", ".join(map(str, title)) if isinstance(title, tuple) else f"{by} {title}"] = panel
    return Plot(panels, xlabel)


def plot_methods(record: Record) -> Plot:
    """Plot the main job: every method on every model."""
    return plot_bars(load_frame(record), ["model"], (FORWARD, BOTH), "time, times the frozen floor (dashed)")


def plot_attention(record: Record) -> Plot:
    """Plot how much faster the fused kernel is than concatenation, case by case."""
    pairs = pair_attention(record, decoding=None)
    names = [name for name in ("B", "Hq", "Hkv", "N", "M", "D", "P") if name in pairs]
    pairs["case"] = pairs[names].astype(str).agg("x".join, axis=1) + pairs.causal.map({True: ", causal", False: ""})
    panels = {
        str(dtype): of.pivot(index="case", columns="direction", values="over").reindex(of.case.unique())
        for dtype, of in pairs.groupby("dtype", sort=False)
    }
    return Plot(panels, f"times faster than concatenation ({' x '.join(names)})")


def plot_lengths(frame: pd.DataFrame, by: str, x: str, fixed: dict[str, Any], direction: str) -> dict[str, pd.DataFrame]:
    """Return curves of the ratios to the floor over ``x``: a panel for each value of ``by``."""
    chosen = frame[(frame.quantity == "seconds") & (frame.direction == direction)]
    for name, value in fixed.items():
        chosen = chosen[chosen[name] == value]
    return {
        f"{title}, {direction} over {x}": of.pivot(index=x, columns="peer", values="x floor")
        for title, of in chosen.groupby(by, sort=False)
    }


def plot_models(record: Record) -> Plot:
    """Plot training steps over the length of the input and over that of the prefix."""
    frame = load_frame(record)
    first = frame.iloc[0]
    over = [plot_lengths(frame, "model", x, {y: first[y]}, "step") for x, y in (("N", "P"), ("P", "N"))]
    return Plot(over[0] | over[1], "tokens of the input (N) or of prompt and prefix (P)", "training step, x floor", "line")


def plot_embedding_lengths(record: Record) -> Plot:
    """Plot one table over the length of the input."""
    frame = load_frame(record)
    fixed = {"V": 32_128, "d": 1024, "B": 32, "r": 19, "ids": "text"}
    panels = [plot_lengths(frame, "dtype", "N", fixed, direction) for direction in (FORWARD, BOTH)]
    return Plot(panels[0] | panels[1], "tokens of a row (N)", "time, times the lookup", "line")


PLOTS: dict[str, dict[str, Callable[[Record], Plot]]] = {
    "main-job": {"": plot_methods},
    "attention": {"": plot_attention},
    "attention-dropout": {"": plot_attention},
    "embedding": {
        "": lambda record: plot_bars(
            load_frame(record).query(TEXT_CASE), ["V", "d", "dtype"], (FORWARD, BOTH), "time, times the lookup (dashed)"
        ),
        "-lengths": plot_embedding_lengths,
    },
    "shared-prompt": {"": lambda record: plot_bars(load_frame(record), "S", ("step", "prefill"), "time, times the floor")},
    "models": {"": plot_models},
}
"""The plots of each suite, by the ending of the file's name."""


# ---- report --------------------------------------------------------------------------------------------------------


def load_all(devices: dict[str, dict[str, Record]]) -> pd.DataFrame:
    """Return all rows of all results, with their environment and the least work of the operation."""
    frames = []
    for device, records in devices.items():
        for record in records.values():
            frame = load_frame(record)
            if (count := limits.COUNTS.get(record.suite)) is not None:
                seconds = frame.quantity == "seconds"
                works = [count(row) if row["quantity"] == "seconds" else None for row in record.rows]
                rates = record.settings.get("rates", {})
                frame.loc[seconds, "least_flops"] = [work.flops for work in works if work]
                frame.loc[seconds, "least_bytes"] = [work.bytes for work in works if work]
                frame.loc[seconds, "least_seconds"] = [
                    work.seconds(rates, row["dtype"]) for work, row in zip(works, record.rows, strict=True) if work
                ]
            facts = ("date", "commit", "dirty", "fastprefix", "torch", "device_name", "cpu_capability", "threads")
            about = {name: record.environment.get(name) for name in facts}
            frames.append(frame.assign(folder=device, suite=record.suite, **about))
    return pd.concat(frames, ignore_index=True)


def describe_record(name: str, record: Record) -> str:
    """Return the section of a record in the report."""
    facts = ("date", "commit", "device_name", "cpu_capability", "threads", "torch", "transformers", "peft")
    about = ", ".join(f"{fact} {record.environment.get(fact)}" for fact in facts)
    objections = [f"Do not publish: {' and '.join(found)}." for found in [record.find_objections()] if found]
    tables = [table.markdown() for table in TABLES.get(record.suite, lambda _: [])(record)]
    return "\n\n".join([f"## {name}", about, *objections, *tables, *map(describe_fault, record.faults)]) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="folders of JSON files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "report", help="folder for tables and plots")
    parser.add_argument("--readme", type=Path, help="update the tables of this file, and the plot beside the results")


def run(options: argparse.Namespace) -> int:
    """Write the report."""
    devices = results.read_devices(options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    load_all(devices).to_csv(options.out / "results.csv", index=False)
    for device, records in devices.items():
        sections = [describe_record(name, record) for name, record in records.items()]
        results.write_text("\n".join(sections), options.out / device / "report.md")
        for name, record in records.items():
            for ending, plot in PLOTS.get(record.suite, {}).items():
                plot(record).draw(options.out / device / f"{name}{ending}.png")
    if options.readme:
        update(options.readme)
        for device, records in results.read_devices(results.FOLDER).items():
            if "main_job" in records:
                plot_methods(records["main_job"]).draw(results.FOLDER / device / HEADLINE, dpi=100)
    print(f"tables and plots in {options.out}")
    return 0


def update(path: Path, check: bool = False) -> int:
    """Run cog on a file. With ``check``, only return 0 if nothing would change."""
    from cogapp import Cog
    from cogapp.cogapp import CogCheckFailed, CogUserException

    try:
        Cog().callable_main(["cog", "-e", "--check" if check else "-r", str(path)])
    except CogCheckFailed:
        return 1
    except CogUserException as error:
        raise BenchmarkError(f"{path}: {error}") from error
    return 0
