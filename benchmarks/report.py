"""Write results as tables, plots and CSV. Cog fills in the tables of the README and of the documentation."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from . import results
from .measure import BenchmarkError
from .results import FIGURES, Record, describe_fault
from .suite import DEFAULT_OUT

FACTS = ("date", "commit", "device_name", "cpu_capability", "threads", "torch", "transformers", "peft")
FORWARD, BOTH = "forward", "forward+backward"
BRIEF = ("forward, x floor", "fwd + bwd, x floor", "peak MB")
USUAL = ("trainable", *BRIEF[:2], "tokens/s", "peak MB", "loss first", "last")
FULL = ("trainable", "forward ms", BRIEF[0], "fwd + bwd ms", *USUAL[2:])
"""Columns of the table of methods."""
MISSING, NOISY = "-", "~"
NOISE = 0.15
"""Times with a larger spread, as a share of the median, are marked."""
TEXT_CASE = "B == 32 and r == 19 and ids == 'text' and N == 256"
"""The cases in the table of the embedding. The CSV file has all cases."""


class Table(NamedTuple):
    """The texts of a table. The first column is left-aligned, the other columns are right-aligned."""

    header: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        align = ("left", *["right"] * (len(self.header) - 1)) if self.rows else None
        return str(tabulate(self.rows, self.header, tablefmt="pipe", disable_numparse=True, colalign=align))


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Format a value, or mark it as missing."""
    return MISSING if value is None or pd.isna(value) else f"{value:,.{digits}f}{unit}"


def load_frame(record: Record, where: str = "index >= 0") -> pd.DataFrame:
    """Return the rows of a record with their ratios to the floor ("x floor") and the ranges of the ratios (low, high).

    A row is compared with the floor of the same case, quantity and direction. If the floor trains nothing, its forward
    pass is used.
    """
    frame = pd.DataFrame(record.rows)
    place = [name for name in frame if name not in (*FIGURES, "peer", "role", "direction")]
    figures = frame.reindex(columns=["p50", "p20", "p80"]).ffill(axis=1)  # a figure without a spread has only p50
    floors = frame[[*place, "direction"]].join(figures)[frame.role == "floor"]
    floors = floors.sort_values("p50").drop_duplicates([*place, "direction"])  # of several floors, the lowest one
    same = frame[[*place, "direction"]].merge(floors, how="left")[figures.columns]
    forward = frame[place].merge(floors[floors.direction == FORWARD], how="left", on=place)
    floor = same.fillna(forward).replace(0, np.nan)
    ratios = {"low": figures.p20 / floor.p80, "x floor": figures.p50 / floor.p50, "high": figures.p80 / floor.p20}
    return frame.assign(**ratios).query(where)


# ---- tables --------------------------------------------------------------------------------------------------------


def tabulate_methods(record: Record, model: str, columns: Sequence[str] = USUAL) -> Table:
    """Show every method of the main job on a model. Times in milliseconds are marked if they are noisy."""
    frame, rows = load_frame(record), []
    faults = [fault for fault in record.faults if fault["model"].startswith(model)]
    frame = frame[frame.model.str.startswith(model) & ~frame.peer.isin([fault["peer"] for fault in faults])]
    tokens = record.settings["models"][frame.model.iloc[0]]["tokens_per_step"]
    for peer, of_peer in frame.groupby("peer", sort=False):
        at = of_peer.set_index(["quantity", "direction"])
        forward, both = (at.loc["seconds", direction] for direction in (FORWARD, BOTH))
        losses = at.samples["loss", "held out"]
        of_forward, of_both = (describe_ratio(of, of.p50 / of["x floor"]) for of in (forward, both))
        rows.append({
            "method": peer, "trainable": number(at.p50["parameters", "training"], 0),
            "forward ms": describe_time(forward), "forward, x floor": of_forward,
            "fwd + bwd ms": describe_time(both), "fwd + bwd, x floor": of_both,
            "tokens/s": number(tokens / both.p50, 0), "peak MB": number(at.p50["bytes", BOTH] / 1e6, 1),
            "loss first": number(losses[0], 3), "last": number(losses[-1], 3),
        })  # fmt: skip
    titles = ["method", *columns]
    failed = [[fault["peer"], "FAILED", fault["message"]] for fault in faults]
    return Table(titles, [[str(row[name]) for name in ("method", *columns)] for row in rows] + failed)


