"""Choose the kernels, grids and tiles of a call and launch them."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...replay import Replays
from ...targets import Target, divide_up, find_target
from ..arguments import DECLARATION, DIFFERENTIABLE, EAGER_ALONE, AttentionArguments
from ..layout import allocate_gradient, allocate_heads
from ..spans import check_spans, list_columns
from .operands import (
    ABSENT,
    ROWS_PADDING,
    KernelShape,
    Operands,
    Strided,
    build_operands,
    describe_matrix,
    describe_rows,
    keep_rows,
)
from .tiles import AttentionTile, find_tile

_TENSORS = DECLARATION.tensors
_SUM_BLOCK = 1024  # elements per program of the sum kernel
_DECODING = 16  # the most queries for which keys are split over programs
_MOST_PARTS = 64  # the most parts into which keys are split
_PARTS_BLOCK = 16  # parts that the combine kernel loads together
_MOST_BYTES = 64 * 2**20  # the most memory for partial sums of a gradient
_PREFIX = ("prefix_key", "prefix_value", "prefix_key_bias")


def forward(*arguments: Any, target: Target | None = None) -> tuple[Tensor, Tensor]:
    """Return the output [B, Hq, N, Dv] and the normalizers (``AttentionArguments.normalizers_shape``)."""
    a = AttentionArguments._make(arguments)
    check_spans(a)
    results: tuple[Tensor, Tensor] = _run(_forward, a, target)
    return results


def _forward(a: AttentionArguments, target: Target) -> tuple[Tensor, Tensor]:
    launcher = _Launcher(a, target)
    output, normalizers = launcher.allocate_results()
    keys = launcher.M + launcher.longest
    if launcher.N <= _DECODING and keys >= target.split_from:
        launcher.split_keys(output, normalizers)
    else:
        launcher.launch_rows("forward", launcher.operands, describe_matrix(output), normalizers, *launcher.sizes)
    return output, normalizers


def extend(
    a: AttentionArguments, output_of_tokens: Tensor, logsumexp: Tensor, target: Target | None = None
) -> tuple[Tensor, Tensor]:
    """Add the prefix of ``a`` to known attention over the tokens, and return the same results as ``forward``.

    ``logsumexp`` [B, Hq, N] is the log-sum-exp of the tokens' scores. ``a`` has no tokens.
    """
    check_spans(a)
    results: tuple[Tensor, Tensor] = _run(_extend, a, target, (output_of_tokens, logsumexp))
    return results


def _extend(
    a: AttentionArguments, target: Target, output_of_tokens: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor]:
    launcher = _Launcher(a, target)
    output, normalizers = launcher.allocate_results()
    given = (describe_matrix(output_of_tokens), logsumexp.contiguous())
    launcher.launch_rows("extend", launcher.operands, *given, describe_matrix(output), normalizers, *launcher.sizes)
    return output, normalizers


def merge(
    a: AttentionArguments,
    output_of_tokens: Tensor,
    logsumexp_of_tokens: Tensor,
    output_of_prefix: Tensor,
    logsumexp_of_prefix: Tensor,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge known attention over the tokens and over the prefix, and return the same results as ``forward``."""
    parts = (output_of_tokens, logsumexp_of_tokens, output_of_prefix, logsumexp_of_prefix)
    results: tuple[Tensor, Tensor] = _run(_merge, a, target, parts)
    return results


def _merge(a: AttentionArguments, target: Target, *parts: Tensor) -> tuple[Tensor, Tensor]:
    launcher = _Launcher(a, target)
    output, normalizers = launcher.allocate_results()
    given = tuple(describe_matrix(x) if x.ndim == 4 else describe_rows(x) for x in parts)
    operands = keep_rows(launcher.operands)
    launcher.launch_rows("merge", operands, *given, describe_matrix(output), normalizers, launcher.N)
    return output, normalizers


