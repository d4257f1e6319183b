"""Compare visual prompts that run once for the whole batch with the same prompts in every image.

The peers are measured alternately on one frozen ViT. They are the floor, this package's VPT and SHIP, and eager
versions of both, with prompt tokens in every image and PyTorch's attention. The suite measures a training step and
inference. The prompt tokens of shallow VPT depend on the image, so this package also runs them in every image.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

import fastprefix
from fastprefix.integrations.transformers.vision.visual_prompt import find_vision_stack
from fastprefix.methods import METHODS, MethodConfig, VisualMethod

from .models import ATTENTION, place
from .peers import FLOOR, ModelPeer, Prepared, attach, freeze, freeze_body
from .suite import Problem, add_common, build_model_work, positive, run_suite

APART = "rows apart"  # name of the eager version of SHIP's attention
RATE = 1e-2
LENGTHS = (10, 50)


class ImageSize(NamedTuple):
    """The size of a ViT and of its batches."""

    layers: int
    width: int
    heads: int
    side: int
    patch: int
    images: int


FULL = ImageSize(layers=6, width=384, heads=6, side=224, patch=16, images=16)
QUICK = ImageSize(layers=3, width=32, heads=2, side=16, patch=4, images=2)


class EagerRows(nn.Module):
    """A model with a visual method in eager PyTorch. The prompt tokens follow the tokens of every image."""

    def __init__(self, model: Any, config: MethodConfig) -> None:
        super().__init__()
        self.model = model
        stack = find_vision_stack(model)
        freeze_body(model)
        method_class: Any = METHODS[config.method_name()][1]
        self.method: VisualMethod = method_class(config, stack.shape)
        self.method.reset_parameters()
        self.to(device=model.device, dtype=model.dtype)
        self.tokens = 0  # number of image tokens, which come before the prompt tokens
        for index, block in enumerate(stack.blocks):
            block.register_forward_pre_hook(partial(self.enter, index), with_kwargs=True)
        stack.blocks[-1].register_forward_hook(self.leave)
        if self.method.strength(0) is None:
            return
        AttentionInterface.register(APART, attend_apart)
        model.set_attn_implementation(APART)
        for index, attention in enumerate(stack.attentions):
            vars(attention)["rows_apart"] = (self, self.method.strength(index))

    @classmethod
    def prepare(cls, model: PreTrainedModel, config: MethodConfig) -> Prepared:
        return Prepared(cls(model, config))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        """Return the output of the model."""
        return self.model(pixel_values=pixel_values, labels=labels)

    def enter(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the prompt tokens after the image tokens with those of a layer (a forward pre-hook)."""
        states, *others = args
        if index == 0:
            self.tokens = states.shape[1]
        former = states[:, self.tokens :] if index else None
        rows = self.method.make_rows(index, former, len(states))
        return (torch.cat([states[:, : self.tokens], rows.to(states)], dim=1), *others), kwargs

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Remove the prompt tokens after the last layer (a forward hook)."""
        if isinstance(output, tuple):
            return (output[0][:, : self.tokens], *output[1:])
        return output[:, : self.tokens]


def attend_apart(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attend from image tokens to image tokens and to prompt tokens in separate softmaxes.

    The output of a prompt token is its own value.
    """
    eager, share = module.rows_apart
    if share is None:
        return AttentionInterface()[ATTENTION](module, query, key, value, mask, **kwargs)
    of_tokens, of_rows = ((tensor[:, :, : eager.tokens], tensor[:, :, eager.tokens :]) for tensor in (key, value))
    query = query[:, :, : eager.tokens]
    to_tokens, to_rows = (
        F.scaled_dot_product_attention(query, k, v, scale=kwargs["scaling"])
        for k, v in zip(of_tokens, of_rows, strict=True)
    )
    output = torch.cat([(1.0 - share) * to_tokens + share * to_rows, of_rows[1]], dim=2)
    return output.transpose(1, 2), None


def build(size: ImageSize, device: torch.device) -> PreTrainedModel:
    """Build a ViT with random weights that classifies images."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_labels": 10, "attn_implementation": ATTENTION}
    config = transformers.ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        image_size=size.side,
        patch_size=size.patch,
        initializer_range=size.width**-0.5,
        **options,
    )
    return place(transformers.ViTForImageClassification(config), device)


def draw_batch(size: ImageSize, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw random images, and labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(size.images, 3, size.side, size.side, generator=generator)
    labels = torch.randint(0, 10, (size.images,), generator=generator)
    return {"pixel_values": pixels.to(device, dtype), "labels": labels.to(device)}


def list_configs(rows: int, layers: int) -> dict[str, MethodConfig]:
    """Return the methods, each with ``rows`` prompt tokens in an entered layer. SHIP enters every second layer."""
    return {
        "VPT shallow": fastprefix.VisualPromptConfig(rows),
        "VPT deep": fastprefix.VisualPromptConfig(rows, depth="deep"),
        "SHIP": fastprefix.SHIPConfig(rows, layers=list(range(0, layers, 2))),
    }


def list_image_peers(rows: int, layers: int) -> list[ModelPeer]:
    """Return the floor, and each method in this package and in eager PyTorch."""
    peers = [ModelPeer(FLOOR, "floor", freeze)]
    for name, config in list_configs(rows, layers).items():
        peers.append(ModelPeer(name, "ours", partial(attach, config=config, main=RATE)))
        peers.append(ModelPeer(f"{name}, in every image", "theirs", partial(EagerRows.prepare, config=config)))
    return peers


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Yield the problem of each number of prompt tokens, with all peers."""
    size = QUICK if options.quick else FULL
    base = build(size, device)
    batch = draw_batch(size, device, base.dtype)
    for P in options.prompt:
        peers = list_image_peers(P, size.layers)
        works = {peer.name: build_model_work(peer.role, peer.copy_and_prepare(base), batch) for peer in peers}
        yield {"P": P, **size._asdict()}, works


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=15)
    parser.add_argument("--prompt", type=positive, nargs="+", default=LENGTHS, metavar="P", help="tokens per layer")


def run(options: argparse.Namespace) -> int:
    return run_suite("visual-prompts", list_problems, options)