def describe_ratio(row: Any, unit: float, digits: int = 2) -> str:
    """Return the median divided by a unit, and the 20th and 80th percentiles, or mark the ratio as missing."""
    if pd.isna(row.p50):
        return MISSING
    median, low, high = (number(value / unit, digits) for value in (row.p50, row.p20, row.p80))
    return f"{median} ({low} to {high})"


def describe_time(row: Any) -> str:
    """Return the median in milliseconds, with a mark if the spread is larger than ``NOISE``."""
    return NOISY * bool(measure_spread(row) > NOISE) + number(1e3 * row.p50, 1)


def measure_spread(of: Any) -> Any:
    """Return how far the 20th and 80th percentiles are from the median, as a share of it."""
    return np.maximum(of.p80 - of.p50, of.p50 - of.p20) / of.p50


def describe_rounds(records: Sequence[Record]) -> str:
    """Describe in one line how often the times of these results were measured, and how much they vary."""
    frame = pd.DataFrame([row for record in records for row in record.rows if "seconds" in row["quantity"]])
    if not {"rounds", "p20", "p80"}.issubset(frame):
        return ""
    spreads = measure_spread(frame)
    return (
        f"Medians of at least {number(frame.rounds.min(), 0)} rounds. The 20th and 80th percentiles are within "
        f"{spreads.median():.0%} of the median for half of the times, and within {spreads.max():.0%} for all.\n\n"
    ).replace("%", " %")


def summarize_attention(record: Record, peer: str = "concat", decoding: bool | None = False) -> pd.DataFrame:
    """Return the speedup of ``fused`` over a peer, and its time relative to plain SDPA scaled by the number of keys.

    The result has a row for each dtype and direction, with the geometric mean, minimum and maximum over the cases.
    """
    frame = pd.DataFrame(record.rows).query("quantity == 'seconds'")
    if decoding is not None:
        frame = frame[(frame.N == 1) == decoding]
    frame = frame.assign(kind=frame.dtype + " " + frame.direction.str.replace("+", " + "))
    case = [name for name in frame if name not in (*FIGURES, "peer", "role")]
    times = frame.pivot(index=case, columns="peer", values="p50").reset_index().dropna(subset=peer)
    times["over"] = times[peer] / times.fused
    times["share"] = times.fused / ((1 + times.P / times.M) * times.tokens)
    mean = ("mean", lambda ratios: np.exp(np.log(ratios).mean()))  # geometric
    figures = times.groupby("kind")[["over", "share"]].agg([mean, "min", "max"])
    figures.columns = pd.Index([" ".join(column) for column in figures.columns])
    return figures.reindex(kind for kind in frame.kind.unique() if kind in figures.index)


def tabulate_attention(record: Record) -> Table:
    """Show means over the shapes for each dtype and direction."""
    header = "prefix attention", "times faster than concatenation", "least", "share of plain SDPA, scaled", "most"
    figures = summarize_attention(record)[["over mean", "over min", "share mean", "share max"]]
    return Table(header, [[kind, *map(number, values)] for kind, *values in figures.itertuples()])


