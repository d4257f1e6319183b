"""Measure training steps in the settings of PEFT's method comparison.

The model has the shape of Llama 3.2 3B, four rows of 768 tokens, and dtype bfloat16. Methods of this package start with
the parameters of PEFT's methods. Their losses must agree before they are timed. Peers share the frozen weights.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastprefix

from ..measure import Add, Work, figure_row, keep_going, measure
from ..models import Size, build, configure, draw_batch
from ..peers import FLOOR, ModelPeer, Prepared, freeze, share_weights, wrap_with_peft
from ..results import describe_times
from . import device, jobs

SIZE = Size(layers=28, width=3072, heads=24, vocabulary=128_256, rows=4, length=768)
RANK = 32
LIMIT = 0.01
"""The largest relative difference of two losses in bfloat16."""
WARMUP, ROUNDS = 3, 10
ROUNDS_SHARE = 0.4  # of the time is kept for the rounds
SETTINGS = (("PromptTuningConfig", 200), ("PrefixTuningConfig", 200), ("PrefixTuningConfig", 50))


def tune_low_rank(model: Any) -> Prepared:
    """Return the model with PEFT's LoRA on queries and values."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return Prepared(peft.get_peft_model(model, config))


def attach(model: Any, wrap: Callable[[Any], Prepared]) -> Prepared:
    """Return the model with the same method as PEFT's, and with its initial parameters."""
    with tempfile.TemporaryDirectory() as folder:
        wrapped: Any = wrap(share_weights(model)).model
        wrapped.save_pretrained(folder)
        return Prepared(fastprefix.load_adapter(model, folder))


def list_peers() -> list[ModelPeer]:
    """Return the floor, LoRA, and each method in PEFT, in accelerated PEFT, and in this package."""
    peers = [ModelPeer(FLOOR, "floor", freeze), ModelPeer(f"LoRA r{RANK}", "theirs", tune_low_rank)]
    for config, tokens in SETTINGS:
        name = f"{config.removesuffix('TuningConfig').lower()} {tokens}"
        wrap = partial(wrap_with_peft, kind="causal_lm", config=config, tokens=tokens, rate=1e-3)
        peers.append(ModelPeer(f"PEFT, {name}", "theirs", wrap))
        peers.append(ModelPeer(f"accelerated, {name}", "ours", partial(wrap, accelerated=True)))
        peers.append(ModelPeer(f"fastprefix, {name}", "ours", partial(attach, wrap=wrap)))
    return peers


def build_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a function that runs a training step and returns the loss before it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    model.train()

    def step() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure_methods(add: Add, seconds: float) -> None:
    """Prepare as many peers as the time allows, compare their losses, and measure their steps in interleaved rounds."""
    end = time.monotonic() + seconds * (1 - ROUNDS_SHARE)
    case = {"model": "Llama 3.2 3B", "rows": SIZE.rows, "tokens": SIZE.length, "dtype": "bfloat16"}
    config: Any = configure("causal_lm", SIZE)
    config.num_key_value_heads, config.tie_word_embeddings = SIZE.heads // 3, True
    with torch.device(device.CUDA):
        base = build("causal_lm", config, device.CUDA)
    batch = draw_batch("causal_lm", SIZE, SIZE.length, device.CUDA)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 0] = -100  # in PEFT, the last token of a prompt would predict it
    losses, works = dict[str, float](), dict[str, Work]()
    for peer in jobs.limit_time("methods", end, list_peers()):
        with keep_going(add, case, peer.name, "methods"):
            torch.manual_seed(0)  # so that a method of PEFT starts with the same parameters in each of its peers
            step = build_step(peer.copy_and_prepare(base), batch)
            losses[peer.name] = step().item()
            about = (case, peer.name, peer.role, "step")
            add([figure_row(*about, "loss", losses[peer.name])], [])
            if peer.role == "ours":
                other = f"PEFT, {peer.name.partition(', ')[2]}"
                difference = abs(losses[peer.name] / losses[other] - 1)
                add([figure_row(*about, "relative difference", difference)], [])
                if not difference <= LIMIT:
                    raise RuntimeError(f"its loss differs from that of {other} by {difference:.1e}, more than {LIMIT}")
            works[peer.name] = Work(peer.role, {"step": step})
    rows, faults = measure(case, works, device.CUDA, partial(range, WARMUP + ROUNDS), warmup=WARMUP)
    clocks = device.read_clocks()
    add([row | {"clocks": clocks} for row in rows], faults)
    print(describe_times(rows), flush=True)
