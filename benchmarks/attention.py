"""Compare prefix attention with its peers in PyTorch, over shapes, dtypes and masks.

``fused`` is this package. ``concat`` concatenates the gated prefix and the tokens and runs SDPA. ``tokens``, the floor,
is SDPA on the tokens without a prefix. ``--flex`` adds ``flex``, which is concatenation and compiled FlexAttention. It
has no backward pass on a CPU. ``--dropout P`` enables dropout of the attention probabilities in all peers. Each row
and prefix token has a gate.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastprefix

from .measure import BenchmarkError, Role, Work
from .peak import measure_peaks
from .suite import DTYPES, Problem, add_common, build_kernel_work, run_suite


class Shape(NamedTuple):
    """The batch size, query and key heads, query and key tokens, head dimension, and prefix tokens."""

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
BACKENDS = {"cpu": None, "cuda": "triton"}  # None: the package's choice. On a GPU, the composed backend is another peer


class Inputs:
    """The tensors of one shape, with a method for each peer.

    ``gate`` is "row" (a gate per row and prefix token), "query" (a gate per query and prefix token), "separate" (two
    softmaxes), "none", or "segments" (no gate, and four packed sequences per row).
    """

    def __init__(
        self, shape: Shape, dtype: Any, causal: bool, device: Any, dropout_p: float = 0.0, gate: str = "row"
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()

        B, Hq, Hkv, N, M, D, P = self.shape = shape
        self.causal, self.dropout_p, self.repeats_heads = causal, dropout_p, False
        self.q, self.k, self.v = draw(B, Hq, N, D), draw(B, Hkv, M, D), draw(B, Hkv, M, D)
        self.pk, self.pv = draw(Hkv, P, D), draw(Hkv, P, D)
        self.grad = draw(B, Hq, N, D).detach()
        names = {"row": "prefix_gate", "query": "prefix_gate", "separate": "output_gate"}
        sizes = {"row": (B, 1, P), "query": (B, Hq, N, P), "separate": (B, Hq)}
        self.gates = {names[gate]: draw(*sizes[gate])} if gate in names else {}
        self.mask_tokens = build_mask(N, M, 0, device) if causal and N != M else None
        self.mask = build_mask(N, M, P, device) if causal else None
        self.segments: tuple[Tensor, Tensor] | None = None
        if gate == "segments":
            of_queries, of_keys = ((torch.arange(length, device=device) * 4 // length).int() for length in (N, M))
            self.segments = (of_queries[None], of_keys[None])
            self.mask_tokens = of_queries[:, None] == of_keys
            self.mask_tokens = self.mask_tokens.tril(M - N) if causal else self.mask_tokens
            self.mask = F.pad(self.mask_tokens, (P, 0), value=True)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, self.pk, self.pv, *self.gates.values())

    def run_fused(self) -> Tensor:
        return self.run_backend(BACKENDS[self.q.device.type])

    def run_backend(self, backend: str | None) -> Tensor:
        options: dict[str, Any] = {"is_causal": self.causal, "dropout_p": self.dropout_p, **self.gates}
        options["segment_ids"] = self.segments
        return fastprefix.prefix_attention(self.q, self.k, self.v, self.pk, self.pv, **options, backend=backend)

    def take_row(self) -> "Inputs":
        """Return the first row of the batch, with the same prefix."""
        row = copy.copy(self)
        row.q, row.k, row.v = (x[:1].detach().requires_grad_() for x in (self.q, self.k, self.v))
        row.grad = self.grad[:1]
        row.gates = {name: gate[:1].detach().requires_grad_() for name, gate in self.gates.items()}
        return row

    def concatenate(self) -> tuple[Tensor, Tensor]:
        """Return the concatenated keys and values of the gated prefix and the tokens."""
        gate, batch = self.gates["prefix_gate"][..., None] if self.gates else 1, self.q.shape[0]
        k = torch.cat([(self.pk * gate).expand(batch, -1, -1, -1), self.k], dim=2)
        v = torch.cat([(self.pv * gate).expand(batch, -1, -1, -1), self.v], dim=2)
        return k, v

    def run_sdpa(self, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        groups = self.shape.Hq // self.shape.Hkv
        if self.repeats_heads:  # for kernels without grouped heads
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        options: dict[str, Any] = {"dropout_p": self.dropout_p, "enable_gqa": groups > 1}
        return F.scaled_dot_product_attention(self.q, k, v, attn_mask=mask, is_causal=causal, **options)

    def run_concat(self) -> Tensor:
        """Run attention the way users write it without these kernels."""
        if "output_gate" in self.gates:
            pk, pv = (t.expand(self.q.shape[0], -1, -1, -1) for t in (self.pk, self.pv))
            return self.run_tokens() + self.gates["output_gate"][..., None, None] * self.run_sdpa(pk, pv)
        return self.run_sdpa(*self.concatenate(), mask=self.mask)

    def run_tokens(self) -> Tensor:
        """Run attention without a prefix."""
        return self.run_sdpa(self.k, self.v, self.mask_tokens, self.causal and self.mask_tokens is None)

    def compile_flex(self) -> Callable[[], Tensor]:
        """Return a call of concatenation and FlexAttention, compiled for this shape."""
        N, columns, mask = self.shape.N, self.shape.P + self.shape.M, None
        if self.causal:

            def is_visible(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return j <= i + columns - N

            mask = create_block_mask(is_visible, None, None, N, columns, str(self.q.device))
        compiled, groups = torch.compile(flex_attention, dynamic=False), self.shape.Hq != self.shape.Hkv

        def call() -> Tensor:
            # On a CPU, FlexAttention refuses inputs that require gradients, even if none are computed.
            query = self.q if torch.is_grad_enabled() else self.q.detach()
            return compiled(query, *self.concatenate(), block_mask=mask, enable_gqa=groups)

        return call

    def works(self, flex: bool = False) -> dict[str, Work]:
        """Return the work of each peer."""
        peers: dict[str, tuple[Role, Callable[[], Tensor], tuple[Tensor, ...]]] = {
            "fused": ("ours", self.run_fused, self.leaves),
            "concat": ("theirs", self.run_concat, self.leaves),
            "tokens": ("floor", self.run_tokens, self.leaves[:3]),
        }
        if flex:
            peers["flex"] = ("theirs", self.compile_flex(), self.leaves if self.q.is_cuda else ())
        return {name: build_kernel_work(*peer, self.grad) for name, peer in peers.items()}


def build_mask(N: int, M: int, P: int, device: torch.device) -> Tensor:
    """Return the mask of N causal queries over P prefix tokens and M tokens, in the form that is fastest in SDPA."""
    bias: Tensor = causal_lower_right(N, P + M)
    return bias if device.type == "cuda" else build_dense_mask(N, M, P, device)


def build_dense_mask(N: int, M: int, P: int, device: torch.device) -> Tensor:
    return torch.ones(N, P + M, dtype=torch.bool, device=device).tril(P + M - N)


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    for shape in QUICK if options.quick else SHAPES:
        if options.dropout and shape.N == 1:
            continue  # generation has no dropout
        for dtype in options.dtype:
            for causal in (False, True):
                torch.compiler.reset()  # remove the code compiled for another shape
                inputs = Inputs(shape, DTYPES[dtype], causal, device, options.dropout)
                case = {**shape._asdict(), "dtype": dtype, "causal": causal}
                yield case, inputs.works(options.flex)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=10, seconds=2.0, dtypes=["float32", "bfloat16"])
    parser.add_argument("--flex", action="store_true", help="also measure FlexAttention, which compiles for each case")
    parser.add_argument(
        "--dropout", type=float, default=0.0, metavar="P", help="attention dropout. Results go to a separate file"
    )


def run(options: argparse.Namespace) -> int:
    if not 0 <= options.dropout < 1 or (options.dropout and options.flex):
        raise BenchmarkError("--dropout must be at least 0 and below 1. It does not work with --flex")
    suite, settings = ("attention-dropout", {"dropout": options.dropout}) if options.dropout else ("attention", {})
    return run_suite(suite, list_problems, options, measure_peaks, **settings)