def tabulate_more_attention(main: Record, dropout: Record, avx2: Record, without_avx2: Record) -> Table:
    """Show decoding, compiled FlexAttention, dropout, AVX2 and x86-64 without AVX2."""
    M, P = next((row["M"], row["P"]) for row in main.rows if row["N"] == 1)
    rows = []
    for title, record, peer, decoding in (
        (f"decoding, {M} keys, P = {P}, over concatenation", main, "concat", True),
        ("over concatenation and compiled FlexAttention", main, "flex", None),
        (f"dropout {dropout.settings['dropout']}, over concatenation", dropout, "concat", False),
        ("AVX2, over concatenation", avx2, "concat", False),
        ("AVX2, decoding, over concatenation", avx2, "concat", True),
        ("without AVX2, over concatenation", without_avx2, "concat", False),
    ):
        figures = summarize_attention(record, peer, decoding)[["over mean", "over min", "over max", "share max"]]
        rows += [[f"{title}, {kind}", *map(number, values)] for kind, *values in figures.itertuples()]
    return Table(("prefix attention", "times faster", "least", "most", "share of plain SDPA, scaled: most"), rows)


def tabulate_shares(record: Record) -> Table:
    """Show the rate of ``fused`` in each case as a share of the machine's peak, measured in the same run."""
    frame = pd.DataFrame(record.rows).query("quantity == 'seconds' and peer == 'fused' and N > 1")
    hidden = frame.causal * (frame.N - 1) / 2  # average number of keys that the causal mask hides from a query
    operations = frame.direction.map({FORWARD: 4, BOTH: 14}) * frame.B * frame.Hq * frame.D * frame.N
    rates = operations * (frame.P + frame.M - hidden) / frame.p50
    frame = frame.assign(share=rates / frame.dtype.map(record.settings["peaks"]))
    frame = frame.assign(kind=frame.dtype + " " + frame.direction.str.replace("+", " + "))
    case = ["B", "Hq", "Hkv", "N", "M", "D", "P", "causal"]
    shares = frame.pivot(index=case, columns="kind", values="share").reindex(columns=frame.kind.unique())
    rows = [
        [
            "x".join(map(str, key[:6])) + f", P {key[6]}" + ", causal" * key[7],
            *(number(100 * x, 0, " %") for x in values),
        ]
        for key, *values in shares.itertuples()
    ]
    return Table(("B x Hq x Hkv x N x M x D", *shares.columns), rows)


def tabulate_plain_attention(record: Record) -> Table:
    """Show the speedup of ``fused`` over SDPA for each kind of mask, as a geometric mean over the shapes."""
    frame = load_frame(record, "quantity == 'seconds' and peer == 'fused'")
    frame = frame.assign(kind=frame.dtype + " " + frame.direction.str.replace("+", " + "), faster=1 / frame["x floor"])
    means = frame.pivot_table("faster", "mask", "kind", lambda ratios: np.exp(np.log(ratios).mean()), sort=False)
    return Table(("mask", *means.columns), [[mask, *map(number, row)] for mask, *row in means.itertuples()])


def tabulate_stores(record: Record, kind: str) -> Table:
    """Show long prefixes, or spans of a store, in units of the floor."""
    frame = load_frame(record, "quantity == 'seconds' and role != 'floor'").query("kind == @kind")
    ratios = frame.pivot_table("x floor", ["N", "M", "P", "dtype"], ["peer", "direction"], sort=False)
    header = ("queries x tokens, prefix", *(f"{peer}, {direction}" for peer, direction in ratios.columns))
    rows = [[f"{N} x {M}, {P} {dtype}", *map(number, row)] for (N, M, P, dtype), *row in ratios.itertuples()]
    return Table(header, rows)


def tabulate_embedding(record: Record) -> Table:
    """Show ADePT and its eager peer in units of the lookup, for each embedding table."""
    frame, rows = load_frame(record, f"quantity == 'seconds' and {TEXT_CASE}"), []
    for (V, d, dtype), of in frame.groupby(["V", "d", "dtype"]):
        ratios = of.set_index(["direction", "peer"])["x floor"]
        cells = (ratios.get((direction, peer)) for direction in (FORWARD, BOTH) for peer in ("adept", "adept_eager"))
        rows.append([f"{V:,} x {d:,}" + f", {dtype}" * (dtype != "float32"), *map(number, cells)])
    return Table(("table", "ADePT forward: fused", "eager", "forward + backward: fused", "eager"), rows)


