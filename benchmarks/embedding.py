"""``prompt_embedding`` against the authors' ways to write it, eager and compiled, and against a plain lookup.

All write [B, S + N, d]. The floor is a lookup that writes the same output. On a CPU the C library is told to keep freed
memory: else the pages of a new output, of which it sometimes returns the last one's and sometimes does not, would cost
more than most peers, at random.
"""

import argparse
import collections
import ctypes
import functools
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastprefix

from . import kernels, options
from .kernels import Peer, Problem
from .options import DTYPES
from .results import Case

NAME = "embedding"
DESCRIPTION = "prompt_embedding against eager and compiled PyTorch, and against a plain lookup."
TABLES = ((32_000, 768), (32_128, 1024), (128_256, 4096))
BATCHES = ((32, 256), (8, 1024))
RANKS = (19, 64)
LENGTHS = (16, 64, 1024)
S = 60
TARGETS = {"adept": (1.5, 4.0), "dept": (1.5, 4.0), "merged": (1.05, None)}
"""At most so many times the lookup, forward and forward + backward, on ids with the frequencies of real text."""


class Setting(NamedTuple):
    """One case, in the letters of the formulas; ``ids``: "text" or "uniform"."""

    V: int
    d: int
    B: int
    N: int
    S: int
    r: int
    ids: str


def grid(quick: bool) -> Iterator[Setting]:
    """The grid, then the second table over lengths that the grid does not have."""
    if quick:
        yield Setting(500, 16, 2, 24, 5, 3, "text")
        return
    for table in TABLES:
        for batch in BATCHES:
            for r in RANKS:
                for ids in ("text", "uniform"):
                    yield Setting(*table, *batch, S, r, ids)
    for N in LENGTHS:
        yield Setting(*TABLES[1], BATCHES[0][0], N, S, RANKS[0], "text")


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


Network = tuple[Tensor, Tensor, Tensor, Tensor]
LowRank = tuple[Tensor, Tensor]


def with_offset(rows: Tensor, ffn: Network) -> Tensor:
    """ADePT's network, added to what it is given."""
    w1, b1, w2, b2 = ffn
    return rows + (F.relu(rows @ w1 + b1) @ w2 + b2)


def behind_prompt(prompt: Tensor, rows: Tensor) -> Tensor:
    """The output, from the tokens' rows."""
    return torch.cat([prompt.expand(rows.shape[0], -1, -1), rows], 1)


def eager_pt(ids: Tensor, weight: Tensor, prompt: Tensor) -> Tensor:
    """As it is usually written."""
    return behind_prompt(prompt, F.embedding(ids, weight))


def eager_dept(ids: Tensor, weight: Tensor, prompt: Tensor, low_rank: LowRank) -> Tensor:
    """As the authors' code does it."""
    a, b = low_rank
    return behind_prompt(prompt, F.embedding(ids, weight) + (a @ b)[: ids.shape[1]])


def eager_adept(ids: Tensor, weight: Tensor, prompt: Tensor, ffn: Network) -> Tensor:
    """As the authors' code does it."""
    return behind_prompt(prompt, with_offset(F.embedding(ids, weight), ffn))


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Once for all settings."""
    return torch.compile(function, dynamic=True)


class Inputs:
    """Tensors of one setting, and the peers on them."""

    def __init__(self, setting: Setting, dtype: torch.dtype, device: torch.device) -> None:
        """Draw them, and merge ADePT's network into a second table."""
        V, d, B, N, S, r, ids = setting
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(*shape) * 0.02).to(device, dtype).requires_grad_()

        flat = text_ids(V, B * N) if ids == "text" else torch.randint(0, V, (B * N,))
        self.ids = flat.view(B, N).to(device)
        self.weight = torch.randn(V, d).to(device, dtype)
        self.prompt = normal(S, d)
        self.ffn = (normal(d, r), normal(r), normal(r, d), normal(d))
        self.low_rank = (normal(N, r), normal(r, d))
        self.merged = torch.cat([with_offset(rows, self.ffn).detach() for rows in self.weight.split(4096)])
        self.grad = normal(B, S + N, d).detach()
        # The lookup writes as many rows as the others: the prompt's place is taken by each row's first token.
        self.longer = torch.cat([self.ids[:, :1].expand(-1, S), self.ids], 1).contiguous()

    def case(self, setting: Setting, dtype: str) -> Case:
        """The setting, and how many rows of the table it needs."""
        return {**setting._asdict(), "distinct": self.ids.unique().numel(), "dtype": dtype}

    def peers(self) -> dict[str, Peer]:
        """All of them, with what each trains."""
        ours = fastprefix.prompt_embedding
        x, low_rank, ffn = (self.ids, self.weight, self.prompt), self.low_rank, self.ffn
        pt, dept, adept = (self.prompt,), (self.prompt, *low_rank), (self.prompt, *ffn)
        return {
            "lookup": Peer("floor", lambda: F.embedding(self.longer, self.weight)),
            "pt_eager": Peer("peer", lambda: eager_pt(*x), pt),
            "pt": Peer("ours", lambda: ours(*x), pt),
            "dept_eager": Peer("peer", lambda: eager_dept(*x, low_rank), dept),
            "dept_compiled": Peer("peer", lambda: compiled(eager_dept)(*x, low_rank), dept),
            "dept": Peer("ours", lambda: ours(*x, low_rank=low_rank), dept),
            "adept_eager": Peer("peer", lambda: eager_adept(*x, ffn), adept),
            "adept_compiled": Peer("peer", lambda: compiled(eager_adept)(*x, ffn), adept),
            "adept": Peer("ours", lambda: ours(*x, ffn=ffn), adept),
            "merged": Peer("ours", lambda: ours(self.ids, self.merged, self.prompt)),
        }


def keep_freed_memory() -> bool:
    """No memory from mmap, none given back; whether the C library (glibc) could be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mmap_max, trim_threshold = -4, -1
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's options."""
    kernels.add_arguments(parser, dtypes=["float32"])


def problems(quick: bool, dtypes: list[str], device: torch.device) -> Iterator[Problem]:
    """The grid, in every type."""
    for dtype in dtypes:
        for setting in grid(quick):
            inputs = Inputs(setting, DTYPES[dtype], device)
            yield Problem(inputs.case(setting, dtype), inputs.peers(), inputs.grad)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    device = options.device_for(arguments.device)
    settings = {"targets": TARGETS, "freed_memory_kept": keep_freed_memory()}
    return kernels.run(NAME, problems(arguments.quick, arguments.dtype, device), settings, arguments, device)
