"""Compare usable backends with the float64 reference on a grid of unusual cases (``fastprefix parity``).

By default these are all usable backends except sdpa, whose accuracy is that of PyTorch's kernel. Each case combines
several features. The values of each axis of the grid (shapes, heads, prefixes, gates, masks, ...) are shuffled with a
fixed seed and repeated up to the number of cases. Every value occurs, in different combinations.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .ops.backends import BACKENDS
from .ops.prefix_attention import prefix_attention
from .ops.prefix_attention.registration import OPERATION as ATTENTION
from .ops.prefix_attention.validation import canonical_arguments
from .ops.prompt_embedding import prompt_embedding
from .ops.prompt_embedding.registration import OPERATION as EMBEDDING
from .testing import Report, measure_parity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call. Gradients are compared for ``tensors`` only."""

    tensors: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class AttentionCase:
    """A call of ``prefix_attention``.

    Letters specify the shapes of gates, biases and masks, such as "B1P". H is Hq, h is Hkv, and T is the length of a
    store of prefixes. ``P`` is None for a call without a prefix.

    ``spans`` selects the prefix of each row in the store. "own" gives each row a separate prefix of length P. "equal"
    gives all rows the same prefix. "ragged" gives them overlapping prefixes of lengths P, 0, 1 and P / 2. A tuple has
    (start, length) for each row. The store also has two keys that no row attends to.
    """

    B: int = 2
    Hq: int = 2
    Hkv: int = 2
    N: int = 5
    M: int = 7
    P: int | None = 3
    D: int = 8
    Dv: int | None = None
    prefix_a_row: bool = False
    spans: Literal["own", "equal", "ragged"] | tuple[tuple[int, int], ...] | None = None
    frozen: int = 0
    gate: str | None = None
    output_gate: str | None = None
    mask: str | None = None  # "padding", "bool" or "float", optionally with a shape, such as "bool BHNM"
    bias: str | None = None
    key_bias: str | None = None
    segments: bool = False
    sinks: bool = False
    level: float = 0.0  # added to all scores through float masks, biases and sinks, which are about 0 otherwise
    layout: Literal["BHND", "BNHD", "sliced", "strided"] = "BHND"  # strides; "sliced": a slice of a joint projection
    options: dict[str, Any] = field(default_factory=dict)  # tensors in it are cast to the dtype of the inputs

    operation: Callable[..., Tensor] = field(default=prefix_attention, repr=False)
    implemented: tuple[str, ...] = field(default=ATTENTION.implemented, repr=False)

    def build(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Draw the tensors. A seed gives the same values on every device. Tensors on "meta" have no values."""
        generator = torch.Generator().manual_seed(seed)
        device = torch.device(device)

        def draw(*shape: int) -> Tensor:
            if device.type == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        Dv = self.D if self.Dv is None else self.Dv
        tensors = {
            "query": self._draw_heads(draw, self.Hq, self.N, self.D),
            "key": self._draw_heads(draw, self.Hkv, self.M, self.D),
            "value": self._draw_heads(draw, self.Hkv, self.M, Dv),
        }
        if self.P is not None:
            rows = (self.B,) if self.prefix_a_row else ()
            length = self.P if self.spans is None else self.store
            tensors["prefix_key"] = draw(*rows, self.Hkv, length, self.D)
            tensors["prefix_value"] = draw(*rows, self.Hkv, length, Dv)
        if self.gate is not None:
            tensors["prefix_gate"] = draw(*self._sizes(self.gate))
        if self.key_bias is not None:
            tensors["prefix_key_bias"] = draw(*self._sizes(self.key_bias))
        if self.output_gate is not None:
            tensors["output_gate"] = draw(*self._sizes(self.output_gate))
        if self.sinks:
            tensors["sinks"] = self._lift(draw(self.Hq))
        return Inputs(tensors, self._options(draw, generator, dtype, device))

    @property
    def scores(self) -> int:
        """The number of attention scores, which measures the cost of a case."""
        return self.B * self.Hq * self.N * (self.M + (self.P or 0))

    @property
    def store(self) -> int:
        """The length T of the store of prefixes, which has two keys that no row attends to."""
        return max((start + length for start, length in self._list_spans()), default=0) + 2

    def _list_spans(self) -> list[tuple[int, int]]:
        P = self.P or 0
        if self.spans is None or isinstance(self.spans, tuple):
            return list(self.spans or ())
        if self.spans == "own":
            return [(row * P, P) for row in range(self.B)]
        if self.spans == "equal":
            return [(1, P)] * self.B
        return [(2 * row, (P, 0, min(1, P), P // 2)[row % 4]) for row in range(self.B)]

    def _sizes(self, letters: str) -> tuple[int, ...]:
        sizes = {"B": self.B, "H": self.Hq, "h": self.Hkv, "N": self.N, "M": self.M, "P": self.P or 0, "1": 1}
        sizes["T"] = self.store
        return tuple(sizes[letter] for letter in letters)

    def _lift(self, scores: Tensor) -> Tensor:
        return scores + self.level if self.level else scores

    def _draw_heads(self, draw: Callable[..., Tensor], heads: int, length: int, size: int) -> Tensor:
        if self.layout == "BNHD":
            return draw(self.B, length, heads, size).transpose(1, 2)
        if self.layout == "sliced":
            return draw(self.B, length, 3 * heads, size)[:, :, heads : 2 * heads].transpose(1, 2)
        if self.layout == "strided":
            return draw(self.B, heads, size, length).transpose(2, 3)
        return draw(self.B, heads, length, size)

    def _options(
        self, draw: Callable[..., Tensor], generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.mask is not None:
            kind, _, letters = self.mask.partition(" ")
            shape = self._sizes(letters or {"padding": "BM", "bool": "B1NM", "float": "1HNM"}[kind])
            if kind == "float":
                options["attn_mask"] = self._lift(draw(*shape))
            else:
                options["attn_mask"] = (torch.rand(shape, generator=generator) < 0.7).to(device)
        if self.bias is not None:
            options["prefix_bias"] = self._lift(draw(*self._sizes(self.bias)))
        if self.spans is not None:
            options["prefix_spans"] = torch.tensor(self._list_spans(), dtype=torch.int64, device=device).reshape(-1, 2)
        if self.frozen:
            options["frozen_prefix"] = self.frozen
        if self.segments:
            options["segment_ids"] = tuple(
                torch.randint(0, 3, (self.B, length), generator=generator).sort().values.to(device)
                for length in (self.N, self.M)
            )
        for name, option in self.options.items():
            if isinstance(option, Tensor):
                option = option.to(device, dtype if option.is_floating_point() else None)
            options[name] = option
        return options


def make_attention_case(**named: Any) -> AttentionCase:
    """Return a case with these fields. Names that are not fields become options of the call."""
    known = {f.name for f in fields(AttentionCase)}
    given = {name: value for name, value in named.items() if name in known}
    options = given.pop("options", {}) | {name: value for name, value in named.items() if name not in known}
    return AttentionCase(**given, options=options)


@dataclass(frozen=True)
class EmbeddingCase:
    """A call of ``prompt_embedding``."""

    B: int = 2
    N: int = 5
    S: int | None = 3
    V: int = 29
    d: int = 8
    r: int = 3
    offset: Literal["ffn", "low_rank", "position_offset"] | None = None
    spare: int = 0  # T - N
    spans: Sequence[tuple[int, int]] | None = None  # (start, length) of each row's prompt in a store of length S
    K: int | None = None  # number of entries in a bank of offsets
    index: Sequence[int] | None = None  # with K: the bank entry of each row
    options: dict[str, Any] = field(default_factory=dict)

    operation: Callable[..., Tensor] = field(default=prompt_embedding, repr=False)
    implemented: tuple[str, ...] = field(default=EMBEDDING.implemented, repr=False)

    def build(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Draw the tensors. A seed gives the same values on every device."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        def draw_bank(*shape: int) -> Tensor:
            return draw(*(() if self.K is None else (self.K,)), *shape)

        ids = torch.randint(0, self.V, (self.B, self.N), generator=generator).to(device)
        d, r, T = self.d, self.r, self.N + self.spare
        tensors: dict[str, Any] = {"input_ids": ids, "weight": draw(self.V, d)}
        if self.S is not None:
            tensors["prompt"] = draw(self.S, d)
        if self.offset == "ffn":
            tensors["ffn"] = (draw_bank(d, r), draw_bank(r), draw_bank(r, d), draw_bank(d))
        elif self.offset == "low_rank":
            tensors["low_rank"] = (draw_bank(T, r), draw_bank(r, d))
        elif self.offset == "position_offset":
            tensors["position_offset"] = draw_bank(T, d)
        if self.spans is not None:
            tensors["prompt_spans"] = torch.tensor(self.spans, dtype=torch.int64, device=device).view(-1, 2)
        if self.index is not None:
            tensors["index"] = torch.tensor(self.index, dtype=torch.int64, device=device)
        return Inputs(tensors, dict(self.options))


Case = AttentionCase | EmbeddingCase

_SHAPES: list[dict[str, Any]] = [
    {"B": B, "N": N, "M": M}
    for B, N, M in (
        (2, 1, 1), (3, 3, 3), (2, 113, 203), (2, 239, 1), (1, 1023, 1024),
        (4, 1, 203), (2, 64, 64), (3, 17, 5), (2, 5, 0), (2, 0, 7), (0, 3, 4),
    )
]  # fmt: skip
_HEADS: list[dict[str, Any]] = [
    {"Hq": Hq, "Hkv": Hkv} for Hq, Hkv in ((2, 2), (4, 2), (3, 1), (1, 1), (4, 1), (16, 2), (16, 1))
]
_SIZES: list[dict[str, Any]] = [{"D": 8}, {"D": 64}, {"D": 5, "Dv": 3}, {"D": 32, "Dv": 48}, {"D": 1, "Dv": 2}]
_PREFIXES: list[dict[str, Any]] = [
    {"P": P, "prefix_a_row": row} for P in (0, 1, 17, 128, 130) for row in (False, True)
] + [{"P": 2048}]
_GATES: list[dict[str, Any]] = [
    {"gate": gate}
    for gate in (
        None, "", "P", "1", "hP", "h1", "1P", "BhP", "B1P", "Bh1", "B11", "1h1", "BHNP", "B1NP", "1H1P", "11N1",
    )
]  # fmt: skip
_SOFTMAXES: list[dict[str, Any]] = [{}, {}, {"output_gate": "BH"}, {"output_gate": "H"}, {"output_gate": "B1"}]
_MASKS: list[dict[str, Any]] = [{}, {"mask": "padding"}, {"mask": "bool"}, {"mask": "float"}, {"segments": True}]
_BIASES: list[dict[str, Any]] = [{}, {"bias": "P"}, {"bias": "BHNP"}, {"bias": "H1P"}, {}]
_EXTRAS: list[dict[str, Any]] = [
    {},
    {"sinks": True},
    {"layout": "BNHD"},
    {"sinks": True, "layout": "BNHD"},
]
_OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"is_causal": True, "window_size": 3},
    {"window_size": 9},
    {"softcap": 5.0},
    {"dropout_p": 0.3},
    {"is_causal": True, "dropout_p": 0.1, "scale": 0.3},
    {"softcap": 2.0, "scale": -0.7},
]
_STORES: list[dict[str, Any]] = [{}, {"spans": "own"}, {}, {"spans": "equal"}, {}, {"spans": "ragged"}]
_KEY_BIASES: list[dict[str, Any]] = [
    {"key_bias": bias} for bias in (None, None, None, "", "P", "hP", "BhP", "B1P", "Bh1", "h1")
]
_FROZEN: list[dict[str, Any]] = [{}, {}, {}, {"frozen": 1}, {"frozen": 100}, {"frozen": 10_000}]
_PLAIN: list[dict[str, Any]] = [{}] * 9 + [{"P": None}]
_LEVELS: list[dict[str, Any]] = [{}, {}, {"level": 100.0}, {"level": -100.0}]  # e^100 is beyond float32
_AXES = (
    *(_SHAPES, _HEADS, _SIZES, _PREFIXES, _GATES, _SOFTMAXES, _MASKS, _BIASES, _EXTRAS, _OPTIONS),
    *(_STORES, _KEY_BIASES, _FROZEN, _PLAIN, _LEVELS),
)


def attention_cases(count: int, seed: int = 0, fixed: dict[str, Any] | None = None) -> list[AttentionCase]:
    """Return ``count`` cases of the grid. The values in ``fixed`` override those of the axes."""
    rng = random.Random(seed)
    columns = []
    for axis in _AXES:
        column: list[dict[str, Any]] = []
        while len(column) < count:
            column += rng.sample(axis, len(axis))
        columns.append(column[:count])
    cases = []
    for parts in zip(*columns, strict=True):
        named: dict[str, Any] = {}
        for part in parts:
            named |= part
        case = make_attention_case(**(named | (fixed or {})))
        cases.append(_reconcile(case) if fixed else _condition(case))
    return cases


def _reconcile(case: AttentionCase) -> AttentionCase:
    """Remove or reduce features that the other features of a case exclude, and add a mask and a bias for a level."""
    if case.level:
        case = replace(case, mask="float", bias=case.bias or "P")
    if case.P is None:
        return replace(
            case, gate=None, output_gate=None, bias=None, key_bias=None, spans=None, frozen=0, prefix_a_row=False
        )
    if case.spans is not None:
        bias = case.key_bias and case.key_bias.replace("B", "").replace("P", "T")
        case = replace(case, prefix_a_row=False, key_bias=bias)
    return replace(case, frozen=min(case.frozen, case.P or 0 if case.spans is None else case.store))


def _condition(case: AttentionCase) -> AttentionCase:
    """Change cases whose bounds are meaningless, and shorten the largest ones.

    The gradients of a softmax over a single column are exactly 0, and plain PyTorch's error is 0 too. A bound relative
    to that error is meaningless for a backward pass that stores its output rounded.
    """
    if case.P is None:
        return replace(_reconcile(case), sinks=True) if case.M <= 1 else _reconcile(case)
    ragged = case.spans == "ragged" and (case.M <= 1 or case.output_gate is not None)  # it has spans of length 0 and 1
    if ragged or case.P + case.M <= 2 or (case.output_gate is not None and min(case.P, case.M) == 1):
        case = replace(case, sinks=True, output_gate=None, P=case.P or 1)
    if case.output_gate is not None and case.key_bias is not None and not case.key_bias.endswith("P"):
        case = replace(case, key_bias="P")  # one bias for all keys of a softmax has no effect: its gradient is 0 too
    if case.N * (case.P or 0) > 1_000_000:  # takes seconds in each dtype and tests nothing that 128 keys do not test
        case = replace(case, P=128)
    return _reconcile(case)


def embedding_cases() -> list[EmbeddingCase]:
    """Return cases of PT, DePT, ACCEPT and ADePT with odd widths and empty dimensions.

    Each case occurs with a shared prompt and offset, and with a different prompt and offset for each row.
    """
    shapes: list[dict[str, Any]] = [
        {"B": 2, "N": 7, "S": 3, "d": 8, "r": 3},
        {"B": 3, "N": 113, "S": 100, "d": 129, "r": 19, "V": 211},
        {"B": 1, "N": 1, "S": 1, "d": 1, "r": 1, "V": 1},
        {"B": 4, "N": 33, "S": None, "d": 768, "r": 39, "V": 97},
        {"B": 2, "N": 0, "S": 5, "d": 17, "r": 2},
        {"B": 0, "N": 4, "S": 5, "d": 17, "r": 2},
        {"B": 2, "N": 5, "S": 0, "d": 33, "r": 45},
    ]
    offsets: list[dict[str, Any]] = [
        {},
        {"offset": "low_rank"},
        {"offset": "low_rank", "spare": 11, "options": {"offset_scale": 1.3}},
        {"offset": "position_offset", "spare": 2, "options": {"offset_scale": -0.7}},
        {"offset": "ffn"},
        {"offset": "ffn", "options": {"offset_scale": -0.5, "dropout_p": 0.1}},
        {"offset": "ffn", "options": {"dropout_p": 0.6}},
    ]
    shared = [EmbeddingCase(**shape, **offset) for shape in shapes for offset in offsets]
    return shared + [_give_rows_their_own(case) for case in shared]


def _give_rows_their_own(case: EmbeddingCase) -> EmbeddingCase:
    """Return a case with a prompt and an offset for each row. Spans overlap, and some rows have neither."""
    spans: list[tuple[int, int]] | None = None
    bank: dict[str, Any] = {}
    if case.S is not None:
        lengths = [(case.S, 0, case.S // 2, case.S // 3)[row % 4] for row in range(case.B)]
        spans = [((case.S - length) * row // 4, length) for row, length in enumerate(lengths)]
    if case.offset is not None:
        bank = {"K": 3, "index": [(1, 0, -1, 1)[row % 4] for row in range(case.B)]}
    return replace(case, spans=spans, **bank)


def measure(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: torch.device | str = "cpu",
    draws: int = 3,
    grad: bool | Collection[str] = True,
) -> Report:
    """Measure the parity of one backend on one case."""
    inputs = case.build(dtype, device)
    options = {**inputs.options, "backend": backend}
    return measure_parity(case.operation, inputs.tensors, options=options, draws=draws, grad=grad)


def _list_compared() -> list[str]:
    """Return the names of the backends except ``sdpa``, whose accuracy is that of PyTorch's kernel."""
    return [name for name in BACKENDS if name != "sdpa"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m fastprefix parity``."""
    parser.add_argument(
        "--shape", type=_shape, metavar="B,Hq,Hkv,N,M,P,D[,Dv]", help="run prefix_attention with this shape only"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="default: all")
    parser.add_argument("--backend", choices=_list_compared(), nargs="+", help="default: all usable ones")
    parser.add_argument("--device", type=_device, help="default: cuda if available, else cpu")
    parser.add_argument("--quick", action="store_true", help="run fewer and smaller cases")


def main(args: argparse.Namespace) -> int:
    """Run the grid, print the table, and return 1 if a bound is missed or a named backend is not usable."""
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = [name for name in args.backend or _list_compared() if BACKENDS[name].refusal(device) is None]
    for name in set(args.backend or ()) - set(backends):
        print(f"backend {name!r} is not usable: {BACKENDS[name].refusal(device)}", file=sys.stderr)
        return 1
    cases: list[Case] = list(attention_cases(22 if args.quick else 66, fixed=args.shape))
    if args.quick and args.shape is None:
        cases = [case for case in cases if not isinstance(case, AttentionCase) or case.scores < 100_000]
    if args.shape is None:
        cases += embedding_cases()
    runs = [
        (case, dtype, name)
        for case in cases
        for dtype in args.dtype
        for name in backends
        if name in case.implemented and not _is_refused(case, DTYPES[dtype], name, device)
    ]
    if not runs:
        print("fastprefix parity: the chosen backends support none of the cases. Choose others.", file=sys.stderr)
        return 1
    started = time.monotonic()
    results = []
    for done, (case, dtype, name) in enumerate(runs, 1):
        results.append((case, dtype, name, measure(case, DTYPES[dtype], name, device)))
        _progress(done, len(runs), started)
    return _print_results(results)


def _is_refused(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> bool:
    """Return True if a backend that supports only some calls refuses a case."""
    if not BACKENDS[backend].partial or not isinstance(case, AttentionCase):
        return False
    inputs = case.build(dtype, device)
    return ATTENTION.refusals[backend](canonical_arguments(**inputs.tensors, **inputs.options)) is not None


def _device(text: str) -> torch.device:
    """Return a device that runs kernels on this machine."""
    try:
        torch.empty(1, device=text).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was compiled for the device
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text!r} ({reason})") from error
    return torch.device(text)


def _shape(text: str) -> dict[str, Any]:
    letters = ("B", "Hq", "Hkv", "N", "M", "P", "D", "Dv")
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (7, 8) or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"must be numbers B,Hq,Hkv,N,M,P,D[,Dv] of at least 0, got {text!r}")
    if sizes[2] == 0 or sizes[1] % sizes[2] or min(sizes[6:]) == 0:
        raise argparse.ArgumentTypeError(f"must have Hq a multiple of Hkv, and D and Dv above 0, got {text!r}")
    return dict(zip(letters, sizes, strict=False)) | ({"Dv": None} if len(sizes) == 7 else {})


def _progress(done: int, total: int, started: float) -> None:
    """Print the progress to stderr on one line that is overwritten, if stderr is a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} comparisons, {time.monotonic() - started:.0f} s", end=end, file=sys.stderr, flush=True)


def _print_results(results: Sequence[tuple[Case, str, str, Report]]) -> int:
    """Print a line for each operation, backend and dtype, then a full report of each miss. Return the exit status."""
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for case, dtype, backend, report in results:
        groups.setdefault((case.operation.__name__, backend, dtype), []).append(report)
    print(
        f"{'operation':<18} {'backend':<8} {'dtype':<9} {'cases':>5} {'results':>7} {'misses':>6} {'ratio':>6}  worst"
    )
    for (operation, backend, dtype), reports in groups.items():
        rows = [row for report in reports for row in report.rows]
        worst = max(rows, key=lambda row: row.ratio)
        misses = sum(not row.ok for row in rows)
        print(
            f"{operation:<18} {backend:<8} {dtype:<9} {len(reports):>5} {len(rows):>7} {misses:>6} {worst.ratio:>6.2f}"
            f"  {worst.name}"
        )
    missed = [result for result in results if not result[3].ok]
    for case, dtype, backend, report in missed:
        print(f"\nMISS {backend} {dtype} {case}\n{report}")
    print("\nratio: error divided by its bound, which is twice plain PyTorch's error in the same dtype plus two ulp")
    print(f"{len(results) - len(missed)} of {len(results)} comparisons are within their bounds")
    return 1 if missed else 0