def tabulate_ratios(frame: pd.DataFrame, title: str, directions: dict[str, str]) -> Table:
    """Show time and memory of every peer in units of the floor, and of the floor in milliseconds and megabytes."""
    columns = pd.MultiIndex.from_product([directions, ["seconds", "bytes"]]).drop(("decode", "bytes"), errors="ignore")
    rows = []
    for peer, of_peer in frame.groupby("peer", sort=False):
        figures = of_peer.set_index(["direction", "quantity"]).reindex(columns)
        cells = [
            describe_ratio(row, row.p50 / row["x floor"]) if of == "seconds" else number(row["x floor"])
            for (_, of), row in figures.iterrows()
        ]
        if of_peer.role.iloc[0] == "floor":
            units = {"seconds": (1e3, " ms"), "bytes": (1e-6, " MB")}
            cells = [number(units[of][0] * value, 1, units[of][1]) for (_, of), value in figures.p50.items()]
        rows.append([str(peer), *cells])
    return Table((title, *(directions[d] if of == "seconds" else "its memory" for d, of in columns)), rows)


def tabulate_shared_prompt(record: Record, S: int) -> Table:
    """Show all peers at one prompt length, in the order of the rows for the prefill, which every peer has."""
    frame = load_frame(record).query("S == @S").sort_values("direction", key=lambda of: of != "prefill", kind="stable")
    directions = {"step": "training step", "prefill": "prefill", "decode": "a token"}
    return tabulate_ratios(frame, f"{S} prompt tokens", directions)


def tabulate_visual_prompts(record: Record, P: int) -> Table:
    """Show all peers at one number of prompt tokens."""
    frame = load_frame(record).query("P == @P")
    return tabulate_ratios(frame, f"{P} prompt tokens per layer", {"step": "training step", "inference": "inference"})


def select_model(record: Record, model: str) -> pd.DataFrame:
    """Return the rows of one model at the lengths that were measured first."""
    frame = load_frame(record).query("model == @model")
    return frame[(frame.N.iloc[0] == frame.N) & (frame.P.iloc[0] == frame.P)]


def tabulate_model(record: Record, model: str) -> Table:
    """Show time, memory and training rate of all peers on one model."""
    frame = select_model(record, model)
    batch = frame["rows"].iloc[0]
    title = f"{model}, {batch} x {frame.N.iloc[0]} tokens, P = {frame.P.iloc[0]}"
    header, rows = tabulate_ratios(frame, title, {"step": "training step", "inference": "inference"})
    seconds = frame.query("quantity == 'seconds' and direction == 'step'").set_index("peer").p50
    return Table((*header, "rows/s trained"), [[*row, number(batch / seconds.get(row[0], np.nan), 1)] for row in rows])


def tabulate_cartridge(record: Record) -> Table:
    """Show how well a document in context is replaced by nothing, by an untrained prefix, and by a trained one."""
    names = {"no document": "no document", "untrained": "text, untrained", "trained": "trained"}
    header = ("P", *(f"KL, {title}" for title in names.values()), "gap closed", "loss, no document", "in context",
              "trained", "MB", "MB of the document", "tokens/s")  # fmt: skip
    rows = []
    for P, of in pd.DataFrame(record.rows).groupby("P", sort=False):
        at = of.drop_duplicates(["quantity", "peer"]).set_index(["quantity", "peer"]).p50
        divergences = [at["kl", peer] for peer in names]
        losses = [at["loss", peer] for peer in ("no document", "document in context", "trained")]
        sizes = [number(at["bytes", peer] / 1e6, 1) for peer in ("trained", "document in context")]
        closed = number(100 * (1 - divergences[-1] / divergences[0]), 0, " %")
        speed = number(at.get(("tokens/s", "trained")), 0)
        rows.append([str(P), *map(number, divergences), closed, *map(number, losses), *sizes, speed])
    return Table(header, rows)