def backward(
    grad_output: Tensor,
    output: Tensor,
    normalizers: Tensor,
    needs_grad: Sequence[bool],
    *arguments: Any,
    given: Tensor | None = None,
    target: Target | None = None,
) -> list[Tensor]:
    """Return the requested gradients in the order of ``DIFFERENTIABLE``.

    ``given`` [B, Hq, N, D] is a known part of the gradient of the queries, which is added to the rest.
    """
    needs = tuple(needs_grad)
    if not any(needs):
        return []
    if grad_output.stride(-1) != 1:  # e.g. an expanded gradient of a sum; kernels load contiguous columns
        grad_output = grad_output.contiguous()
    tensors = (grad_output, output, normalizers, given)
    results: list[Tensor] = _run(_backward, AttentionArguments._make(arguments), target, tensors, needs)
    return results


def _backward(
    a: AttentionArguments,
    target: Target,
    grad_output: Tensor,
    output: Tensor,
    normalizers: Tensor,
    given: Tensor | None,
    needs_grad: tuple[bool, ...],
) -> list[Tensor]:
    needs = DECLARATION.name_needs(needs_grad)
    if refused := needs.intersection(EAGER_ALONE):
        raise ValueError(
            f"the triton backend has no gradient for {' and '.join(sorted(refused))}: use the eager backend"
        )
    step = _BackwardLauncher(a, target, grad_output, output, normalizers, needs)
    step.find_delta()
    if needs & {"query", "prefix_gate"}:
        step.differentiate_queries(given)
    if needs & {"key", "value"}:
        step.differentiate_keys()
    if needs.intersection(_PREFIX):
        step.differentiate_prefix()
    return [step.gradients[name] for name in DIFFERENTIABLE if name in needs]


_REPLAYS = Replays()


def _run(
    function: Callable[..., Any],
    a: AttentionArguments,
    target: Target | None,
    tensors: tuple[Tensor | None, ...] = (),
    *options: Hashable,
) -> Any:
    """Return ``function(a, target, *tensors, *options)``, or the same by repeating an earlier call of the same kind."""
    target, precision = target or find_target(a.query.device), _choose_precision(a.query.dtype)
    return _REPLAYS.run_function(function, a, _TENSORS, target, tensors, options, precision)


@functools.cache
def load_kernels() -> dict[str, Any]:
    """Import Triton and the kernels."""
    from . import backward, decode, forward

    return {
        "forward": forward.prefix_attention_fwd_kernel,
        "extend": forward.prefix_attention_extend_kernel,
        "merge": forward.prefix_attention_merge_kernel,
        "decode": decode.prefix_attention_decode_kernel,
        "combine": decode.prefix_attention_combine_kernel,
        "delta": backward.prefix_attention_bwd_delta_kernel,
        "dq": backward.prefix_attention_bwd_dq_kernel,
        "dkv": backward.prefix_attention_bwd_dkv_kernel,
        "dprefix": backward.prefix_attention_bwd_dprefix_kernel,
        "dgate": backward.prefix_attention_bwd_dgate_kernel,
        "sum": backward.prefix_attention_sum_kernel,
    }


_COMBINING = AttentionTile(16, 16, 16, 4, 1)  # a program combines one query; its tile is [parts, columns of the head]
_UNTABLED = {"combine": _COMBINING, "merge": AttentionTile(32, 16, 16, 4, 1)}


def _choose_precision(dtype: torch.dtype) -> str:
    """Return the precision of products. For float32 it follows PyTorch's setting for matrix products."""
    matmul = torch.backends.cuda.matmul  # PyTorch cannot read the older "allow_tf32" after fp32_precision is set
    return "tf32" if dtype is torch.float32 and matmul.fp32_precision == "tf32" else "ieee"


