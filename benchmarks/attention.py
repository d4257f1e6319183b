"""Prefix attention against what PyTorch offers, on grids of shapes, types and masks.

``fused`` is this package, ``concat`` gated concatenation and then SDPA; ``tokens``, the floor, is SDPA on the tokens
alone: no prefix at all. With ``--flex``, ``flex`` is gated concatenation and then compiled FlexAttention, which has no
backward on a CPU. With ``--dropout P``, all of them drop probabilities, as models do that train with dropout. The gate
is one for each row and prefix token.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastprefix

from . import kernels, options
from .errors import BenchmarkError
from .kernels import Peer, Problem
from .options import DTYPES

NAME = "attention"
DESCRIPTION = "prefix_attention against gated concatenation, and against attention without a prefix."


@dataclass(frozen=True)
class Shape:
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
TARGETS = {
    "float32 forward": 1.9,
    "bfloat16 forward": 3.4,
    "float32 forward+backward": 1.7,
    "bfloat16 forward+backward": 3.3,
}
"""Geometric means over concatenation, on two AVX-512 cores."""
BACKENDS = {"cpu": "cpu", "cuda": "triton"}


class Inputs:
    """Tensors of one shape, and the peers on them."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, causal: bool, device: torch.device, dropout_p: float = 0.0
    ) -> None:
        """Draw them."""
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

        s = shape
        self.causal, self.dropout_p = causal, dropout_p
        self.q, self.k, self.v = draw(s.B, s.Hq, s.N, s.D), draw(s.B, s.Hkv, s.M, s.D), draw(s.B, s.Hkv, s.M, s.D)
        self.pk, self.pv = draw(s.Hkv, s.P, s.D), draw(s.Hkv, s.P, s.D)
        self.gate = draw(s.B, 1, s.P)
        self.grad = draw(s.B, s.Hq, s.N, s.D).detach()
        self.grouped = s.Hq != s.Hkv
        self.mask_tokens = lower_right(s.N, s.M, 0, device) if causal and s.N != s.M else None
        self.mask = lower_right(s.N, s.M, s.P, device) if causal else None

    def fused(self) -> Tensor:
        """This package."""
        backend = BACKENDS[self.q.device.type]
        return fastprefix.prefix_attention(
            self.q,
            self.k,
            self.v,
            self.pk,
            self.pv,
            prefix_gate=self.gate,
            is_causal=self.causal,
            dropout_p=self.dropout_p,
            backend=backend,
        )

    def concatenated(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the gated prefix and the tokens."""
        gate, batch = self.gate[..., None], self.q.shape[0]
        k = torch.cat([(self.pk * gate).expand(batch, -1, -1, -1), self.k], dim=2)
        v = torch.cat([(self.pv * gate).expand(batch, -1, -1, -1), self.v], dim=2)
        return k, v

    def concat(self) -> Tensor:
        """What a user without these kernels writes."""
        k, v = self.concatenated()
        return F.scaled_dot_product_attention(
            self.q, k, v, attn_mask=self.mask, dropout_p=self.dropout_p, enable_gqa=self.grouped
        )

    def flex(self) -> Callable[[], Tensor]:
        """The same with FlexAttention, compiled for this shape."""
        N, M, seen = self.q.shape[2], self.k.shape[2], self.pk.shape[1] + self.k.shape[2] - self.q.shape[2]
        mask = None
        if self.causal:
            columns = self.pk.shape[1] + M
            mask = create_block_mask(lambda b, h, i, j: j <= i + seen, None, None, N, columns, str(self.q.device))
        compiled = torch.compile(flex_attention, dynamic=False)

        def call() -> Tensor:
            query = self.q if torch.is_grad_enabled() else self.q.detach()  # it asks on a CPU, even without gradients
            output: Tensor = compiled(query, *self.concatenated(), block_mask=mask, enable_gqa=self.grouped)
            return output

        return call

    def tokens(self) -> Tensor:
        """No prefix."""
        return F.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            attn_mask=self.mask_tokens,
            dropout_p=self.dropout_p,
            is_causal=self.causal and self.mask_tokens is None,
            enable_gqa=self.grouped,
        )

    def peers(self, flex: bool = False) -> dict[str, Peer]:
        """All of them, with what each trains."""
        tokens = (self.q, self.k, self.v)
        everything = (*tokens, self.pk, self.pv, self.gate)
        peers = {
            "fused": Peer("ours", self.fused, everything),
            "concat": Peer("peer", self.concat, everything),
            "tokens": Peer("floor", self.tokens, tokens),
        }
        if flex:
            peers["flex"] = Peer("peer", self.flex(), everything if self.q.is_cuda else ())
        return peers


def lower_right(N: int, M: int, P: int, device: torch.device) -> Tensor:
    """The mask of N causal queries over P prefix tokens and M tokens, in the form that SDPA is fastest with."""
    if device.type == "cuda":
        bias: Tensor = causal_lower_right(N, P + M)
        return bias
    return torch.ones(N, P + M, dtype=torch.bool).tril(P + M - N)


def problems(arguments: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Every shape, in every type, with and without a causal mask."""
    for shape in QUICK if arguments.quick else SHAPES:
        if arguments.dropout and shape.N == 1:
            continue  # nothing is dropped where tokens are generated
        for dtype in arguments.dtype:
            for causal in (False, True):
                torch.compiler.reset()  # what was compiled for another shape
                inputs = Inputs(shape, DTYPES[dtype], causal, device, arguments.dropout)
                case = {**asdict(shape), "dtype": dtype, "causal": causal}
                yield Problem(case, inputs.peers(arguments.flex), inputs.grad)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's options."""
    kernels.add_arguments(parser, dtypes=["float32", "bfloat16"])
    parser.add_argument("--flex", action="store_true", help="FlexAttention too; it compiles anew for each case")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="drop probabilities; its own results")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    if not 0 <= arguments.dropout < 1 or (arguments.dropout and arguments.flex):
        raise BenchmarkError("--dropout takes a number from 0 to below 1, and FlexAttention has none")
    device = options.device_for(arguments.device)
    grid = problems(arguments, device)
    if arguments.dropout:
        return kernels.run(f"{NAME}-dropout", grid, {"dropout": arguments.dropout}, arguments, device)
    return kernels.run(NAME, grid, {"targets": TARGETS}, arguments, device)