def tabulate_long_prefixes(record: Record) -> Table:
    """Show time and memory of every peer with long prefixes, and the ratios to PEFT's cartridge."""
    header, rows = ("direction, P, type", "peer", "ms", "x floor", "x PEFT", "peak MB", "x PEFT"), []
    for key, of in load_frame(record).groupby(["direction", "P", "dtype"], sort=False):
        at = of.set_index(["quantity", "peer"])
        for peer in dict.fromkeys(of.peer):
            cells = []
            for quantity, unit in (("seconds", 1e3), ("bytes", 1e-6)):
                own, theirs = at.p50.get((quantity, peer)), at.p50.get((quantity, "PEFT cartridge"))
                ratio = number(own and theirs and own / theirs)
                if quantity == "seconds" and own and theirs:
                    ratio = describe_ratio(at.loc[quantity, peer], theirs)
                cells += [number(own and unit * own, 1), ratio]
            floor = number(at["x floor"].get(("seconds", peer)))
            rows.append([", ".join(map(str, key)), peer, cells[0], floor, *cells[1:]])
    return Table(header, rows)


def tabulate_many_adapters(record: Record, *others: Record) -> Table:
    """Show the times of all peers in units of the model without adapters, or of a copy of the same size.

    Times in ``others`` are in units of the model in their own environments.
    """
    header, rows = ("case", "peer", "ms", "x no adapter"), []
    for each in (record, *others):
        frame = load_frame(each, "quantity == 'seconds'")
        for (kind, dtype), of in frame.groupby(["kind", "dtype"], sort=False):
            at = of.set_index("peer")
            unit = at.p50.get("base", at.p50.get("copy"))
            for peer, row in at.iterrows():
                if each is record or peer != "base":
                    rows.append([f"{kind}, {dtype}", peer, number(1e3 * row.p50, 1), describe_ratio(row, unit)])
    return Table(header, sorted(rows, key=lambda row: row[0]))


def tabulate_host_times(*records: Record) -> Table:
    """Show the time of calls on the host for each version of Triton, and how many Python functions they run."""
    header, columns = ["call"], []
    for record in records:
        at = pd.DataFrame(record.rows).set_index(["direction", "quantity"])
        times = at.xs("seconds", level="quantity")
        header.append(f"Triton {record.environment['triton']}, us")
        columns.append({name: describe_ratio(row, 1e-6, 0) for name, row in times.iterrows()})
    functions = at.p50.xs("functions", level="quantity")
    rows = [[name, *(column[name] for column in columns), number(count, 0)] for name, count in functions.items()]
    return Table((*header, "Python functions"), rows)


def tabulate_gpu(record: Record) -> Table:
    """Show the fastest kernels for prefix attention on a GPU, and ratios to the fastest concatenation and floor."""
    titles = ("ms", "by", "x faster", "x tokens")
    header = ("B x Hq x Hkv x N x M x D", *(f"{name} {title}" for name in (FORWARD, "fwd + bwd") for title in titles))
    frame = pd.DataFrame([row for row in record.rows if row["quantity"] == "seconds" and "gate" in row])
    keys, rows = ["B", "Hq", "Hkv", "N", "M", "D", "P", "gate", "causal"], []
    for key, of_case in frame.groupby(keys, sort=False) if len(frame) else ():
        *sizes, P, gate, causal = key
        cells = []
        for direction in (FORWARD, BOTH):
            times = of_case[of_case.direction == direction]
            least = times.groupby("role").p50.min().reindex(["ours", "theirs", "floor"])
            fastest = times[times.p50 == least.ours].peer
            cells += [number(1e3 * least.ours, 2), MISSING if fastest.empty else fastest.iloc[0]]
            cells += [number(least.theirs / least.ours), number(least.ours / least.floor)]
        kind = "" if gate == "none" else f", {gate}"
        rows.append([f"{'x'.join(map(str, sizes))}, P {P}{kind}{', causal' * causal}", *cells])
    return Table(header, rows)


