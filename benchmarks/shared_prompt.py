"""A soft prompt that runs once for the whole batch, against one that runs in every row, and against none.

All of them are measured in turns on one frozen Llama-shaped model: the floor, the prompt methods on the shared path,
prompt tuning in every row (textbook), the methods merged for inference, and PEFT's prompt tuning. Measured: a training
step, the prefill (a forward pass that fills a cache), and decoding one token after it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastprefix
from fastprefix.methods import MethodConfig

from . import models
from .measure import Clock, measure
from .models import Size
from .options import add_common, positive, set_up
from .peers import ADEPT_WIDTH, DEPT_RANK, FLOOR, ModelPeer, attach, freeze, list_peft_peers, merge
from .report import tabulate_shared_prompt
from .results import Record
from .steps import ModelWork

DESCRIPTION = "A soft prompt that runs once for the whole batch: training steps, prefill, decoding, memory."
FULL = Size(layers=6, width=512, heads=8, vocabulary=4096, rows=16, length=128)
QUICK = Size(layers=2, width=64, heads=2, vocabulary=512, rows=2, length=16)
LENGTHS = (20, 60, 100)
DECODED = 32  # tokens


def list_peers(S: int, length: int) -> list[ModelPeer]:
    configs: dict[str, Callable[..., MethodConfig]] = {
        "PT": partial(fastprefix.PromptTuningConfig, S),
        "DePT": partial(fastprefix.DePTConfig, S, rank=DEPT_RANK, max_length=length + DECODED),
        "ADePT": partial(fastprefix.ADePTConfig, S, bottleneck_dim=ADEPT_WIDTH),
    }
    textbook = fastprefix.PromptTuningConfig(S, shared_prompt=False)
    return [
        ModelPeer(FLOOR, "floor", freeze),
        *(
            ModelPeer(f"{name} shared", "ours", partial(attach, config=make(shared_prompt=True)))
            for name, make in configs.items()
        ),
        ModelPeer("PT textbook", "ours", partial(attach, config=textbook)),
        *(
            ModelPeer(f"{name} merged", "ours", partial(merge, config=make()), trains=False)
            for name, make in configs.items()
        ),
        *list_peft_peers("causal_lm", S, "PEFT PT", "")[:1],
    ]


class PromptWork(ModelWork):
    """Add prefill and decoding to a training step."""

    @property
    def tokens(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.batch.items() if name != "labels"}

    @torch.no_grad()
    def prefill(self) -> None:
        """Run all tokens at once into a cache, and compute the logits of the last."""
        self.model.eval()
        self.model(**self.tokens, use_cache=True, logits_to_keep=1)

    def decode(self, clock: Clock) -> float:
        """Return the seconds per token: the time of many tokens less that of one."""
        return (clock(partial(self.generate, DECODED)) - clock(partial(self.generate, 1))) / (DECODED - 1)

    @torch.no_grad()
    def generate(self, tokens: int) -> None:
        self.model.eval()
        options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, "eos_token_id": None}
        self.model.generate(**self.tokens, pad_token_id=0, **options)


def build_works(size: Size, peers: list[ModelPeer], device: torch.device) -> dict[str, PromptWork]:
    base = models.build("causal_lm", models.configure("causal_lm", size), device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, size.vocabulary, (size.rows, size.length), generator=generator).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return {peer.name: PromptWork(peer.prepare(models.share_weights(base)).model, batch, peer.role) for peer in peers}


def compare_peers(size: Size, S: int, rounds: int, device: torch.device, record: Record, out: Path) -> None:
    """Measure all peers at one length."""
    peers = list_peers(S, size.length)
    works, clock, case = build_works(size, peers, device), Clock(device), {"S": S, **size._asdict()}
    compare = partial(measure, case, roles={peer.name: peer.role for peer in peers}, device=device)
    steps = {peer.name: works[peer.name].step for peer in peers if peer.trains}
    record.add(compare("step", steps, rounds=range(rounds + 1)), out)
    prefills = {name: work.prefill for name, work in works.items()}
    record.add(compare("prefill", prefills, rounds=range(rounds + 1)), out)
    decodings = {name: partial(work.decode, clock) for name, work in works.items()}
    record.add(compare("decode", decodings, rounds=range(rounds + 1), clock=lambda decode: decode(), memory=False), out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--rounds", type=positive, help="default: 15; 2 with --quick")
    parser.add_argument("--prompt", type=positive, nargs="+", default=LENGTHS, metavar="S", help="its lengths")


def run(options: argparse.Namespace) -> int:
    """Measure, print a table for each length, write."""
    device = set_up(options)
    size, rounds = (QUICK, 2) if options.quick else (FULL, 15)
    record = Record.start("shared-prompt", device, options.quick)
    for S in options.prompt:
        compare_peers(size, S, options.rounds or rounds, device, record, options.out)
        print(f"{tabulate_shared_prompt(record, S).markdown()}\n", flush=True)
    return record.conclude(options.out)
