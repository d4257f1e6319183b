"""A soft prompt that runs once for the whole batch, against one that runs in every row, and against none.

All of them are measured in turns on one frozen Llama-shaped model: the floor, the prompt methods on the shared path,
prompt tuning in every row (textbook), the methods merged for inference, and PEFT's prompt tuning. Measured: a training
step, the prefill (a forward pass that fills a cache), and decoding one token after it.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastprefix
from fastprefix.methods import MethodConfig

from . import models
from .measure import Problem, time_call
from .models import Size
from .peers import ADEPT_WIDTH, DEPT_RANK, FLOOR, ModelPeer, attach, build_works, freeze, list_peft_peers, merge
from .results import Record
from .suite import ModelWork, add_common, positive, run_suite, set_up

DESCRIPTION = "A soft prompt that runs once for the whole batch: training steps, prefill, decoding, memory."
FULL = Size(layers=6, width=512, heads=8, vocabulary=4096, rows=16, length=128)
QUICK = Size(layers=2, width=64, heads=2, vocabulary=512, rows=2, length=16)
LENGTHS = (20, 60, 100)
DECODED = 32  # tokens


def list_peers(S: int, length: int) -> list[ModelPeer]:
    """Return the floor, the methods on the shared path, textbook, merged, and PEFT's prompt tuning."""
    configs: dict[str, Callable[..., MethodConfig]] = {
        "PT": partial(fastprefix.PromptTuningConfig, S),
        "DePT": partial(fastprefix.DePTConfig, S, rank=DEPT_RANK, max_length=length + DECODED),
        "ADePT": partial(fastprefix.ADePTConfig, S, bottleneck_dim=ADEPT_WIDTH),
    }
    peers = [ModelPeer(FLOOR, "floor", freeze)]
    for name, make in configs.items():
        peers.append(ModelPeer(f"{name} shared", "ours", partial(attach, config=make(shared_prompt=True))))
    peers.append(ModelPeer("PT textbook", "ours", partial(attach, config=configs["PT"](shared_prompt=False))))
    for name, make in configs.items():
        peers.append(ModelPeer(f"{name} merged", "ours", partial(merge, config=make()), trains=False))
    return peers + list_peft_peers("causal_lm", S, "PEFT PT", "")[:1]


class PromptWork(ModelWork):
    """Add prefill and decoding to a training step."""

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Return the batch without labels."""
        return {name: tensor for name, tensor in self.batch.items() if name != "labels"}

    @torch.no_grad()
    def prefill(self) -> None:
        """Run all tokens at once into a cache, and compute the logits of the last."""
        self.model.eval()
        self.model(**self.tokens, use_cache=True, logits_to_keep=1)

    def decode(self) -> float:
        """Return the seconds per token: the time of many tokens less that of one."""
        many, one = (time_call(partial(self.generate, tokens), self.model.device) for tokens in (DECODED, 1))
        return (many - one) / (DECODED - 1)

    @torch.no_grad()
    def generate(self, tokens: int) -> None:
        """Generate tokens greedily."""
        self.model.eval()
        options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, "eos_token_id": None}
        self.model.generate(**self.tokens, pad_token_id=0, **options)


def build_problem(size: Size, S: int, device: torch.device) -> Problem:
    """Build all peers at one length of the prompt."""
    peers = list_peers(S, size.length)
    base = models.build("causal_lm", models.configure("causal_lm", size), device)
    works = build_works(peers, base, models.draw_batch("causal_lm", size, size.length, device), PromptWork)
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "step": {peer.name: works[peer.name].step for peer in peers if peer.trains},
        "prefill": {name: work.prefill for name, work in works.items()},
        "decode": {name: work.decode for name, work in works.items()},
    }
    return Problem({"S": S, **size._asdict()}, {peer.name: peer.role for peer in peers}, calls, self_timed=["decode"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--rounds", type=positive, help="default: 15; 2 with --quick")
    parser.add_argument("--prompt", type=positive, nargs="+", default=LENGTHS, metavar="S", help="its lengths")


def run(options: argparse.Namespace) -> int:
    device = set_up(options)
    size, rounds = (QUICK, 2) if options.quick else (FULL, 15)
    record, problems = (
        Record.start("shared-prompt", device, options.quick),
        (build_problem(size, S, device) for S in options.prompt),
    )
    return run_suite(record, problems, options.out, device, partial(range, (options.rounds or rounds) + 1))
