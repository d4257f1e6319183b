"""Compare soft prompts that run once for the whole batch, prompts that run in every row, and no prompt.

The peers are measured alternately on one frozen Llama-shaped model. They are the floor, the prompt methods on the
shared path, prompt tuning in every row (textbook), the methods merged for inference, and PEFT's prompt tuning. The
suite measures a training step, the prefill (a forward pass that fills a cache), and decoding one token after it.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import models
from .measure import Work, time_call
from .models import Size
from .peers import FLOOR, ModelPeer, list_peers
from .suite import Problem, add_common, build_model_work, positive, run_suite

FULL = Size(layers=6, width=512, heads=8, vocabulary=4096, rows=16, length=128)
QUICK = Size(layers=2, width=64, heads=2, vocabulary=512, rows=2, length=16)
LENGTHS = (20, 60, 100)
DECODED = 32  # tokens
PEERS = (FLOOR, "PT", "DePT", "ADePT", "PT textbook", "PT merged", "DePT merged", "ADePT merged", "PEFT PT")


def build_work(peer: ModelPeer, model: Any, batch: dict[str, Tensor]) -> Work:
    """Return the work of a peer: a training step, the prefill, and the seconds of a generated token."""
    tokens = {name: tensor for name, tensor in batch.items() if name != "labels"}
    work = build_model_work(peer.role, model, batch)

    @torch.no_grad()
    def prefill() -> None:
        """Fill a cache with all tokens in one forward pass, and compute the logits of the last token."""
        model.eval()
        model(**tokens, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def generate(count: int) -> None:
        model.eval()
        options = {"max_new_tokens": count, "do_sample": False, "use_cache": True, "eos_token_id": None}
        model.generate(**tokens, pad_token_id=0, **options)

    def decode() -> float:
        """Return the seconds per token, from the difference of the times for many tokens and for one token."""
        many, one = (time_call(partial(generate, count), model.device) for count in (DECODED, 1))
        return (many[0] - one[0]) / (DECODED - 1)

    step = {"step": work.calls["step"]} if not peer.name.endswith("merged") else {}
    return Work(peer.role, {**step, "prefill": prefill, "decode": decode})


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Yield the problem of each prompt length, with all peers."""
    size = QUICK if options.quick else FULL
    base = models.build("causal_lm", models.configure("causal_lm", size), device)
    batch = models.draw_batch("causal_lm", size, size.length, device)
    for S in options.prompt:
        peers = list_peers(PEERS, "causal_lm", S, size.length + DECODED)
        yield {"S": S, **size._asdict()}, {p.name: build_work(p, p.copy_and_prepare(base), batch) for p in peers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=15)
    parser.add_argument("--prompt", type=positive, nargs="+", default=LENGTHS, metavar="S", help="prompt lengths")


run = partial(run_suite, "shared-prompt", list_problems)
