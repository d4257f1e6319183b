"""Measure a decoder with a prefix of thousands of keys: training steps, and decoding one token for several rows.

The floor is the frozen model without a prefix. Its backward pass reaches the output of the embeddings. The memory of a
step does not include the parameters and gradients, which exist before it.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from . import models
from .measure import Work
from .peers import FLOOR, ModelPeer, list_peers
from .suite import DTYPES, Problem, add_common, positive, run_suite

SHAPE: dict[str, Any] = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 1536, "vocab_size": 4096,
}  # fmt: skip
QUICK: dict[str, Any] = {**SHAPE, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 256}
PEERS = (FLOOR, "cartridge", "cartridge, values", "PEFT cartridge", "PEFT prefix tuning")
LENGTHS, TOKENS, ROWS, PAST = (2048, 8192), 1024, 8, 32  # of a row in training; rows and cached tokens in decoding


def build_work(peer: ModelPeer, model: Any, row: Tensor, rows: Tensor) -> Work:
    """Return the work of a peer: a training step on ``row``, and decoding a token after the cached part of ``rows``."""

    def step() -> None:
        model.train()
        model(input_ids=row, labels=row).loss.backward()
        model.zero_grad(set_to_none=False)

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache: Any = None

    @torch.no_grad()
    def decode() -> None:
        nonlocal cache
        if cache is None:  # in the warm-up round
            model.eval()
            cache = model(input_ids=rows[:, :-1], use_cache=True).past_key_values
        inner(input_ids=rows[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return Work(peer.role, {"step": step, "decode": decode})


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    tokens, rows, lengths = (16, 2, (32,)) if options.quick else (TOKENS, ROWS, options.prefix)
    shape: dict[str, Any] = {**(QUICK if options.quick else SHAPE), "attn_implementation": models.ATTENTION}
    config = transformers.Qwen3Config(**shape)
    for name in options.dtype:
        base: Any = models.build("causal_lm", config, device)
        base.to(DTYPES[name])
        for P in lengths:
            row, batch = (torch.randint(config.vocab_size, s, device=device) for s in ((1, tokens), (rows, PAST)))
            works = {
                p.name: build_work(p, p.copy_and_prepare(base), row, batch)
                for p in list_peers(PEERS, "causal_lm", P, tokens)
            }
            yield {"P": P, "N": tokens, "rows": rows, "dtype": name}, works


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=10, dtypes=["float32", "bfloat16"])
    parser.add_argument("--prefix", type=positive, nargs="+", default=LENGTHS, metavar="P", help="prefix lengths")


run = partial(run_suite, "long-prefixes", list_problems)
