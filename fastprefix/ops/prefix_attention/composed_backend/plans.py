"""Choose how a composed call runs: by which of PyTorch's kernels, and with which kernel for the prefix.

``choices.json`` says for measured calls which plan is the fastest and if it is faster than the Triton backend. A run of
``python -m benchmarks gpu`` measures, and ``python -m benchmarks choices`` writes the file.
"""

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ...targets import architecture
from ..arguments import DIFFERENTIABLE, AttentionArguments

Direction = Literal["forward", "backward"]
CHOICES = Path(__file__).with_name("choices.json")
LONG_PREFIX = 512
"""Without a measurement, so many prefix keys are attended to by PyTorch's kernel too."""


class Plan(NamedTuple):
    """The kernel for the tokens, and the way of the prefix.

    "own": the kernel of this package, which begins with the tokens' output. "alike": the kernel for the tokens runs
    for the prefix too, and the results are merged. "concatenated": one call of that kernel for both.
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
    """One measured call: its prefix keys and queries, the fastest plan of each pass, and where they are faster than the
    Triton backend.
    """

    P: int
    N: int
    forward: str
    backward: str
    inference: bool
    training: bool


Key = tuple[str, str, bool, int]
"""Architecture (a row of the tile tables), kind of call, ``is_causal``, and head size."""
_forced: str | None = None


def force(name: str | None) -> None:
    """Run all composed calls by a plan, for measurements, until None is given."""
    global _forced
    if name is not None and name not in PLANS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, PLANS))}, got {name!r}")
    _forced = name


def describe_kind(a: AttentionArguments) -> str:
    """Return the kind of a call: "segments", "plain", or "own prefix" where only this package's kernel can run it."""
    if a.query_segments is not None:
        return "segments"
    return "plain" if is_prefix_plain(a) else "own prefix"


def is_prefix_plain(a: AttentionArguments) -> bool:
    """Return whether any attention can run the prefix, with gates multiplied into its keys and values."""
    if a.prefix_bias is not None or a.prefix_key_bias is not None or a.prefix_spans is not None:
        return False
    return a.prefix_key.shape[2] > 0 and (a.prefix_gate is None or a.prefix_gate.ndim == 3)


def choose_plan(a: AttentionArguments, direction: Direction) -> Plan:
    """Return the plan of a pass: the measured one, or flash attention. Both passes of a call may have different ones.

    A plan that a call does not allow is replaced by the one with this package's kernel for the prefix. cuDNN has no
    deterministic backward pass, so flash attention runs where PyTorch is asked for deterministic algorithms.
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
    if packed or torch.are_deterministic_algorithms_enabled():
        kernel = "flash"
    if not is_prefix_plain(a) or (prefix == "concatenated" and (packed or a.is_causal)):
        prefix = "own"
    return Plan(kernel, prefix)


def is_faster(a: AttentionArguments) -> bool:
    """Return whether a measurement says that composition is faster than the Triton backend for a call."""
    cell = find_cell(a)
    if cell is None:
        return False
    given = [getattr(a, name) for name in DIFFERENTIABLE]
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return cell.training if trains else cell.inference


def find_cell(a: AttentionArguments) -> Cell | None:
    """Return the measured call that stands for this one, or None.

    It has the same architecture, kind and causality and the next larger head size. Among these it has as many prefix
    keys and queries as this call, or the next fewer. A shorter prefix than any measured one is like the shortest.
    """
    table = read_choices()
    if not table or a.query.device.type != "cuda":
        return None
    _, _, queries, size = a.query.shape
    device = architecture(torch.cuda.get_device_capability(a.query.device))
    kind = (device, describe_kind(a), a.is_causal)
    wider = [key for key in table if key[:3] == kind and key[3] >= size]
    if not wider:
        return None
    cells = table[min(wider)]
    lengths, wanted = [cell.P for cell in cells], a.prefix_key.shape[2]
    length = max([P for P in lengths if wanted >= P], default=min(lengths))
    fewer = [cell for cell in cells if length == cell.P and queries >= cell.N]
    return max(fewer, key=lambda cell: cell.N, default=None)


@functools.cache
def read_choices() -> dict[Key, tuple[Cell, ...]]:
    """Read the measured calls. The file has none as long as nothing was measured."""
    return parse_choices(json.loads(CHOICES.read_text(encoding="utf-8")))


def parse_choices(rows: list[dict[str, Any]]) -> dict[Key, tuple[Cell, ...]]:
    """Return the cells of a file's rows by key."""
    table: dict[Key, tuple[Cell, ...]] = {}
    for row in rows:
        key = (row["architecture"], row["kind"], row["is_causal"], row["D"])
        table[key] = (*table.get(key, ()), Cell(**{name: row[name] for name in Cell._fields}))
    return table
