"""What is told of results: tables and sentences, all computed from cells."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from . import floors
from .report import MISSING, number, table
from .results import Case, Cell, Device, Fault, Quantity, Run, Value

DIRECTIONS = ("forward", "forward+backward")
EMBEDDING_CASE: dict[str, Value] = {"B": 32, "N": 256, "r": 19, "ids": "text"}
"""The cases of the embedding's summary; the rest is in the table of all cells."""


@dataclass(frozen=True)
class Table:
    """Texts, the first column's to the left and the others' to the right."""

    header: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """For a file, or a terminal."""
        return table(self.header, self.rows)


def line(cells: list[Cell]) -> str:
    """One case for the terminal: a line a direction, every competitor's time as a multiple of the floor's."""
    run = Run("", {}, {}, cells)
    lines = [case_text(cells[0].case)] if cells else []
    for direction in dict.fromkeys(cell.direction for cell in cells):
        timed = run.select(direction=direction)
        ratios = "  ".join(f"{cell.competitor} {number(run.times_floor(cell), 2)}" for cell in timed)
        floor = run.floor_of(timed[0]) if timed else None
        lines.append(f"  {direction:17} floor {number(1e3 * floor.p50 if floor else None, 3)} ms; x floor: {ratios}")
    return "\n".join(lines)


def case_text(case: Case) -> str:
    """A case's parameters in a line."""

    def text(name: str, value: Value) -> str:
        if isinstance(value, bool):
            return name if value else f"not {name}"
        return value if isinstance(value, str) else f"{name} {value:.10g}"

    return ", ".join(text(name, value) for name, value in case.items())


def table_text(case: Case) -> str:
    """The table of an embedding's case; float32 goes without saying."""
    return f"{case['V']:,} x {case['d']:,}" + ("" if case["dtype"] == "float32" else f", {case['dtype']}")


def fault_text(fault: Fault) -> str:
    """A competitor's failure in a line."""
    return f"{fault.competitor}, {case_text(fault.case)}: FAILED in {fault.failure.stage}: {fault.failure.message}"


def main_job(run: Run, model: str) -> Table:
    """Every method on the model whose title begins so."""
    header = (
        "method",
        "trainable",
        "forward, x floor",
        "fwd + bwd, x floor",
        "tokens/s",
        "peak MB",
        "loss first",
        "last",
    )
    cells = [cell for cell in run.cells if str(cell.case["model"]).startswith(model)]
    of_model = Run(run.suite, run.environment, run.settings, cells)
    failed = {fault.competitor: fault for fault in run.faults if str(fault.case["model"]).startswith(model)}
    methods = dict.fromkeys([*(cell.competitor for cell in cells), *failed])
    rows = [[name, fault_text(failed[name])] if name in failed else _method(of_model, name) for name in methods]
    return Table(header, rows)


def _method(run: Run, name: str) -> list[str]:
    forward, step = (run.one(competitor=name, direction=direction) for direction in DIRECTIONS)

    def figure(quantity: Quantity, direction: str) -> float:
        return run.one(quantity, competitor=name, direction=direction).p50

    return [
        name,
        number(figure("parameters", "training"), 0),
        number(run.times_floor(forward), 2),
        number(run.times_floor(step), 2),
        number(float(step.case["tokens"]) / step.p50, 0),
        number(figure("bytes", "forward+backward") / 1e6),
        number(figure("loss", "before training"), 3),
        number(figure("loss", "after training"), 3),
    ]


@dataclass(frozen=True)
class Speed:
    """Fused attention in one case: times faster than concatenation, and its time as a share of SDPA's, scaled."""

    over_concat: float
    of_tokens: float


