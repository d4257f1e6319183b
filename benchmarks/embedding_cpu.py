"""Benchmark of ``prompt_embedding`` on the CPU: ``python -m benchmarks.embedding_cpu --out FILE``.

Every peer runs in the same process, in turns, several times; a time is the median. The C library is told to keep freed
memory: else the pages of a new output, of which it sometimes returns the last one's and sometimes does not, would cost
more than most peers, at random. Targets, on ids with the frequencies
of real text: ADePT forward at most 1.5 times a lookup that writes the same output, forward and backward at most 4
times; DePT no slower; the merged table at most 1.05 times.
"""

import argparse
import collections
import ctypes
import pydoc_data.topics
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastprefix

from . import environment, plots, report
from .memory import added_peak

TABLES = ((32_000, 768), (32_128, 1024), (128_256, 4096))
BATCHES = ((32, 256), (8, 1024))
RANKS = (19, 64)
LENGTHS = (16, 64, 256, 1024)
S = 60
TARGETS = {"adept": (1.5, 4.0), "dept": (1.5, 4.0), "merged": (1.05, None)}

Peer = Callable[[], Tensor]


class Inputs(NamedTuple):
    """One setting, in the letters of the formulas."""

    ids: Tensor
    weight: Tensor
    prompt: Tensor
    ffn: tuple[Tensor, Tensor, Tensor, Tensor]
    low_rank: tuple[Tensor, Tensor]


def text_ids(vocabulary: int, count: int) -> Tensor:
    """Ids that occur as often as the words and marks of a real text: ranks of its tokens, drawn anew from their
    frequencies, with a Zipf tail (1 / rank) to the end of the table that gets the share of what occurred once.
    """
    text = " ".join(pydoc_data.topics.topics.values())
    tokens = re.findall(r" ?\w+|[^\w\s]|\s+", text)
    counts = torch.tensor([n for _, n in collections.Counter(tokens).most_common(vocabulary)], dtype=torch.float64)
    frequencies = torch.zeros(vocabulary, dtype=torch.float64)
    seen = int((counts > 1).sum())
    frequencies[:seen] = counts[:seen]
    tail = 1.0 / torch.arange(seen + 1, vocabulary + 1, dtype=torch.float64)
    frequencies[seen:] = tail / tail.sum() * (len(counts) - seen)
    return torch.multinomial(frequencies, count, replacement=True)


def make_inputs(V: int, d: int, B: int, N: int, r: int, ids: str, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    flat = text_ids(V, B * N) if ids == "text" else torch.randint(0, V, (B * N,))

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape) * 0.02).to(dtype).requires_grad_()

    return Inputs(
        flat.view(B, N),
        torch.randn(V, d).to(dtype),
        normal(S, d),
        (normal(d, r), normal(r), normal(r, d), normal(d)),
        (normal(N, r), normal(r, d)),
    )


def behind_prompt(prompt: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([prompt.expand(rows.shape[0], -1, -1), rows], 1)


def eager_dept(x: Inputs) -> Tensor:
    """As the authors' code does it."""
    a, b = x.low_rank
    return behind_prompt(x.prompt, F.embedding(x.ids, x.weight) + (a @ b)[: x.ids.shape[1]])


def eager_adept(x: Inputs) -> Tensor:
    """As the authors' code does it."""
    w1, b1, w2, b2 = x.ffn
    e = F.embedding(x.ids, x.weight)
    return behind_prompt(x.prompt, e + (F.relu(e @ w1 + b1) @ w2 + b2))


compiled_dept = torch.compile(eager_dept, dynamic=True)
compiled_adept = torch.compile(eager_adept, dynamic=True)


def peers(x: Inputs, merged: Tensor) -> dict[str, Peer]:
    """All write [B, S + N, d], but the eager ones' intermediate results."""
    longer = torch.cat([x.ids[:, :1].expand(-1, S), x.ids], 1).contiguous()
    return {
        "lookup": lambda: F.embedding(longer, x.weight),
        "pt_eager": lambda: behind_prompt(x.prompt, F.embedding(x.ids, x.weight)),
        "pt": lambda: fastprefix.prompt_embedding(x.ids, x.weight, x.prompt),
        "dept_eager": lambda: eager_dept(x),
        "dept_compiled": lambda: compiled_dept(x),
        "dept": lambda: fastprefix.prompt_embedding(x.ids, x.weight, x.prompt, low_rank=x.low_rank),
        "adept_eager": lambda: eager_adept(x),
        "adept_compiled": lambda: compiled_adept(x),
        "adept": lambda: fastprefix.prompt_embedding(x.ids, x.weight, x.prompt, ffn=x.ffn),
        "merged": lambda: fastprefix.prompt_embedding(x.ids, merged, x.prompt),
    }


def merge(x: Inputs) -> Tensor:
    w1, b1, w2, b2 = x.ffn
    with torch.no_grad():
        return torch.cat([e + (F.relu(e @ w1 + b1) @ w2 + b2) for e in x.weight.split(4096)])


def forward_only(peer: Peer) -> None:
    with torch.no_grad():
        peer()


def with_backward(peer: Peer, dy: Tensor) -> None:
    output = peer()
    if output.requires_grad:
        output.backward(dy)


def seconds(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Medians; the peers take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_peer) for name, of_peer in times.items()}


