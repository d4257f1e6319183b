"""Prefix attention and its peers in PyTorch, on grids of shapes, types and masks.

``fused`` is this package. ``concat`` concatenates the gated prefix and the tokens and runs SDPA. ``tokens``, the floor,
is SDPA on the tokens without a prefix. With ``--flex``, ``flex`` is concatenation and compiled FlexAttention, which has
no backward pass on a CPU. With ``--dropout P``, all of them drop probabilities. There is one gate per row and prefix token.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastprefix

from . import kernels
from .kernels import KernelPeer, Problem
from .measure import BenchmarkError
from .options import DTYPES, set_up

DESCRIPTION = "prefix_attention against gated concatenation, and against attention without a prefix."


class Shape(NamedTuple):
    """Batch, heads, tokens of query and key, head size, prefix tokens."""

    B: int
    Hq: int
    Hkv: int
    N: int
    M: int
    D: int
    P: int


SHAPES = (
    Shape(8, 12, 12, 128, 128, 64, 20),
    Shape(4, 8, 8, 512, 512, 64, 100),
    Shape(1, 8, 8, 2048, 2048, 64, 128),
    Shape(16, 12, 12, 64, 64, 64, 100),
    Shape(4, 32, 8, 256, 256, 128, 64),
    Shape(16, 12, 12, 1, 512, 64, 100),
)
QUICK = (Shape(2, 4, 2, 32, 32, 16, 8),)
BACKENDS = {"cpu": "cpu", "cuda": "triton"}


class Inputs:
    """Hold the tensors of one shape, and compute the output of each peer."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, causal: bool, device: torch.device, dropout_p: float = 0.0
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

        B, Hq, Hkv, N, M, D, P = shape
        self.causal, self.dropout_p, self.grouped = causal, dropout_p, Hq != Hkv
        self.q, self.k, self.v = draw(B, Hq, N, D), draw(B, Hkv, M, D), draw(B, Hkv, M, D)
        self.pk, self.pv, self.gate = draw(Hkv, P, D), draw(Hkv, P, D), draw(B, 1, P)
        self.grad = draw(B, Hq, N, D).detach()
        self.mask_tokens = build_mask(N, M, 0, device) if causal and N != M else None
        self.mask = build_mask(N, M, P, device) if causal else None

    def run_fused(self) -> Tensor:
        """Run this package."""
        return fastprefix.prefix_attention(
            self.q, self.k, self.v, self.pk, self.pv, prefix_gate=self.gate, is_causal=self.causal,
            dropout_p=self.dropout_p, backend=BACKENDS[self.q.device.type],
        )  # fmt: skip

    def concatenate(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the gated prefix and the tokens."""
        gate, batch = self.gate[..., None], self.q.shape[0]
        k = torch.cat([(self.pk * gate).expand(batch, -1, -1, -1), self.k], dim=2)
        v = torch.cat([(self.pv * gate).expand(batch, -1, -1, -1), self.v], dim=2)
        return k, v

    def run_concat(self) -> Tensor:
        """Run what a user without these kernels writes."""
        k, v = self.concatenate()
        return F.scaled_dot_product_attention(
            self.q, k, v, attn_mask=self.mask, dropout_p=self.dropout_p, enable_gqa=self.grouped
        )

    def compile_flex(self) -> Callable[[], Tensor]:
        """Return the same with FlexAttention, compiled for this shape."""
        N, M, P = self.q.shape[2], self.k.shape[2], self.pk.shape[1]
        seen, mask = P + M - N, None
        if self.causal:
            mask = create_block_mask(lambda b, h, i, j: j <= i + seen, None, None, N, P + M, str(self.q.device))
        compiled = torch.compile(flex_attention, dynamic=False)

        def call() -> Tensor:
            # On a CPU it refuses inputs that require gradients, even where none are computed.
            query = self.q if torch.is_grad_enabled() else self.q.detach()
            output: Tensor = compiled(query, *self.concatenate(), block_mask=mask, enable_gqa=self.grouped)
            return output

        return call

    def run_tokens(self) -> Tensor:
        """Run attention without a prefix."""
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=self.mask_tokens, dropout_p=self.dropout_p,
            is_causal=self.causal and self.mask_tokens is None, enable_gqa=self.grouped,
        )  # fmt: skip

    def peers(self, flex: bool = False) -> dict[str, KernelPeer]:
        """Return all peers with the tensors that each trains."""
        tokens = (self.q, self.k, self.v)
        everything = (*tokens, self.pk, self.pv, self.gate)
        peers = {
            "fused": KernelPeer("ours", self.run_fused, everything),
            "concat": KernelPeer("theirs", self.run_concat, everything),
            "tokens": KernelPeer("floor", self.run_tokens, tokens),
        }
        return peers | ({"flex": KernelPeer("theirs", self.compile_flex(), everything if self.q.is_cuda else ())} if flex else {})


def build_mask(N: int, M: int, P: int, device: torch.device) -> Tensor:
    """Return the mask of N causal queries over P prefix tokens and M tokens, in the form that SDPA is fastest with."""
    if device.type == "cuda":
        bias: Tensor = causal_lower_right(N, P + M)
        return bias
    return torch.ones(N, P + M, dtype=torch.bool).tril(P + M - N)


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Return every shape in every type, with and without a causal mask."""
    for shape in QUICK if options.quick else SHAPES:
        if options.dropout and shape.N == 1:
            continue  # nothing is dropped where tokens are generated
        for dtype in options.dtype:
            for causal in (False, True):
                torch.compiler.reset()  # remove what was compiled for another shape
                inputs = Inputs(shape, DTYPES[dtype], causal, device, options.dropout)
                case = {**shape._asdict(), "dtype": dtype, "causal": causal}
                yield Problem(case, inputs.peers(options.flex), inputs.grad)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    kernels.add_arguments(parser, dtypes=["float32", "bfloat16"])
    parser.add_argument("--flex", action="store_true", help="FlexAttention too; it compiles anew for each case")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="drop probabilities; a separate file")


def run(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    if not 0 <= options.dropout < 1 or (options.dropout and options.flex):
        raise BenchmarkError("--dropout must be at least 0 and below 1, and FlexAttention has none")
    device = set_up(options)
    problems = list_problems(options, device)
    if options.dropout:
        return kernels.run("attention-dropout", problems, options, device, dropout=options.dropout)
    return kernels.run("attention", problems, options, device)