def speeds(run: Run, dtype: str, direction: str, decoding: bool = False) -> list[Speed]:
    """Of every case; those of a single query are decoding."""
    found = []
    for fused in run.select(competitor="fused", direction=direction, dtype=dtype):
        case, concat, tokens = fused.case, run.beside(fused, "concat"), run.floor_of(fused)
        if (case["N"] == 1) == decoding and concat and tokens:
            scale = 1 + float(case["P"]) / float(case["M"])
            found.append(Speed(concat.p50 / fused.p50, fused.p50 / (scale * tokens.p50)))
    return found


def attention(run: Run) -> Table:
    """Means over the shapes, for each type and direction."""
    header = ("prefix attention", "times faster than concatenation", "least", "share of plain SDPA, scaled", "most")
    rows = []
    for dtype in dict.fromkeys(str(cell.case["dtype"]) for cell in run.cells):
        for direction in DIRECTIONS:
            of = speeds(run, dtype, direction)
            over, share = [speed.over_concat for speed in of], [speed.of_tokens for speed in of]
            if of:
                figures = (geometric_mean(over), min(over), geometric_mean(share), max(share))
                rows.append([f"{dtype} {spaced(direction)}", *(number(figure, 2) for figure in figures)])
    return Table(header, rows)


def embedding(run: Run) -> Table:
    """ADePT and its eager peer, in units of the lookup, for each table of the summary's cases."""
    header = ("table", "ADePT forward: fused", "eager", "forward + backward: fused", "eager")
    rows = []
    for floor in run.select(case=EMBEDDING_CASE, role="floor"):
        cells = [
            run.beside(replace(floor, direction=direction), name)
            for direction in DIRECTIONS
            for name in ("adept", "adept_eager")
        ]
        ratios = [number(run.times_floor(cell) if cell else None, 2) for cell in cells]
        rows.append([table_text(floor.case), *ratios])
    return Table(header, rows)


def shared_prompt(run: Run, S: int) -> Table:
    """Every rival at one length, in units of the floor, whose own figures come first."""
    figures: tuple[tuple[Quantity, str, float, str], ...] = (
        ("seconds", "step", 1e3, " ms"),
        ("bytes", "step", 1e-6, " MB"),
        ("seconds", "prefill", 1e3, " ms"),
        ("bytes", "prefill", 1e-6, " MB"),
        ("seconds", "decode", 1e3, " ms"),
    )
    header = (f"{S} prompt tokens", "training step", "its memory", "prefill", "its memory", "a token")
    rows = []
    for name in (cell.competitor for cell in run.select(direction="prefill", S=S)):
        row = [name]
        for quantity, direction, scale, unit in figures:
            cells = run.select(quantity, competitor=name, direction=direction, S=S)
            row += [_of_floor(run, cell, scale, unit) for cell in cells] or [MISSING]
        rows.append(row)
    return Table(header, rows)


def whole_model(run: Run, model: str) -> Table:
    """Every rival on one model, at the lengths that were measured first."""
    case = run.select(model=model)[0].case
    header = (
        f"{model}, {case['rows']} x {case['N']} tokens, P = {case['P']}",
        *("training step", "its memory", "inference", "its memory", "rows/s trained"),
    )
    rows = []
    for name in (cell.competitor for cell in run.select(case=case, direction="step")):
        row = [name]
        for direction in ("step", "inference"):
            row.append(_of_floor(run, run.one(case=case, competitor=name, direction=direction), 1e3, " ms"))
            row.append(_of_floor(run, run.one("bytes", case, competitor=name, direction=direction), 1e-6, " MB"))
        step = run.one(case=case, competitor=name, direction="step")
        rows.append([*row, number(float(case["rows"]) / step.p50)])
    return Table(header, rows)


def _of_floor(run: Run, cell: Cell, scale: float, unit: str) -> str:
    """A multiple of the floor's; the floor's own in full."""
    return number(scale * cell.p50, 1, unit) if cell.role == "floor" else number(run.times_floor(cell), 2)