def measure(x: Inputs, merged: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every peer, forward and forward + backward."""
    everyone = peers(x, merged)
    dy = torch.randn_like(everyone["lookup"]())
    forward = seconds({name: lambda p=p: forward_only(p) for name, p in everyone.items()}, rounds)  # type: ignore[misc]
    trained = {name: p for name, p in everyone.items() if name not in ("lookup", "merged")}
    both = seconds({name: lambda p=p: with_backward(p, dy) for name, p in trained.items()}, rounds)  # type: ignore[misc]
    return {"forward": forward, "forward_backward": both}


def against_lookup(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    lookup = times["forward"]["lookup"]
    return {which: {name: t / lookup for name, t in of.items()} for which, of in times.items()}


def keep_freed_memory() -> bool:
    """No memory from mmap, none given back; whether the C library (glibc) could be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mmap_max, trim_threshold = -4, -1
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def measured(V: int, d: int, B: int, N: int, r: int, ids: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One setting: times, as multiples of the lookup's too, and what each peer's forward pass adds to memory."""
    x = make_inputs(V, d, B, N, r, ids, dtype)
    merged = merge(x)
    times = measure(x, merged, rounds)
    with torch.no_grad():
        peaks = {name: added_peak(peer, torch.device("cpu")) for name, peer in peers(x, merged).items()}
    setting = {"V": V, "d": d, "B": B, "N": N, "S": S, "r": r, "ids": ids, "distinct": x.ids.unique().numel()}
    return setting | {"seconds": times, "times_lookup": against_lookup(times), "peak_bytes": peaks}


def plot(lengths: list[dict[str, Any]], path: Path) -> None:
    """Time over N, forward and forward + backward."""
    panels = []
    for which, title in (("forward", "forward"), ("forward_backward", "forward + backward")):
        of = {
            name: [(record["N"], 1e3 * record["seconds"][which][name]) for record in lengths]
            for name in lengths[0]["seconds"][which]
        }
        panels.append(
            plots.Panel(title, of | {"lookup": [(r["N"], 1e3 * r["seconds"]["forward"]["lookup"]) for r in lengths]})
        )
    plots.curves(panels, path, "lookup", "tokens a row", "milliseconds", logarithmic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write; the plot over N goes beside it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quick", action="store_true", help="the smallest table and batch only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = keep_freed_memory()
    tables, batches = (TABLES[:1], BATCHES[:1]) if options.quick else (TABLES, BATCHES)
    settings = [(*t, *b, r, ids) for t in tables for b in batches for r in RANKS for ids in ("text", "uniform")]
    over_lengths = [(*tables[-1 if options.quick else 1], 32, N, RANKS[0], "text") for N in LENGTHS]
    records: list[dict[str, Any]] = []
    lengths: list[dict[str, Any]] = []
    for setting in (*settings, *over_lengths):
        record = measured(*setting, getattr(torch, options.dtype), options.rounds)
        (records if len(records) < len(settings) else lengths).append(record)
        show(record)
    if options.out:
        facts = environment.describe(torch.device("cpu")) | {"freed_memory_kept": kept}
        result = {"environment": facts, "dtype": options.dtype, "rounds": options.rounds}
        result |= {"targets_times_lookup": TARGETS, "results": records, "over_lengths": lengths}
        report.write_json(result, options.out)
        plot(lengths, options.out.with_suffix(".png"))


def show(record: dict[str, Any]) -> None:
    sizes = " ".join(f"{name}={record[name]}" for name in ("V", "d", "B", "N", "r", "ids", "distinct"))
    print(f"{sizes}  lookup {record['seconds']['forward']['lookup'] * 1e3:.2f} ms; times a lookup:")
    for which, ratios in record["times_lookup"].items():
        print(f"  {which:17}" + "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