def tabulate_gpu_embedding(record: Record) -> Table:
    """Show the time of the kernels of each prompt's embedding in units of a lookup of the same tokens."""
    frame = pd.DataFrame([row for row in record.rows if row["quantity"] == "kernel seconds" and "method" in row])
    rows = []
    for (V, d, method), of in frame.groupby(["V", "d", "method"], sort=False) if len(frame) else ():
        sums = of.groupby(["peer", "direction"]).p50.sum()
        lookup = sums["lookup", FORWARD]
        cells = [number(sums[method, direction] / lookup) for direction in (FORWARD, BOTH)]
        rows.append([f"{V:,} x {d:,}, {method}", number(1e6 * lookup, 1), *cells])
    return Table(("table, method", "lookup, us", "forward", "forward + backward"), rows)


def tabulate_gpu_tiles(record: Record) -> Table:
    """Show, for each kernel, the tile of the table when it was measured, and the fastest one."""
    frame = pd.DataFrame([row for row in record.rows if row.get("stage") == "tiles"])
    if frame.empty:
        return Table((), [])
    case = ["B", "Hq", "Hkv", "N", "M", "D", "P", "gate", "causal"]
    frame = frame.assign(kernel=frame.peer.str.replace(r" (table|\d+x\d+x\d+ w\d+ s\d+)$", "", regex=True))
    rows = []
    for key, of in frame.groupby([*case, "kernel"], sort=False):
        table, best = of[of.peer.str.endswith(" table")].p50.min(), of.loc[of.p50.idxmin()]
        name = "that of the table" if best.peer.endswith(" table") else best.peer.removeprefix(f"{key[-1]} ")
        about = f"{key[-1]}, {'x'.join(map(str, key[:6]))}"
        rows.append([about, number(1e6 * table, 0), number(1e6 * best.p50, 0), name, str(len(of) - 1)])
    return Table(("kernel, B x Hq x Hkv x N x M x D", "before, us", "fastest, us", "fastest tile", "tiles"), rows)


def tabulate_gpu_methods(record: Record) -> Table:
    """Show the time and the memory of training steps of a model on a GPU."""
    frame = load_frame(record, "direction == 'step'")
    figures = frame.set_index(["peer", "quantity"])
    rows = []
    for peer in frame[frame.quantity == "seconds"].peer:
        seconds, held = figures.loc[(peer, "seconds")], figures.loc[(peer, "bytes")]
        spread = f"{1e3 * seconds.p20:.0f} to {1e3 * seconds.p80:.0f}"
        ratio = number(seconds["x floor"])
        rows.append([peer, f"{1e3 * seconds.p50:.0f} ({spread})", ratio, number(held.p50 / 1e9, 2)])
    return Table(("method", "ms per step", "x frozen", "peak GB"), rows)


TABLES: dict[str, tuple[Callable[..., Table], str | None]] = {
    "main-job": (tabulate_methods, "model"),
    "attention": (tabulate_attention, None),
    "attention-dropout": (tabulate_attention, None),
    "plain-attention": (tabulate_plain_attention, None),
    "stores": (tabulate_stores, "kind"),
    "embedding": (tabulate_embedding, None),
    "shared-prompt": (tabulate_shared_prompt, "S"),
    "visual-prompts": (tabulate_visual_prompts, "P"),
    "models": (tabulate_model, "model"),
    "long-prefixes": (tabulate_long_prefixes, None),
    "many-adapters": (tabulate_many_adapters, None),
    "cartridge": (tabulate_cartridge, None),
    "host-times": (tabulate_host_times, None),
    "gpu": (tabulate_gpu, None),
    "gpu-tiles": (tabulate_gpu_embedding, None),
}
"""The table function of each suite, and the column for each of whose values it makes a table."""


