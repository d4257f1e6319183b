"""Compare ``prompt_embedding`` with eager and compiled PyTorch, as in the authors' code, and with a plain lookup.

All peers write [B, S + N, d]. The floor is a lookup with an output of the same shape.
"""

import argparse
import collections
import functools
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastprefix

from .measure import Role, Work
from .suite import DTYPES, Problem, add_common, build_kernel_work, run_suite

TABLES = ((32_000, 768), (32_128, 1024), (128_256, 4096))
BATCHES = ((32, 256), (8, 1024))
RANKS = (19, 64)
LENGTHS = (16, 64, 1024)
S = 60


class Setting(NamedTuple):
    """The sizes of one case, named as in the formulas. ``ids`` is "text" or "uniform"."""

    V: int
    d: int
    B: int
    N: int
    S: int
    r: int
    ids: str


QUICK = Setting(500, 16, 2, 24, 5, 3, "text")
GRID = [Setting(*t, *b, S, r, ids) for t in TABLES for b in BATCHES for r in RANKS for ids in ("text", "uniform")]
GRID += [Setting(*TABLES[1], BATCHES[0][0], N, S, RANKS[0], "text") for N in LENGTHS]


def draw_text_ids(vocabulary: int, count: int) -> Tensor:
    """Draw ids with the frequencies of a real text.

    Ids are the frequency ranks of its words and punctuation. The total probability of those that occur once is
    distributed over the rest of the table as 1 / rank (Zipf's law).
    """
    tokens = re.findall(r" ?\w+|[^\w\s]|\s+", " ".join(pydoc_data.topics.topics.values()))
    counts = torch.tensor([n for _, n in collections.Counter(tokens).most_common(vocabulary)], dtype=torch.float64)
    frequencies = torch.zeros(vocabulary, dtype=torch.float64)
    seen = int((counts > 1).sum())
    frequencies[:seen] = counts[:seen]
    tail = 1.0 / torch.arange(seen + 1, vocabulary + 1, dtype=torch.float64)
    frequencies[seen:] = tail / tail.sum() * (len(counts) - seen)
    return torch.multinomial(frequencies, count, replacement=True)


def add_offset(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Add the output of ADePT's network to its input."""
    return rows + (F.relu(rows @ w1 + b1) @ w2 + b2)


def embed_pt(ids: Tensor, weight: Tensor, prompt: Tensor) -> Tensor:
    """Run prompt tuning in eager PyTorch."""
    return torch.cat([prompt.expand(len(ids), -1, -1), F.embedding(ids, weight)], 1)


def embed_dept(ids: Tensor, weight: Tensor, prompt: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Run DePT as in the authors' code."""
    return torch.cat([prompt.expand(len(ids), -1, -1), F.embedding(ids, weight) + (a @ b)[: ids.shape[1]]], 1)


def embed_adept(ids: Tensor, weight: Tensor, prompt: Tensor, *network: Tensor) -> Tensor:
    """Run ADePT as in the authors' code."""
    return torch.cat([prompt.expand(len(ids), -1, -1), add_offset(F.embedding(ids, weight), *network)], 1)


EAGER: dict[str, Callable[..., Tensor]] = {"PT": embed_pt, "DePT": embed_dept, "ADePT": embed_adept}


compile_once = functools.cache(lambda function: torch.compile(function, dynamic=True))
"""Compile a function once for all settings."""


class EmbeddingInputs(NamedTuple):
    """The tensors of one case. All but the ids, the table and the gradient require a gradient."""

    ids: Tensor  # [B, N]
    weight: Tensor  # [V, d]
    prompt: Tensor  # [S, d]
    ffn: tuple[Tensor, Tensor, Tensor, Tensor]
    low_rank: tuple[Tensor, Tensor]
    grad: Tensor  # of the output, [B, S + N, d]


def draw_inputs(setting: Setting, dtype: torch.dtype, device: torch.device) -> EmbeddingInputs:
    """Draw the tensors of a case from a fixed seed."""
    V, d, B, N, S, r, kind = setting
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) * 0.02).to(dtype).requires_grad_()

    flat = draw_text_ids(V, B * N) if kind == "text" else torch.randint(0, V, (B * N,))
    ids, weight, prompt = flat.view(B, N).to(device), torch.randn(V, d, device=device).to(dtype), draw(S, d)
    ffn, low_rank = (draw(d, r), draw(r), draw(r, d), draw(d)), (draw(N, r), draw(r, d))
    return EmbeddingInputs(ids, weight, prompt, ffn, low_rank, draw(B, S + N, d).detach())


def build_works(
    setting: Setting, dtype: torch.dtype, device: torch.device, inputs: EmbeddingInputs | None = None
) -> tuple[int, dict[str, Work]]:
    """Return the number of distinct tokens of a setting, and the work of each peer. By default, draw the inputs."""
    ids, weight, prompt, ffn, low_rank, grad = inputs or draw_inputs(setting, dtype, device)
    S = setting.S
    merge = functools.cache(lambda: torch.cat([add_offset(rows, *ffn).detach() for rows in weight.split(4096)]))
    # The output of the lookup is as large as that of the other peers. The first token of each row replaces the prompt.
    longer = torch.cat([ids[:, :1].expand(-1, S), ids], 1).contiguous()
    ours, x = fastprefix.prompt_embedding, (ids, weight, prompt)
    pt, dept, adept = (prompt,), (prompt, *low_rank), (prompt, *ffn)
    peers: dict[str, tuple[Role, Callable[[], Tensor], Sequence[Tensor]]] = {
        "lookup": ("floor", lambda: F.embedding(longer, weight), ()),
        "pt_eager": ("theirs", lambda: embed_pt(*x), pt),
        "pt": ("ours", lambda: ours(*x), pt),
        "dept_eager": ("theirs", lambda: embed_dept(*x, *low_rank), dept),
        "dept_compiled": ("theirs", lambda: compile_once(embed_dept)(*x, *low_rank), dept),
        "dept": ("ours", lambda: ours(*x, low_rank=low_rank), dept),
        "adept_eager": ("theirs", lambda: embed_adept(*x, *ffn), adept),
        "adept_compiled": ("theirs", lambda: compile_once(embed_adept)(*x, *ffn), adept),
        "adept": ("ours", lambda: ours(*x, ffn=ffn), adept),
        "merged": ("ours", lambda: ours(ids, merge(), prompt), ()),
    }
    return ids.unique().numel(), {name: build_kernel_work(*peer, grad) for name, peer in peers.items()}


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    for dtype in options.dtype:
        for setting in [QUICK] if options.quick else GRID:
            distinct, works = build_works(setting, DTYPES[dtype], device)
            yield {**setting._asdict(), "distinct": distinct, "dtype": dtype}, works


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=10, seconds=2.0, dtypes=["float32"])


def run(options: argparse.Namespace) -> int:
    return run_suite("embedding", list_problems, options)
