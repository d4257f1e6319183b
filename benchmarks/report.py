"""Results as tables, plots and CSV. The tables of the README are filled in with cog."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from . import results
from .measure import BenchmarkError
from .results import FIGURES, Record, describe_fault
from .suite import DEFAULT_OUT

DESCRIPTION = "Write results as tables (Markdown, CSV) and plots (PNG). With --readme, update the tables of a file."
FACTS = ("date", "commit", "device_name", "cpu_capability", "threads", "torch", "transformers", "peft")
FORWARD, BOTH = "forward", "forward+backward"
MISSING, NOISY = "-", "~"
NOISE = 0.15
"""Mark times whose spread is a larger share of the median."""
TEXT_SETTING = "B == 32 and r == 19 and ids == 'text'"
TEXT_CASE = f"{TEXT_SETTING} and N == 256"
"""The cases of the embedding's table and plot. The CSV file has all cases."""


class Table(NamedTuple):
    """Hold the texts of a table: the first column is aligned to the left, the others to the right."""

    header: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [row + [""] * (len(self.header) - len(row)) for row in self.rows]  # a failure has fewer cells
        align = ("left", *["right"] * (len(self.header) - 1))
        options = {"tablefmt": "pipe", "disable_numparse": True, "colalign": align if rows else None}
        return str(tabulate(rows, self.header, **options))


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Format a value, or mark it as missing."""
    return MISSING if value is None or pd.isna(value) else f"{value:,.{digits}f}{unit}"


def geometric_mean(values: Any) -> float:
    return float(np.exp(np.log(values).mean()))


def load_frame(record: Record) -> pd.DataFrame:
    """Return the rows of a record with their ratios to the floor, and the range of these: low, x floor, high.

    The floor is that of the same case, quantity and direction; where it trains nothing, that of the forward pass.
    """
    frame = pd.DataFrame(record.rows)
    place = [name for name in frame if name not in (*FIGURES, "peer", "role", "direction")]
    figures = frame.reindex(columns=["p50", "p20", "p80"])
    figures = figures.assign(p20=figures.p20.fillna(figures.p50), p80=figures.p80.fillna(figures.p50))
    floors = figures.assign(**frame[[*place, "direction"]])[frame.role == "floor"]
    same = frame[[*place, "direction"]].merge(floors, how="left", on=[*place, "direction"])
    forward = frame[place].merge(floors[floors.direction == FORWARD], how="left", on=place)
    floor = same[["p50", "p20", "p80"]].fillna(forward).replace(0, np.nan)
    ratios = {"low": figures.p20 / floor.p80, "x floor": figures.p50 / floor.p50, "high": figures.p80 / floor.p20}
    return frame.assign(**ratios)


# ---- tables --------------------------------------------------------------------------------------------------------


def tabulate_methods(record: Record, model: str, in_detail: bool = False) -> Table:
    """Show every method of the main job on a model. In detail: with milliseconds, and with marks of noise."""
    frame = load_frame(record)
    frame = frame[frame.model.str.startswith(model)]
    tokens = record.settings["models"][frame.model.iloc[0]]["tokens_per_step"]
    at, floor, rows = frame.set_index(["peer", "quantity", "direction"]), frame.peer[frame.role == "floor"].iloc[0], []
    for peer in frame.peer.unique():
        cells = []
        for direction in (FORWARD, BOTH):
            time, of_floor = (at.loc[(name, "seconds", direction)] for name in (peer, floor))
            cells += [NOISY * is_noisy(time) + number(1e3 * time.p50, 1)] * in_detail
            cells += [NOISY * (in_detail and (is_noisy(time) or is_noisy(of_floor))) + number(time["x floor"])]
        rows.append([
            peer, number(at.p50[peer, "parameters", "training"], 0), *cells,
            number(tokens / at.p50[peer, "seconds", BOTH], 0), number(at.p50[peer, "bytes", BOTH] / 1e6, 1),
            *(number(at.samples[peer, "loss", "held out"][i], 3) for i in (0, -1)),
        ])  # fmt: skip
    rows += [[fault["peer"], "FAILED", fault["message"]] for fault in record.faults if fault["model"].startswith(model)]
    times = ["forward, x floor", "fwd + bwd, x floor"]
    if in_detail:
        times = ["forward ms", "x floor", "fwd + bwd ms", "x floor"]
    return Table(("method", "trainable", *times, "tokens/s", "peak MB", "loss first", "last"), rows)


def is_noisy(row: Any) -> bool:
    """Return whether a time spreads further than ``NOISE``."""
    return bool(max(row.p80 - row.p50, row.p50 - row.p20) > NOISE * row.p50)


def summarize_attention(record: Record, peer: str = "concat", decoding: bool | None = False) -> pd.DataFrame:
    """Return how much faster ``fused`` is than a peer, and its time as a share of scaled plain SDPA.

    There is a row for each type and direction, with means over the cases.
    """
    frame = pd.DataFrame(record.rows).query("quantity == 'seconds'")
    if decoding is not None:
        frame = frame[(frame.N == 1) == decoding]
    frame = frame.assign(kind=frame.dtype + " " + frame.direction.str.replace("+", " + "))
    case = [name for name in frame if name not in (*FIGURES, "peer", "role")]
    times = frame.pivot(index=case, columns="peer", values="p50").reset_index().dropna(subset=peer)
    times["over"] = times[peer] / times.fused
    times["share"] = times.fused / ((1 + times.P / times.M) * times.tokens)
    means = times.groupby("kind").agg(
        over=("over", geometric_mean),
        least=("over", "min"),
        most=("over", "max"),
        share=("share", geometric_mean),
        most_share=("share", "max"),
    )
    return means.reindex(kind for kind in frame.kind.unique() if kind in means.index)


def tabulate_attention(record: Record) -> Table:
    """Show means over the shapes, for each type and direction."""
    header = "prefix attention", "times faster than concatenation", "least", "share of plain SDPA, scaled", "most"
    figures = summarize_attention(record)[["over", "least", "share", "most_share"]]
    return Table(header, [[kind, *map(number, values)] for kind, *values in figures.itertuples()])


def tabulate_more_attention(records: dict[str, Record]) -> Table:
    """Show decoding, compiled FlexAttention, dropout and AVX2."""
    main, dropout, rows = records["attention"], records["attention_dropout"], []
    M, P = next((row["M"], row["P"]) for row in main.rows if row["N"] == 1)
    for title, record, peer, decoding in (
        (f"decoding, {M} keys, P = {P}, over concatenation", main, "concat", True),
        ("over concatenation and compiled FlexAttention", main, "flex", None),
        (f"dropout {dropout.settings['dropout']}, over concatenation", dropout, "concat", False),
        ("AVX2 alone, over concatenation", records["attention_avx2"], "concat", False),
    ):
        figures = summarize_attention(record, peer, decoding)[["over", "least", "most", "most_share"]]
        rows += [[f"{title}, {kind}", *map(number, values)] for kind, *values in figures.itertuples()]
    return Table(("prefix attention", "times faster", "least", "most", "share of plain SDPA, scaled: most"), rows)


def tabulate_embedding(record: Record) -> Table:
    """Show ADePT and its eager peer in units of the lookup, for each embedding table."""
    frame, rows = load_frame(record).query(f"quantity == 'seconds' and {TEXT_CASE}"), []
    for (V, d, dtype), of in frame.groupby(["V", "d", "dtype"]):
        ratios = of.set_index(["direction", "peer"])["x floor"]
        cells = (ratios.get((direction, peer)) for direction in (FORWARD, BOTH) for peer in ("adept", "adept_eager"))
        rows.append([f"{V:,} x {d:,}" + f", {dtype}" * (dtype != "float32"), *map(number, cells)])
    return Table(("table", "ADePT forward: fused", "eager", "forward + backward: fused", "eager"), rows)


def tabulate_ratios(frame: pd.DataFrame, title: str, directions: dict[str, str]) -> Table:
    """Show time and memory of every peer in units of the floor, and of the floor in its own units."""
    at, rows = frame.set_index(["peer", "direction", "quantity"]), []
    columns = {(direction, "seconds"): name for direction, name in directions.items()}
    columns |= {(direction, "bytes"): "its memory" for direction in directions if direction != "decode"}
    order = sorted(columns, key=lambda column: list(directions).index(column[0]))
    for peer, role in frame[["peer", "role"]].drop_duplicates().itertuples(index=False):
        figures = at.loc[peer].reindex(order)
        cells = [number(ratio) for ratio in figures["x floor"]]
        if role == "floor":
            units = {"seconds": (1e3, " ms"), "bytes": (1e-6, " MB")}
            cells = [number(units[of][0] * figures.p50[_, of], 1, units[of][1]) for _, of in order]
        rows.append([peer, *cells])
    return Table((title, *(columns[column] for column in order)), rows)


def tabulate_shared_prompt(record: Record, S: int) -> Table:
    frame = load_frame(record).query("S == @S")
    # All peers have a prefill; a merged one has no training step. The order of the prefills is that of the peers.
    frame = frame.set_index("peer", drop=False).loc[frame[frame.direction == "prefill"].peer.unique()]
    directions = {"step": "training step", "prefill": "prefill", "decode": "a token"}
    return tabulate_ratios(frame.reset_index(drop=True), f"{S} prompt tokens", directions)


def select_model(record: Record, model: str) -> pd.DataFrame:
    """Return the rows of one whole model at the lengths that were measured first."""
    frame = load_frame(record).query("model == @model")
    return frame[(frame.N.iloc[0] == frame.N) & (frame.P.iloc[0] == frame.P)]


def tabulate_model(record: Record, model: str) -> Table:
    frame = select_model(record, model)
    batch = frame["rows"].iloc[0]
    title = f"{model}, {batch} x {frame.N.iloc[0]} tokens, P = {frame.P.iloc[0]}"
    header, rows = tabulate_ratios(frame, title, {"step": "training step", "inference": "inference"})
    seconds = frame.query("quantity == 'seconds' and direction == 'step'").set_index("peer").p50
    return Table((*header, "rows/s trained"), [[*row, number(batch / seconds.get(row[0], np.nan), 1)] for row in rows])


def tabulate_saved(record: Record) -> Table:
    """Show what three epochs over as many rows as SST-2 has cost here and with PEFT."""
    epochs, count, model = 3, 67_349, record.rows[-1]["model"]
    frame = select_model(record, model).query("direction == 'step'")
    at, steps, rows = frame.set_index(["peer", "quantity"]).p50, epochs * count / frame["rows"].iloc[0], []
    for peers in (("PT", "PEFT PT"), ("prefix tuning", "PEFT prefix tuning")):
        hours = [number(steps * at[peer, "seconds"] / 3600, 1) for peer in peers]
        rows.append([peers[0], *hours, *(number(at[peer, "bytes"] / 1e6, 0) for peer in peers)])
    return Table((f"{epochs} x {count:,} rows, {model}", "hours", "with PEFT", "MB", "with PEFT"), rows)


def tabulate_gpu(record: Record) -> Table:
    """Show the times of prefix attention on a GPU, its rate, and the ratios to the best peer and the best floor."""
    header, rows = ("B x Hq x Hkv x N x M x D", "ms", "TFLOP/s", "x faster than the best peer", "x floor"), []
    cases = [row for row in record.rows if row["quantity"] == "seconds" and "gate" in row]
    keys = ["direction", "B", "Hq", "Hkv", "N", "M", "D", "P", "gate", "causal"]
    for key, of in pd.DataFrame(cases).groupby(keys, sort=False) if cases else ():
        direction, B, Hq, _, N, M, D, P, gate, causal = key
        best = of.groupby("role").p50.min().reindex(["ours", "theirs", "floor"])
        flops = (4 if direction == FORWARD else 14) * B * Hq * D * N * (P + M - (N / 2 if causal else 0))
        title = f"{direction}, {'x'.join(map(str, key[1:7]))}, P {P}, {gate}{', causal' * causal}"
        ratios = (best.theirs / best.ours, best.ours / best.floor)
        rows.append([title, number(1e3 * best.ours, 3), number(flops / best.ours / 1e12, 0), *map(number, ratios)])
    return Table(header, rows)


def tabulate_each(table: Callable[[Record, Any], Table], column: str) -> Callable[[Record], list[Table]]:
    return lambda record: [table(record, value) for value in dict.fromkeys(row[column] for row in record.rows)]


TABLES: dict[str, Callable[[Record], list[Table]]] = {
    "main-job": tabulate_each(partial(tabulate_methods, in_detail=True), "model"),
    "attention": lambda record: [tabulate_attention(record)],
    "attention-dropout": lambda record: [tabulate_attention(record)],
    "embedding": lambda record: [tabulate_embedding(record)],
    "shared-prompt": tabulate_each(tabulate_shared_prompt, "S"),
    "models": tabulate_each(tabulate_model, "model"),
    "adapterhub": tabulate_each(tabulate_model, "model"),
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
    """Return a table of results for cog, by ``DEVICE/TABLE``.

    Raises:
        BenchmarkError: The table is unknown, or the results must not be published.
    """
    device, _, table = name.partition("/")
    records = results.read_devices(folder / device).get(device, {})
    for stem, record in records.items():
        if objections := record.find_objections():
            raise BenchmarkError(f"{device}/{stem}.json is not published: {' and '.join(objections)}; measure again")
    try:
        return f"\n{README_TABLES[table](records).markdown()}\n\n"
    except KeyError as error:
        raise BenchmarkError(f"{name}: no {error}; tables are {', '.join(README_TABLES)}") from error


# ---- plots ---------------------------------------------------------------------------------------------------------

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#332288", "#882255"]  # Okabe-Ito first


@dataclass(frozen=True)
class Plot:
    """Select ratios to the floor: a panel for each value of ``by``, and in it a table of an index and columns."""

    by: str
    index: str
    columns: str
    directions: Sequence[str]
    where: str = "index >= 0"

    def panels(self, record: Record) -> dict[str, pd.DataFrame]:
        """Return the tables by the titles of their panels, with peers in the order of the record."""
        frame, panels = load_frame(record).query(f"quantity == 'seconds' and {self.where}"), {}
        for value, of in frame[frame.direction.isin(self.directions)].groupby(self.by, sort=False):
            table = of.pivot(index=self.index, columns=self.columns, values="x floor")
            if self.index == "peer":
                table = table.reindex(of.peer.unique())[list(self.directions)].dropna()
            panels[value if isinstance(value, str) else f"{self.by} {value}"] = table
        return panels

    def draw(self, record: Record, path: Path, dpi: int = 150) -> None:
        """Write the plot: bars for peers, lines over lengths."""
        if self.index == "peer":
            draw_panels(self.panels(record), path, "time, times the floor (dashed)", kind="barh", dpi=dpi)
        else:
            draw_panels(self.panels(record), path, self.index, f"{self.directions[0]}, x floor", dpi=dpi)


def describe_panels(panels: dict[str, pd.DataFrame]) -> str:
    """Return the figures of a plot as text, which its file contains."""
    return json.dumps({title: json.loads(panel.to_json(double_precision=6)) for title, panel in panels.items()})


def draw_panels(
    panels: dict[str, pd.DataFrame],
    path: Path,
    xlabel: str,
    ylabel: str = "",
    kind: Literal["barh", "line"] = "line",
    dpi: int = 150,
) -> None:
    """Draw a panel for each title. An index is a bar or a point, and a column is a color."""
    from matplotlib.figure import Figure

    bars, count = kind == "barh", max(1, len(panels))
    height = 1.4 + 0.2 * max((panel.size for panel in panels.values()), default=5) if bars else 4.2
    figure: Any = Figure(figsize=(6.2 * count, max(2.4, height)), layout="constrained")
    all_axes = figure.subplots(1, count, squeeze=False)[0]
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=False):
        style: dict[str, Any] = {"width": 0.8} if bars else {"marker": "o"}
        if panel.size:
            panel.plot(ax=axes, kind=kind, legend=False, color=COLORS * 4, **style)
        if bars:
            for container in axes.containers:
                axes.bar_label(container, fmt="%.2f", padding=3, fontsize=8)
            axes.axvline(1.0, color="gray", linestyle="--", linewidth=1)
            axes.invert_yaxis()
            axes.margins(x=0.12)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    labels = {label: h for axes in all_axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Description": describe_panels(panels)})


PLOTS = {
    "main-job": {"": Plot("model", "peer", "direction", (FORWARD, BOTH))},
    "embedding": {
        "": Plot("V", "peer", "direction", (FORWARD, BOTH), TEXT_CASE),
        "_lengths": Plot("dtype", "N", "peer", (BOTH,), f"{TEXT_SETTING} and V == 32128"),
    },
    "shared-prompt": {"": Plot("S", "peer", "direction", ("step", "prefill"))},
    "models": {
        "_lengths": Plot("model", "N", "peer", ("step",), "P == P.iloc[0]"),
        "_prefixes": Plot("model", "P", "peer", ("step",), "N == N.iloc[0]"),
    },
}
"""The plots of each suite, by the ending of the file's name."""


