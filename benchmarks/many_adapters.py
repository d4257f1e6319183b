"""Measure batches whose rows have different adapters, and the replacement of adapters in a store.

"prefix" and "prompt" measure prefill and greedy generation of 16 rows. In the floor, all rows share one adapter.
``mixed`` has a different adapter for each row. ``in turn`` generates each row separately with its adapter. ``base`` has
no adapter. "swap" replaces a prefix in the model's store with another one from host memory. Its floor copies as many
bytes.

AdapterHub's ``BatchSplit`` also supports a different prefix for each row. Its package requires an older transformers,
so ``--adapterhub`` measures it in a separate environment, where the floor is the model without adapters.
"""

import argparse
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastprefix

from . import models
from .measure import Work
from .models import Size
from .suite import DTYPES, Problem, add_common, run_suite

LENGTH, NEW = 100, 64  # tokens of an adapter, and generated ones
SWAPPED = 20 * 2**20  # bytes
FULL = Size(layers=6, width=512, heads=8, vocabulary=4096, rows=16, length=128)
QUICK = Size(layers=2, width=64, heads=8, vocabulary=4096, rows=4, length=8)


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    size, new, swapped = (QUICK, 4, SWAPPED // 64) if options.quick else (FULL, NEW, SWAPPED)
    ids = models.draw_batch("causal_lm", size, size.length, device)["input_ids"]
    for name in options.dtype:
        for kind in ("prefix",) if options.adapterhub else ("prefix", "prompt", "swap"):
            model: Any = models.build("causal_lm", models.configure("causal_lm", size), device).eval()
            model.to(DTYPES[name]).generation_config.eos_token_id = None
            if kind == "swap":
                yield {"kind": kind, "dtype": name}, swap(model, swapped)
                continue
            case = {"kind": kind, "rows": size.rows, "P": LENGTH, "N": size.length, "new": new, "dtype": name}
            works = split_with_adapters(model, ids, new) if options.adapterhub else generate(model, kind, ids, new)
            yield case, works


def generate(model: Any, kind: str, ids: Tensor, new: int) -> dict[str, Work]:
    """Return the work of each peer for generation, with one adapter for each row."""
    names = [f"adapter {index}" for index in range(len(ids))]
    for name in names:
        config = fastprefix.PrefixTuningConfig(LENGTH) if kind == "prefix" else fastprefix.PromptTuningConfig(LENGTH)
        fastprefix.attach(model, config, name=name, check=name == names[0])
    run = partial(model.generate, max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)

    def run_shared() -> None:
        fastprefix.set_adapter(model, names[0])
        run(input_ids=ids)

    def run_in_turn() -> None:
        for row, name in enumerate(names):
            fastprefix.set_adapter(model, name)
            run(input_ids=ids[row : row + 1])

    def run_base() -> None:
        with fastprefix.disable_adapter(model):
            run(input_ids=ids)

    return {
        "shared": Work("floor", {"generate": run_shared}),
        "mixed": Work("ours", {"generate": lambda: run(input_ids=ids, adapter_names=names)}),
        "in turn": Work("theirs", {"generate": run_in_turn}),
        "base": Work("theirs", {"generate": run_base}),
    }


def split_with_adapters(model: Any, ids: Tensor, new: int) -> dict[str, Work]:
    """Return the work of AdapterHub's prefixes, which are concatenated to the keys and values of their rows."""
    import adapters
    from adapters.composition import BatchSplit

    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns about the intended model without adapters
    names = [f"adapter {index}" for index in range(len(ids))]
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=adapters.PrefixTuningConfig(flat=True, prefix_length=LENGTH))
    model.to(device=model.device, dtype=model.dtype).eval()
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run_with(active: Any) -> None:
        model.set_active_adapters(active)
        model.generate(input_ids=ids, **options)

    split = BatchSplit(*names, batch_sizes=[1] * len(names))
    return {
        "base": Work("floor", {"generate": partial(run_with, None)}),
        "AdapterHub BatchSplit": Work("theirs", {"generate": partial(run_with, split)}),
        "AdapterHub, one shared": Work("theirs", {"generate": partial(run_with, names[0])}),
    }


def swap(model: Any, size: int) -> dict[str, Work]:
    """Return the work of replacing a prefix of ``size`` bytes in a store with other prefixes."""
    config, dtype = model.config, model.dtype
    layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    length = size // (2 * layers * heads * width * dtype.itemsize)
    pairs = [tuple(torch.randn(heads, length, width).to(dtype) for _ in range(2)) for _ in range(layers)]
    state = fastprefix.PrefixState(pairs)  # type: ignore[arg-type]
    store = fastprefix.AdapterStore(model, tokens=4 * length)
    for name in ("one", "two", "three"):
        store.load(name, state)
    sources = [tensor for pair in pairs for tensor in pair]
    targets = [torch.empty_like(tensor, device=model.device) for tensor in sources]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    return {
        "copy": Work("floor", {"swap": copy}),
        "store": Work("ours", {"swap": lambda: store.load("two", state)}),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=10, seconds=2.0, dtypes=["float32", "bfloat16"])
    parser.add_argument("--adapterhub", action="store_true", help="measure AdapterHub's package, in its environment")


run = partial(run_suite, "many-adapters", list_problems)