def everything(run: Run) -> Table:
    """All times of a run, with memory and floors; without columns of which nothing is known."""
    header = (
        "case", "competitor", "direction", "ms", "p20", "p80", "x floor", "peak MB",
        "MFLOP at least", "MB at least", "GFLOP/s", "GB/s", "x limit",
    )  # fmt: skip
    rows = [_timed(run, cell) for cell in run.select()]
    known = [any(row[i] != MISSING for row in rows) for i in range(len(header))]
    return Table(list(compress(header, known)), [list(compress(row, known)) for row in rows])


def _timed(run: Run, cell: Cell) -> list[str]:
    peak = run.beside(replace(cell, quantity="bytes"), cell.competitor)
    floor = floors.of(run, cell)
    limit = floor.seconds(run.settings.get("rates", {}), str(cell.case["dtype"])) if floor else None
    return [
        case_text(cell.case),
        cell.competitor,
        cell.direction,
        *(number(1e3 * t if t is not None else None, 3) for t in (cell.p50, cell.p20, cell.p80)),
        number(run.times_floor(cell), 2),
        number(peak.p50 / 1e6 if peak else None),
        number(floor.flops / 1e6 if floor else None),
        number(floor.bytes / 1e6 if floor else None),
        number(floor.flops / cell.p50 / 1e9 if floor else None),
        number(floor.bytes / cell.p50 / 1e9 if floor else None),
        number(cell.p50 / limit if limit else None, 2),
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def spaced(direction: str) -> str:
    """As it is read."""
    return direction.replace("+", " + ")


def decoding_sentence(device: Device) -> str:
    """Attention of a single query, in numbers."""
    run = device.run("attention", cpu_capability="AVX512")
    of = {dtype: speeds(run, dtype, "forward", decoding=True) for dtype in ("float32", "bfloat16")}
    over = {dtype: [speed.over_concat for speed in cells] for dtype, cells in of.items()}
    spans = [f"{min(values):.1f} to {max(values):.1f} ({dtype})" for dtype, values in over.items()]
    most = [f"{max(speed.of_tokens for speed in cells):.2f}" for cells in of.values()]
    (case, *_) = (cell.case for cell in run.select(competitor="fused", N=1))
    return (
        f"Decoding one token against {case['M']} keys and {case['P']} prefix tokens: {' and '.join(spans)} times "
        f"faster than concatenation, in at most {' and '.join(most)} times the time of SDPA without prefix, scaled."
    )


def flex_sentence(device: Device) -> str:
    """Attention against compiled FlexAttention, in numbers."""
    run = device.run("attention", cpu_capability="AVX512")
    told = []
    for dtype in ("float32", "bfloat16"):
        pairs = [(run.beside(cell, "fused"), cell) for cell in run.select(competitor="flex", dtype=dtype)]
        over = [flex.p50 / fused.p50 for fused, flex in pairs if fused]
        told.append(f"{geometric_mean(over):.2f} (at least {min(over):.2f}) in {dtype}")
    return (
        "Over concatenation and compiled FlexAttention, which has no backward on a CPU, the forward pass is faster by "
        f"{', '.join(told)}, decoding among it."
    )


def avx2_sentence(device: Device) -> str:
    """Attention on a lesser processor, in numbers."""
    run = device.run("attention", cpu_capability="AVX2")
    over = [[speed.over_concat for speed in speeds(run, "float32", direction)] for direction in DIRECTIONS]
    forward, both = (f"{geometric_mean(values):.2f} (at least {min(values):.2f})" for values in over)
    return (
        f"With AVX2 alone (`ATEN_CPU_CAPABILITY=avx2`) float32 is {forward} times faster than concatenation forward, "
        f"{both} forward + backward."
    )


def dropout_sentence(device: Device) -> str:
    """Attention with dropout, in numbers."""
    run = device.run("attention-dropout")

    def told(dtype: str) -> str:
        over = [[speed.over_concat for speed in speeds(run, dtype, direction)] for direction in DIRECTIONS]
        forward, both = (f"{geometric_mean(values):.1f} (at least {min(values):.1f})" for values in over)
        return f"{dtype} {forward} forward, {both} forward + backward"

    return (
        f"With dropout of {run.settings['dropout']}, as BERT and GPT-2 have it in training, PyTorch's attention on a "
        f"CPU writes all probabilities down. Times faster than concatenation: {told('float32')}; {told('bfloat16')}."
    )


def short_prompt_sentence(device: Device) -> str:
    """Training steps with a shorter prompt, in numbers."""
    run = device.run("shared-prompt")
    ratio = {cell.competitor: run.times_floor(cell) or math.nan for cell in run.select(direction="step", S=60)}
    shared = [ratio[f"{name} shared"] for name in ("PT", "DePT", "ADePT")]
    return (
        f"With 60 prompt tokens a training step costs {min(shared):.2f} to {max(shared):.2f}, in every row "
        f"{ratio['PT textbook']:.2f}, with PEFT {ratio['PEFT PT']:.2f}."
    )


def saved_sentence(device: Device) -> str:
    """What a stated job costs with PEFT, and here."""
    run, rows, epochs = device.run("models"), 67_349, 3
    model = list(dict.fromkeys(str(cell.case["model"]) for cell in run.cells))[-1]
    case = run.select(model=model)[0].case

    def told(name: str) -> str:
        hours = epochs * rows / float(case["rows"]) * run.one(case=case, competitor=name, direction="step").p50 / 3600
        return f"{hours:.1f} h and {run.one('bytes', case, competitor=name, direction='step').p50 / 1e6:,.0f} MB"

    pairs = (("PT", "PEFT PT"), ("prefix tuning", "PEFT prefix tuning"))
    costs = "; ".join(f"{ours}: {told(ours)}, with PEFT {told(peer)}" for ours, peer in pairs)
    return (
        f"{epochs} epochs over {rows:,} rows (SST-2's) of {case['N']} tokens on {model}, P = {case['P']}, "
        f"forward + backward alone: {costs}."
    )


def adapterhub_sentence(device: Device) -> str:
    """What AdapterHub's prefix tuning costs, in numbers."""
    run = device.run("adapterhub")
    steps = run.select(competitor="adapters prefix tuning", direction="step")

    def told(step: Cell) -> str:
        memory = run.one("bytes", step.case, competitor=step.competitor, direction="step")
        inference = run.one(case=step.case, competitor=step.competitor, direction="inference")
        of_floor = [number(run.times_floor(cell), 2) for cell in (step, memory, inference)]
        return f"a step {of_floor[0]} ({of_floor[1]} of its memory), inference {of_floor[2]} on {step.case['model']}"

    versions = f"adapters {run.environment['adapters']}, transformers {run.environment['transformers']}"
    return (
        f"AdapterHub's prefix tuning, same shapes, in units of the frozen model in its own environment ({versions}): "
        f"{'; '.join(told(step) for step in steps)}."
    )


SNIPPETS: dict[str, Callable[[Device], Table | str]] = {
    "decoder": lambda device: main_job(device.run("main"), "decoder"),
    "encoder": lambda device: main_job(device.run("main"), "encoder"),
    "attention": lambda device: attention(device.run("attention", cpu_capability="AVX512")),
    "attention-decoding": decoding_sentence,
    "attention-avx2": avx2_sentence,
    "attention-flex": flex_sentence,
    "attention-dropout": dropout_sentence,
    "shared-prompt": lambda device: shared_prompt(device.run("shared-prompt"), 100),
    "shared-prompt-60": short_prompt_sentence,
    "embedding": lambda device: embedding(device.run("embedding")),
    "bert": lambda device: whole_model(device.run("models"), "BERT-base"),
    "llama": lambda device: whole_model(device.run("models"), "Llama, 12 x 768"),
    "saved": saved_sentence,
    "adapterhub": adapterhub_sentence,
}
"""What a Markdown file can have filled in, by the name in its marker."""