# ---- report --------------------------------------------------------------------------------------------------------


def describe_record(name: str, record: Record) -> str:
    """Return the section of a record in the report."""
    about = ", ".join(f"{fact} {record.environment.get(fact)}" for fact in FACTS)
    objections = [f"Not to be published: {' and '.join(found)}." for found in [record.find_objections()] if found]
    faults = map(describe_fault, record.faults)
    return "\n\n".join([f"## {name}", about, *objections, *list_tables(record), *faults]) + "\n"


def list_tables(record: Record) -> list[str]:
    """Return the tables of a record."""
    return [table.markdown() for table in TABLES[record.suite](record)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="folders of JSON files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "report", help="folder for tables and plots")
    parser.add_argument("--readme", type=Path, help="update the tables of this file, and the plot beside the results")


def run(options: argparse.Namespace) -> int:
    frames = []
    for device, records in results.read_devices(options.results).items():
        sections = []
        for name, record in records.items():
            about = {fact: record.environment.get(fact) for fact in FACTS}
            frames.append(load_frame(record).assign(folder=device, file=name, **about))
            sections.append(describe_record(name, record))
            for ending, plot in PLOTS.get(record.suite, {}).items():
                plot.draw(record, options.out / device / f"{name}{ending}.png")
            if options.readme and record.suite == "main-job":
                PLOTS["main-job"][""].draw(record, options.results / device / "headline.png", dpi=100)
        results.write_text("\n".join(sections), options.out / device / "report.md")
    pd.concat(frames, ignore_index=True).to_csv(options.out / "results.csv", index=False)
    if options.readme:
        update(options.readme)
    print(f"tables and plots in {options.out}")
    return 0


def update(path: Path, check: bool = False) -> bool:
    """Fill in the tables of a file with cog. With ``check``, only return whether nothing would change."""
    from cogapp import Cog
    from cogapp.cogapp import CogCheckFailed, CogUserException

    try:
        cog: Any = Cog()
        cog.callable_main(["cog", "-e", "--check" if check else "-r", str(path)])
    except CogCheckFailed:
        return False
    except CogUserException as error:
        raise BenchmarkError(f"{path}: {error}") from error
    return True