class _Launcher:
    """The shapes, operands and tiles of a call, and its launches."""

    def __init__(self, a: AttentionArguments, target: Target) -> None:
        self.a = a
        self.target = target
        self.operands = build_operands(a)
        self.B, self.H, self.N, self.D = a.query.shape
        _, self.kv_heads, self.M, self.DV = a.value.shape
        self.P = a.prefix_key.shape[2]
        self.sizes = (self.N, self.M, self.P)
        known = () if a.prefix_spans is None else list_columns(a).values()
        self.longest = min([self.P, *map(int, known)])  # prefix keys per row, or with spans an upper bound

    def find_tile(self, name: str) -> AttentionTile:
        """Return the tile of a kernel from the tables.

        If blocks of prefix keys are only an operand, they are no larger than needed for a short prefix.
        """
        if name == "combine" and self.a.prefix_spans is not None:  # it must divide spans like the decode kernel
            return _COMBINING._replace(BP=self.find_tile("decode").BP)
        if name in _UNTABLED:
            return _UNTABLED[name]
        if name == "dq" and self.M == 0:
            name = "dq of prefix"
        variants = _find_variants(self.operands)
        tile = find_tile(self.target.architecture, name, max(self.D, self.DV), self.a.query.dtype, variants)
        if name == "delta" and self.a.output_gate is None:  # it reads no keys
            return tile._replace(BN=16, BP=16)
        if name in ("forward", "extend", "delta", "dq", "dq of prefix"):
            tile = tile._replace(BP=min(tile.BP, max(16, _next_power_of_two(self.longest))))
        return tile

    def launch(self, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel with its tile, unless the grid is empty."""
        if 0 in grid:
            return
        kernel, tile = load_kernels()[name], self.find_tile(name)
        if "T" in kernel.arg_names:
            constants["T"] = self._describe_shape(tile)
        self.target.launch(kernel, grid, arguments, constants, tile)

    def launch_rows(self, name: str, *arguments: Any) -> None:
        """Launch a kernel with one program per block of queries."""
        blocks = divide_up(self.N, self.find_tile(name).BM)
        self.launch(name, (self.B * self.H * blocks,), *arguments)

    def _describe_shape(self, tile: AttentionTile) -> KernelShape:
        """Return the shape that a kernel is compiled for."""
        DP, DVP = (max(16, _next_power_of_two(size)) for size in (self.D, self.DV))
        precision = _choose_precision(self.a.query.dtype)
        return KernelShape(self.D, self.DV, DP, DVP, tile.BM, tile.BN, tile.BP, precision)

    def allocate_results(self) -> tuple[Tensor, Tensor]:
        """Allocate the output and the normalizers."""
        return allocate_heads(self.a.query, self.DV), self.allocate_floats(*self.a.normalizers_shape)

    def split_keys(self, output: Tensor, normalizers: Tensor) -> None:
        """Compute attention from few queries to many keys in parallel parts of the keys, and combine the parts."""
        tile = self.find_tile("decode")
        queries = self.H // self.kv_heads * self.N
        shared = self.a.prefix_key.shape[0] == 1
        rows = self.B * queries if shared else queries
        prefix_tiles = divide_up(rows, tile.BM) * self.kv_heads * (1 if shared else self.B)
        token_tiles = divide_up(queries, tile.BM) * self.kv_heads * self.B
        prefix_parts, prefix_chunk = self._divide_keys(self.longest, tile.BP, prefix_tiles)
        token_parts, chunk = self._divide_keys(self.M, tile.BN, token_tiles)
        # The host does not know which rows share a span. The number of parts assumes that all rows share a tile, and
        # the number of programs assumes that none do.
        if self.a.prefix_spans is not None:
            prefix_parts, prefix_tiles = max(1, prefix_parts), token_tiles
        prefix_programs, parts = prefix_tiles * prefix_parts, prefix_parts + token_parts
        queries_shape = (self.B, self.H, self.N)
        values = self.allocate_floats(parts, *queries_shape, self.DV)
        sums = self.allocate_floats(parts, 2, *queries_shape)
        sizes = (*self.sizes, prefix_programs, prefix_parts, token_parts, prefix_chunk, chunk)
        grid = (prefix_programs + token_tiles * token_parts,)
        self.launch("decode", grid, self.operands, values, sums, *sizes)
        arguments = (describe_matrix(output), normalizers, values, sums, self.N, prefix_parts, parts)
        grid = (self.B * self.H * self.N,)
        self.launch("combine", grid, keep_rows(self.operands), *arguments, BS=_PARTS_BLOCK)

    def _divide_keys(self, keys: int, block: int, tiles: int) -> tuple[int, int]:
        """Return the number of parts and the keys per part, with enough programs for the device and no empty part."""
        blocks = divide_up(keys, block)
        wanted = min(_MOST_PARTS, 2 * divide_up(self.target.processors, max(1, tiles)))
        chunk = divide_up(max(1, blocks), max(1, min(wanted, blocks))) * block
        return (divide_up(keys, chunk), chunk) if keys else (0, block)

    def allocate_floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.a.query.device)


class _BackwardLauncher(_Launcher):
    """The launches of a backward pass. Each step fills some of ``gradients``."""

    def __init__(
        self,
        a: AttentionArguments,
        target: Target,
        grad_output: Tensor,
        output: Tensor,
        normalizers: Tensor,
        needs: set[str],
    ) -> None:
        super().__init__(a, target)
        self._needs = needs
        self._output, self._do = describe_matrix(output), describe_matrix(grad_output)
        self._normalizers = normalizers
        self._padded = divide_up(self.N, ROWS_PADDING) * ROWS_PADDING
        kinds = 2 if self.operands.exact is None else 3
        self._rows = self.allocate_floats(normalizers.shape[0], kinds, self.B, self.H, self._padded)
        self.gradients: dict[str, Tensor] = {}

    def _allocate_result(self, name: str) -> Tensor | None:
        """Allocate an uninitialized gradient if it is requested, or return None."""
        if name not in self._needs:
            return None
        self.gradients[name] = allocate_gradient(getattr(self.a, name))
        return self.gradients[name]

    def _allocate_part(self, name: str, *shape: int) -> Tensor | None:
        """Allocate float32 sums, one per program, if the gradient is requested, or return None."""
        return self.allocate_floats(*shape) if name in self._needs else None

    def _store_sum(self, name: str, total: Tensor | None) -> None:
        """Sum over the dimensions that an argument broadcasts over, and round to its dtype."""
        result = self._allocate_result(name)
        if result is not None and total is not None:
            result.copy_(total.sum_to_size(result.shape))

    def find_delta(self) -> None:
        """Compute delta and the normalizers for the other steps, and the gradients of the output gate and the sinks."""
        blocks = self._padded // self.find_tile("delta").BM
        output_gate = self._allocate_part("output_gate", self.B, self.H, blocks)
        sinks = self._allocate_part("sinks", self.B, self.H, blocks)
        arguments = (self._output, self._do, self._normalizers, self._rows, output_gate, sinks)
        needed = {  # delta is needed for gradients of scores, but not for gradients of values alone
            "TOKENS": bool(self._needs & {"query", "key", "sinks"}),
            "PREFIX": bool(self._needs & {"query", "prefix_key", "prefix_gate", "output_gate", "prefix_key_bias"}),
        }
        grid = (self.B * self.H * blocks,)
        operands = keep_rows(self.operands) if self.a.output_gate is None else self.operands
        self.launch("delta", grid, operands, *arguments, *self.sizes, **needed)
        self._store_sum("output_gate", None if output_gate is None else output_gate.sum(2))
        self._store_sum("sinks", None if sinks is None else sinks.sum((0, 2)))

    def differentiate_queries(self, given: Tensor | None) -> None:
        """Compute gradients of query and prefix gate. Token keys are read only for the gradient of query."""
        blocks = divide_up(self.N, self.find_tile("dq").BM)
        dq, gate = self._allocate_result("query"), self.a.prefix_gate
        if self._is_gate_of_queries_shared():
            self._differentiate_shared_gate()
            dgate = None
        else:
            dgate = self._lay_out_gate(blocks)
        if dq is None and dgate is None:
            return
        results = (ABSENT if x is None else describe_matrix(x) for x in (dq, given, dgate))
        columns = None if dgate is None else dgate.shape[3]
        grid = (self.B * self.H * blocks,)
        operands = self.operands._replace(k=ABSENT, v=ABSENT) if self.M == 0 else self.operands
        self.launch("dq", grid, operands, self._do, *results, self._rows, *self.sizes, columns)
        if gate is None or dgate is None or "prefix_gate" in self.gradients:
            return
        if gate.ndim == 3:
            dgate = dgate.unflatten(1, (self.kv_heads, self.H // self.kv_heads)).sum((2, 3))
        elif gate.shape[2] == 1:
            dgate = dgate.sum(2, keepdim=True)
        self._store_sum("prefix_gate", dgate)

    def _lay_out_gate(self, blocks: int) -> Tensor | None:
        """Return the tensor that the dq kernel stores the gradient of the prefix gate in, or None if it is not needed.

        It is the gradient itself if the gate does not broadcast. Otherwise it holds float32 partial sums over the
        queries of a block, or over keys, if the gate broadcasts over them.
        """
        gate = self.a.prefix_gate
        if gate is None or "prefix_gate" not in self._needs:
            return None
        of_queries = gate.ndim == 4 and gate.shape[2] != 1
        shape = (self.B, self.H, self.N if of_queries else blocks, gate.shape[-1])
        if gate.shape == shape:
            return self._allocate_result("prefix_gate")
        return self.allocate_floats(*shape)

    def _is_gate_of_queries_shared(self) -> bool:
        """Return whether rows or heads share a gate that differs by query and key, and its gradient is requested."""
        gate = self.a.prefix_gate
        if gate is None or gate.ndim == 3 or "prefix_gate" not in self._needs:
            return False
        return gate.shape[2] != 1 and gate.shape[3] != 1 and gate.shape[:2] != (self.B, self.H)

    def _differentiate_shared_gate(self) -> None:
        """Compute the gradient of a gate that differs by query and key and that rows or heads share.

        A separate sum for each row and head would need far more memory than the gate.
        """
        gate, dgate = self.a.prefix_gate, self._allocate_result("prefix_gate")
        assert gate is not None
        assert dgate is not None
        tile = self.find_tile("dgate")
        batch, heads, _, columns = gate.shape
        programs = batch * heads * divide_up(self.N, tile.BM) * divide_up(columns, tile.BP)
        shared = self.B // max(1, batch) * (self.H // heads)
        chunk = self._divide_sum(shared, programs, 4 * gate.numel())
        parts = max(1, divide_up(shared, chunk))
        sums = self._lay_out_parts(dgate, parts)
        sizes = (*self.sizes, columns, batch, heads, shared, chunk)
        self.launch("dgate", (programs, parts), self.operands, self._do, sums, self._rows, *sizes)
        self._add_parts([dgate], [sums], parts)

    def differentiate_keys(self) -> None:
        """Compute gradients of key and value."""
        dk, dv = self._allocate_result("key"), self._allocate_result("value")
        grid = (self.B * self.kv_heads * divide_up(self.M, self.find_tile("dkv").BN),)
        arguments = (self._do, *(ABSENT if x is None else describe_matrix(x) for x in (dk, dv)), self._rows)
        self.launch("dkv", grid, self.operands, *arguments, *self.sizes)

    def differentiate_prefix(self) -> None:
        """Compute gradients of prefix_key and prefix_value, except for frozen keys, and of prefix_key_bias.

        A second pass computes the gradient of the bias for frozen keys, or for all keys if the bias differs by row and
        the prefix is shared.
        """
        batch, frozen, bias = self.a.prefix_key.shape[0], self.a.frozen_prefix, self.a.prefix_key_bias
        results = [self._allocate_result(name) for name in _PREFIX[:2]]
        trained = any(result is not None for result in results)
        if bias is None or "prefix_key_bias" not in self._needs:
            self._sum_queries(frozen, self.P, batch, results, None)
        else:
            rows = batch if bias.shape[0] in (1, batch) else self.B
            dbias = self.allocate_floats(rows, self.kv_heads, self.P)
            together = trained and rows == batch
            if trained:
                self._sum_queries(frozen, self.P, batch, results, dbias if together else None)
            self._sum_queries(0, frozen if together else self.P, rows, [None, None], dbias)
            self._store_sum("prefix_key_bias", dbias)
        for result in results:
            if result is not None and frozen > 0:
                result[:, :, :frozen].zero_()

    def _sum_queries(
        self, begin: int, end: int, batch: int, results: Sequence[Tensor | None], dbias: Tensor | None
    ) -> None:
        """Compute gradients of prefix keys [begin, end), and split long sums over queries into parts.

        Parts are float32 sums. Together they need at most 64 MiB. Since there are at most twice as many programs as
        processors, they also need at most ``8 * processors * BP * (D + Dv + 1)`` bytes. A single part needs no memory.
        """
        if begin == end:
            return
        tile = self.find_tile("dprefix")
        tiles = self.H // self.kv_heads * divide_up(self.N, tile.BM) * (self.B if batch == 1 else 1)
        programs = batch * self.kv_heads * divide_up(end - begin, tile.BP)
        size = 4 * sum(x.numel() for x in (*results, dbias) if x is not None)
        chunk = self._divide_sum(tiles, programs, size)
        parts = max(1, divide_up(tiles, chunk))
        sums = [self._lay_out_parts(result, parts) for result in results]
        biases = None if dbias is None else self.allocate_floats(parts * batch, self.kv_heads, end - begin)
        sizes = (self.N, self.M, end, begin or None, tiles, chunk, batch)
        self.launch("dprefix", (programs, parts), self.operands, self._do, *sums, biases, self._rows, *sizes)
        if dbias is not None and biases is not None:
            dbias[:, :, begin:end] = biases.unflatten(0, (parts, batch)).sum(0)
        self._add_parts(results, sums, parts)

    def _divide_sum(self, terms: int, programs: int, size: int) -> int:
        """Return the number of terms per part of a sum.

        There are enough parts to fill the device, unless parts of ``size`` bytes would exceed ``_MOST_BYTES``.
        """
        parts = min(terms, 2 * self.target.processors // max(1, programs), _MOST_BYTES // max(1, size))
        return max(1, divide_up(terms, max(1, parts)))

    def _add_parts(self, results: Sequence[Tensor | None], sums: Sequence[Strided], parts: int) -> None:
        """Add the parts of each result if it has several."""
        if parts == 1:
            return
        handed: list[Any] = []
        for result, part in zip(results, sums, strict=True):
            if result is not None:
                handed += (result, part.pointer, result.numel())
        if handed:
            grid = (divide_up(max(handed[2::3]), _SUM_BLOCK), len(handed) // 3)
            self.launch("sum", grid, *(*handed, None, None, None)[:6], parts, BLOCK=_SUM_BLOCK)

    def _lay_out_parts(self, result: Tensor | None, parts: int) -> Strided:
        """Return the result itself for a single part, otherwise float32 parts of it in its memory layout.

        The parts are stacked along the batch dimension: ``[parts * B, H, N, D]``.
        """
        if result is None or parts == 1:
            return ABSENT if result is None else describe_matrix(result)
        batch, heads, length, size = result.shape
        stride = (heads * length * size, *result.stride()[1:])
        return describe_matrix(
            torch.empty_strided((parts * batch, heads, length, size), stride, dtype=torch.float32, device=result.device)
        )


def _find_variants(operands: Operands) -> tuple[str, ...]:
    """Return the variants of the tile tables that apply to a call, the most specific one first."""
    pairs = (operands.query_gate, operands.mask, operands.visible, operands.bias)
    pairwise = any(operand.pointer is not None and operand.n is not None for operand in pairs)
    if operands.seed is not None:
        variant = "dropout of pairs" if pairwise else "dropout"
    elif pairwise:
        variant = "pairwise"
    else:
        variant = (
            "capped" if operands.softcap is not None else "separate" if operands.og.pointer is not None else "plain"
        )
    keyed = operands.key_bias.pointer is not None or operands.spans.pointer is not None
    return (f"{variant}, keyed", variant) if keyed else (variant,)


def _next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
