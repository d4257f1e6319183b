"""Measure training steps in the settings of PEFT's method comparison.

The model has the shape of Llama 3.2 3B, four rows of 768 tokens, and dtype bfloat16. Methods of this package start with
the parameters of PEFT's methods. Their losses must agree before they are timed. Peers share the frozen weights.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import fastprefix

from ..measure import Role, Row, Work, fault, figure_row, measure
from ..models import Size, build, configure, draw_batch
from ..peers import FLOOR, freeze, share_weights, wrap_with_peft
from ..results import describe_times
from . import device
from .parity import Add

SIZE = Size(layers=28, width=3072, heads=24, vocabulary=128_256, rows=4, length=768)
RANK = 32
LIMIT = 0.01
"""The largest relative difference of two losses in bfloat16."""
WARMUP, ROUNDS = 3, 10
ROUNDS_SHARE = 0.4  # of the time is kept for the rounds
SETTINGS = (("PromptTuningConfig", 200), ("PrefixTuningConfig", 200), ("PrefixTuningConfig", 50))
Step = Callable[[], Tensor]


def describe_case() -> Row:
    """Return the case of all peers."""
    return {"model": "Llama 3.2 3B", "rows": SIZE.rows, "tokens": SIZE.length, "dtype": "bfloat16"}


def configure_model(size: Size) -> transformers.PretrainedConfig:
    """Return the configuration of a model like Llama 3.2 3B."""
    config = configure("causal_lm", size)
    config.num_key_value_heads = size.heads // 3
    config.tie_word_embeddings = True
    return config


class Peer(NamedTuple):
    """A way to train, and the name of the peer that must have the same loss."""

    name: str
    role: Role
    prepare: Callable[[Any], nn.Module]
    same_as: str | None = None


def tune_low_rank(model: Any) -> nn.Module:
    """Return the model with PEFT's LoRA on queries and values."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def wrap(model: Any, config: str, tokens: int) -> Any:
    """Return the model with a method of PEFT. Its initial parameters depend only on the method."""
    torch.manual_seed(0)
    return wrap_with_peft(model, "causal_lm", tokens, config, 1e-3).model


def accelerate(model: Any, config: str, tokens: int) -> nn.Module:
    """Return the model with a method of PEFT after ``fastprefix.accelerate``."""
    accelerated: nn.Module = fastprefix.accelerate(wrap(model, config, tokens))
    return accelerated


def attach(model: Any, config: str, tokens: int) -> nn.Module:
    """Return the model with the same method of this package, and PEFT's initial parameters."""
    with tempfile.TemporaryDirectory() as folder:
        wrap(share_weights(model), config, tokens).save_pretrained(folder)
        attached: nn.Module = fastprefix.load_adapter(model, folder)
    return attached


def list_peers() -> list[Peer]:
    """Return the floor, LoRA, and each method in PEFT, in accelerated PEFT, and in this package."""
    peers = [Peer(FLOOR, "floor", lambda model: freeze(model).model), Peer(f"LoRA r{RANK}", "theirs", tune_low_rank)]
    for config, tokens in SETTINGS:
        name = f"{config.removesuffix('TuningConfig').lower()} {tokens}"
        options: dict[str, Any] = {"config": config, "tokens": tokens}
        peers.append(Peer(f"PEFT, {name}", "theirs", partial(wrap, **options)))
        for prefix, prepare in (("accelerated", accelerate), ("fastprefix", attach)):
            peers.append(Peer(f"{prefix}, {name}", "ours", partial(prepare, **options), f"PEFT, {name}"))
    return peers


def build_step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
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


def prepare_peer(peer: Peer, base: Any, batch: dict[str, Tensor], losses: dict[str, float]) -> tuple[Step, list[Row]]:
    """Return the training step of a peer, and rows with its loss and the difference from an equivalent peer's loss.

    ``losses`` contains the losses of earlier peers by name. The loss of this peer is added to it.
    """
    model = peer.prepare(share_weights(base))
    step = build_step(model, batch)
    losses[peer.name] = step().item()
    about = (describe_case(), peer.name, peer.role, "step")
    rows = [figure_row(*about, "loss", losses[peer.name])]
    if peer.same_as is not None:
        difference = abs(losses[peer.name] / losses[peer.same_as] - 1)
        rows.append(figure_row(*about, "relative difference", difference))
        if not difference <= LIMIT:
            raise RuntimeError(f"its loss differs from that of {peer.same_as} by {difference:.1e}, more than {LIMIT}")
    return step, rows


def measure_methods(add: Add, seconds: float) -> None:
    """Prepare as many peers as the time allows, and measure their steps in interleaved rounds."""
    end, case = time.monotonic() + seconds, describe_case()
    with torch.device(device.CUDA):
        base = build("causal_lm", configure_model(SIZE), device.CUDA)
    batch = draw_batch("causal_lm", SIZE, SIZE.length, device.CUDA)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 0] = -100  # in PEFT, the last token of a prompt would predict it
    losses, works = dict[str, float](), dict[str, Work]()
    for peer in list_peers():
        if time.monotonic() > end - seconds * ROUNDS_SHARE:
            print(f"methods: {peer.name} and the following peers are skipped for lack of time", flush=True)
            break
        try:
            step, rows = prepare_peer(peer, base, batch, losses)
        except Exception as error:  # the failure of one method must not lose the others
            add([], [fault(case, peer.name, "methods", error)])
            continue
        add(rows, [])
        works[peer.name] = Work(peer.role, {"step": step})
    rows, faults = measure(case, works, device.CUDA, partial(range, WARMUP + ROUNDS), warmup=WARMUP)
    clocks = device.read_clocks()
    add([row | {"clocks": clocks} for row in rows], faults)
    print(describe_times(rows), flush=True)