def describe_record(name: str, record: Record) -> str:
    """Return the section of a record: the environment, reasons against publication, the tables and the faults."""
    (table, column), facts = TABLES[record.suite], ", ".join(f"{of} {record.environment.get(of)}" for of in FACTS)
    values = dict.fromkeys((row[column],) for row in record.rows) if column else [()]
    objections = [f"Not to be published: {objection}." for objection in record.find_objections()]
    tables = [table(record, *value) for value in values]
    tables += [tabulate_shares(record)] if record.settings.get("peaks") else []
    tables += [tabulate_gpu_tiles(record), tabulate_gpu_methods(record)] if record.suite.startswith("gpu") else []
    texts = [*(table.markdown() for table in tables if table.rows), describe_rounds([record]).strip()]
    return "\n\n".join([f"## {name}", facts, *objections, *filter(None, texts), *map(describe_fault, record.faults)])


def publish(device: str, table: Callable[..., Table], stems: str, *more: Any, folder: Path = results.FOLDER) -> str:
    """Return a table and the spread of its times for cog, from one or more files of results of a device.

    ``more`` are arguments of ``table``.

    Raises:
        BenchmarkError: the results must not be published.
    """
    records = [results.read(folder / device / f"{stem}.json") for stem in stems.split()]
    for record in records:
        if objections := record.find_objections():
            raise BenchmarkError(f"{device}, {record.suite}: must not be published, because {' and '.join(objections)}")
    return f"\n{table(*records, *more).markdown()}\n\n{describe_rounds(records)}"


def select_times(record: Record) -> pd.DataFrame:
    """Return the times of the main job in units of the floor, with a row for each peer."""
    frame = load_frame(record, "quantity == 'seconds'")
    times = frame.pivot(index="peer", columns=["model", "direction"], values="x floor").reindex(frame.peer.unique())
    return times.set_axis([", ".join(column) for column in times.columns], axis="columns")


def draw(record: Record, path: Path) -> None:
    """Draw the times of the main job as bars. The metadata of the image contains them as JSON."""
    times = select_times(record)
    axes = times.plot.barh(figsize=(9, 1 + 0.9 * len(times)), width=0.8, xlabel="time, times the floor", ylabel="")
    for container in axes.containers:
        axes.bar_label(container, fmt="%.2f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, bbox_inches="tight", metadata={"Description": times.to_json(double_precision=6)})


# ---- report --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="folder of results")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "report", help="folder for tables, CSV and plots")
    text = "fill in the tables in these files, and draw the plot next to the results"
    parser.add_argument("--update", type=Path, nargs="+", default=[], metavar="FILE", help=text)


def run(options: argparse.Namespace) -> int:
    frames, sections = [], []
    for path, record in results.read_all(options.results):
        about = {fact: record.environment.get(fact) for fact in FACTS}
        frames.append(load_frame(record).assign(folder=path.parent.name, file=path.stem, **about))
        sections.append(describe_record(f"{path.parent.name}/{path.stem}", record))
        if record.suite == "main-job":
            draw(record, (path.parent if options.update else options.out) / "headline.png")
    results.write_text("\n\n".join(sections) + "\n", options.out / "report.md")
    pd.concat(frames, ignore_index=True).to_csv(options.out / "results.csv", index=False)
    print(f"tables and plots in {options.out}")
    return max(map(update, options.update), default=0)


def update(path: Path, check: bool = False) -> int:
    """Fill in the tables in a file with cog, or check that nothing would change. Return cog's exit status."""
    from cogapp import Cog

    return int(Cog().main(["cog", "-e", "--check" if check else "-r", str(path)]))
