"""Choose the kernels that a composed call uses for the tokens and for the prefix.

For each measured call, ``choices.json`` lists the fastest plan and whether it is faster than the Triton backend.
``python -m benchmarks gpu`` measures the plans, and ``python -m benchmarks choices`` writes the file.
"""

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ...._once import constant_in_traces, once
from ...targets import find_architecture
from ..arguments import DIFFERENTIABLE, AttentionArguments

Direction = Literal["forward", "backward"]
CHOICES = Path(__file__).with_name("choices.json")
LONG_PREFIX = 512
"""The number of prefix keys from which PyTorch's kernel also processes the prefix if there is no measurement."""


class Plan(NamedTuple):
    """The kernel for the tokens, and the method for the prefix.

    "own" runs this package's kernel, which starts from the tokens' output. "alike" also runs the tokens' kernel for the
    prefix and merges the results. "concatenated" runs that kernel once for prefix and tokens.
    """

    kernel: Literal["flash", "cudnn"]
    prefix: Literal["own", "alike", "concatenated"]


PLANS: dict[str, Plan] = {
    "flash": Plan("flash", "own"),
    "flash, prefix alike": Plan("flash", "alike"),
    "flash, concatenated": Plan("flash", "concatenated"),
    "cudnn": Plan("cudnn", "own"),
    "cudnn, prefix alike": Plan("cudnn", "alike"),
    "cudnn, concatenated": Plan("cudnn", "concatenated"),
}


class Cell(NamedTuple):
    """One measured call."""

    P: int  # prefix keys
    N: int  # queries
    forward: str  # the fastest plan of the forward pass
    backward: str  # the fastest plan of the backward pass
    inference: bool  # whether the plan is faster than the Triton backend in inference
    training: bool  # whether the plans are faster than the Triton backend in training


Key = tuple[str, str, bool, int]
"""Architecture (a key of the tile tables), kind of call, ``is_causal``, and head dimension."""
_forced: str | None = None


def force(name: str | None) -> None:
    """Run all composed calls with the named plan, for measurements. None restores the default choice."""
    global _forced
    if name is not None and name not in PLANS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, PLANS))}, got {name!r}")
    _forced = name


def describe_kind(a: AttentionArguments) -> str:
    """Return the kind of a call.

    It is "segments", "plain", or "own prefix" if only this package's kernel supports the prefix.
    """
    if a.query_segments is not None:
        return "segments"
    return "plain" if is_prefix_plain(a) else "own prefix"


def is_prefix_plain(a: AttentionArguments) -> bool:
    """Return whether plain attention can process the prefix, with the gate multiplied into its keys and values."""
    if a.prefix_bias is not None or a.prefix_key_bias is not None or a.prefix_spans is not None:
        return False
    return a.prefix_key.shape[2] > 0 and (a.prefix_gate is None or a.prefix_gate.ndim == 3)


def choose_plan(a: AttentionArguments, direction: Direction) -> Plan:
    """Return the plan of a pass: the measured one, or flash attention. The passes of a call may have different plans.

    If a call does not support the plan's method for the prefix, this package's kernel replaces it. cuDNN has no
    deterministic backward pass, so flash attention replaces it if PyTorch must use deterministic algorithms. It also
    replaces cuDNN if that is not usable, or for a single key.
    """
    name = _forced
    if name is None:
        cell = find_cell(a)
        name = None if cell is None else getattr(cell, direction)
    if name is not None:
        kernel, prefix = PLANS[name]
    else:
        kernel, prefix = "flash", "alike" if a.prefix_key.shape[2] >= LONG_PREFIX else "own"
    packed = a.query_segments is not None
    if not is_prefix_plain(a) or (prefix == "concatenated" and (packed or a.is_causal)):
        prefix = "own"
    lengths = {"own": [a.key.shape[2]], "alike": [a.key.shape[2], a.prefix_key.shape[2]], "concatenated": []}[prefix]
    unusable = _forced is None and not is_cudnn_usable()
    if packed or torch.are_deterministic_algorithms_enabled() or unusable or 1 in lengths:
        kernel = "flash"
    return Plan(kernel, prefix)


@constant_in_traces
def is_cudnn_usable() -> bool:
    """Return whether PyTorch has cuDNN and SDPA may use it (``torch.backends.cuda.enable_cudnn_sdp``).

    A trace keeps the answer that it saw. ``choose_plan`` asks again in every call.
    """
    return bool(torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.is_available())


def is_faster(a: AttentionArguments) -> bool:
    """Return whether composition was measured to be faster than the Triton backend for a call."""
    cell = find_cell(a)
    if cell is None:
        return False
    if "cudnn" in cell.forward + cell.backward and not is_cudnn_usable():
        return False
    if cell.training == cell.inference or not torch.is_grad_enabled():
        return cell.inference
    given = [getattr(a, name) for name in DIFFERENTIABLE]
    return cell.training if any(x is not None and x.requires_grad for x in given) else cell.inference


def find_cell(a: AttentionArguments) -> Cell | None:
    """Return the measured call that represents this one, or None."""
    if a.query.device.type != "cuda":
        return None
    _, _, queries, size = a.query.shape
    search = _search_cells if torch.compiler.is_compiling() else _find_cell  # a compiler cannot use a cache
    architecture, kind = find_architecture(a.query.device), describe_kind(a)
    return search(architecture, kind, a.is_causal, size, a.prefix_key.shape[2], queries)


def _search_cells(architecture: str, kind: str, is_causal: bool, size: int, prefix: int, queries: int) -> Cell | None:
    """Return the measured call that represents one with head dimension ``size``, or None.

    It has the same architecture, kind and causality, and the same or the next larger head dimension. Among these calls,
    it has as many prefix keys and queries as the given one, or the next smaller numbers. A prefix that is shorter than
    any measured one is treated as the shortest one.
    """
    table = read_choices()
    wider = [key for key in table if key[:3] == (architecture, kind, is_causal) and key[3] >= size]
    if not wider:
        return None
    cells = table[min(wider)]
    lengths = [cell.P for cell in cells]
    length = max([P for P in lengths if prefix >= P], default=min(lengths))
    fewer = [cell for cell in cells if length == cell.P and queries >= cell.N]
    return max(fewer, key=lambda cell: cell.N, default=None)


_find_cell = functools.lru_cache(4096)(_search_cells)


@once
def read_choices() -> dict[Key, tuple[Cell, ...]]:
    """Read the measured calls. The file is an empty list until a device has been measured."""
    return parse_choices(json.loads(CHOICES.read_text(encoding="utf-8")))


def parse_choices(rows: list[dict[str, Any]]) -> dict[Key, tuple[Cell, ...]]:
    """Return the measured calls of the file's rows, by key."""
    table: dict[Key, tuple[Cell, ...]] = {}
    for row in rows:
        key = (row["architecture"], row["kind"], row["is_causal"], row["D"])
        table[key] = (*table.get(key, ()), Cell(**{name: row[name] for name in Cell._fields}))
    return table
