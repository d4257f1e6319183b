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
import transformers
from torch import Tensor

import fastprefix

from .measure import Work
from .suite import DTYPES, Problem, add_common, run_suite

DESCRIPTION = "Compare a batch whose rows have different adapters with one shared adapter, and with separate batches."
ROWS, LENGTH, TOKENS, NEW = 16, 100, 128, 64
SWAPPED = 20 * 2**20  # bytes
SIZES: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
QUICK: dict[str, Any] = {**SIZES, "hidden_size": 64, "num_hidden_layers": 2}


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    rows, tokens, new = (4, 8, 4) if options.quick else (ROWS, TOKENS, NEW)
    for name in options.dtype:
        for kind in ("prefix",) if options.adapterhub else ("prefix", "prompt"):
            model = build_model(QUICK if options.quick else SIZES, DTYPES[name], device)
            case = {"kind": kind, "rows": rows, "P": LENGTH, "N": tokens, "new": new, "dtype": name}
            ids = draw_ids(rows, tokens, device)
            yield case, split_with_adapters(model, ids, new) if options.adapterhub else generate(model, kind, ids, new)
        if options.adapterhub:
            continue
        model = build_model(QUICK if options.quick else SIZES, DTYPES[name], device)
        yield {"kind": "swap", "dtype": name}, swap(model, SWAPPED // (64 if options.quick else 1))


def build_model(sizes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **sizes,
        vocab_size=4096,
        intermediate_size=8 * sizes["hidden_size"] // 3,
        initializer_range=sizes["hidden_size"] ** -0.5,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    model.to(device=device, dtype=dtype).generation_config.eos_token_id = None
    return model


def attach_all(model: Any, kind: str, count: int) -> None:
    for index in range(count):
        config = fastprefix.PrefixTuningConfig(LENGTH) if kind == "prefix" else fastprefix.PromptTuningConfig(LENGTH)
        fastprefix.attach(model, config, name=f"adapter {index}", check=index == 0)


def draw_ids(rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.randint(3, 4096, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def generate(model: Any, kind: str, ids: Tensor, new: int) -> dict[str, Work]:
    """Return the work of each peer for generation, with one adapter for each row."""
    attach_all(model, kind, len(ids))
    names = [f"adapter {index}" for index in range(len(ids))]
    run = partial(model.generate, max_new_tokens=new, do_sample=False, pad_token_id=0)

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
    run = partial(model.generate, input_ids=ids, max_new_tokens=new, do_sample=False, pad_token_id=0)

    def run_with(active: Any) -> None:
        model.set_active_adapters(active)
        run()

    split = BatchSplit(*names, batch_sizes=[1] * len(names))
    return {
        "base": Work("floor", {"generate": partial(run_with, None)}),
        "AdapterHub BatchSplit": Work("theirs", {"generate": partial(run_with, split)}),
        "AdapterHub, one shared": Work("theirs", {"generate": partial(run_with, names[0])}),
    }


def swap(model: Any, size: int) -> dict[str, Work]:
    """Return the work of replacing a prefix of ``size`` bytes in a store with other prefixes."""
    config, dtype = model.config, model.dtype
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads
    length = size // (2 * layers * heads * width * dtype.itemsize)
    pairs = [tuple(torch.randn(heads, length, width).to(dtype) for _ in range(2)) for _ in range(layers)]
    state = fastprefix.PrefixState(pairs)  # type: ignore[arg-type]
    store = fastprefix.AdapterStore(model, tokens=4 * length)
    for name in ("one", "two", "three"):
        store.load(name, state)
    places = [tuple(torch.empty_like(tensor, device=model.device) for tensor in pair) for pair in pairs]

    def copy() -> None:
        for pair, place in zip(pairs, places, strict=True):
            for source, target in zip(pair, place, strict=True):
                target.copy_(source)

    return {
        "copy": Work("floor", {"swap": copy}),
        "store": Work("ours", {"swap": lambda: store.load("two", state)}),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=10, seconds=2.0, dtypes=["float32", "bfloat16"])
    parser.add_argument("--adapterhub", action="store_true", help="measure AdapterHub's package, in its environment")


def run(options: argparse.Namespace) -> int:
    return run_suite("many-adapters", list_problems, options)
