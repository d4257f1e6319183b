"""Build the problems that are timed: shapes, gates and masks, and the peers of each problem."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprefix.ops.prefix_attention.composed_backend import plans

from ..attention import Inputs, Shape, build_dense_mask
from ..embedding import EAGER, EmbeddingInputs, Setting, build_works, draw_inputs
from ..measure import Role, Row, Work
from ..suite import build_kernel_work
from . import device
from .jobs import Job

SHAPES = ((32, 12, 12, 128, 128, 64), (16, 16, 16, 512, 512, 64), (8, 32, 8, 1024, 1024, 128),
          (4, 32, 8, 2048, 2048, 128), (2, 32, 8, 8192, 8192, 128))  # fmt: skip
DECODING = tuple((B, 32, 8, 1, M, 128) for B in (1, 16, 128) for M in (1024, 8192))
EMBEDDINGS = (Setting(32_128, 1024, 32, 256, 60, 19, "uniform"), Setting(128_256, 4096, 8, 1024, 60, 19, "uniform"))
BACKEND = "composed"
SDPA = ("flash", "cudnn", "efficient")
Kind = tuple[Shape, str, bool]
"""A shape, its kind of gate (or "segments"), and True if it is causal."""
LONGEST: Kind = (Shape(1, 8, 2, 8192, 8192, 128, 128), "row", True)
FIRST: tuple[Kind, ...] = tuple((Shape(*shape, 128), "none", True) for shape in (SHAPES[1], SHAPES[2], SHAPES[4]))


class Problem(NamedTuple):
    """A case, the work of each peer, and the references for the results.

    ``narrow`` returns the part of a peer's results that a reference computes.
    """

    case: Row
    works: dict[str, Work]
    references: dict[str, Work]
    narrow: Callable[[Sequence[Tensor]], Sequence[Tensor]]


def list_problems() -> Iterator[Kind]:
    """Yield the cases, the most informative ones first, because time can run out."""

    def combine(
        shapes: Sequence[tuple[int, int, int, int, int, int]], P: int, gate: str, *causal: bool
    ) -> Iterator[Kind]:
        return ((Shape(*shape, P), gate, of) for shape in shapes for of in causal)

    longest = SHAPES[-1:]
    yield from combine(SHAPES, 128, "none", True, False)
    yield from combine(DECODING, 128, "none", False)
    yield from combine(SHAPES, 128, "row", True)
    yield from combine(SHAPES[1:], 128, "segments", True)
    for P in (2048, 16):
        yield from combine(SHAPES[:-1], P, "none", True, False)
    for gate in ("query", "separate"):
        yield from combine(SHAPES, 128, gate, True)
    for gate in ("row", "query", "separate"):
        yield from combine(SHAPES, 128, gate, False)
    for P in (2048, 16):
        yield from combine(longest, P, "none", True, False)
        yield from combine(DECODING, P, "none", False)
    for P in (100, 2048):
        yield from combine(SHAPES, P, "row", True)


def list_plans(shape: Shape, gate: str, causal: bool) -> list[str]:
    """Return the plans of the composed backend that support a case. It must have one softmax and not be decoding."""
    if gate == "separate" or shape.N == 1:
        return []
    if gate == "segments":
        return ["flash", "flash, prefix alike"]
    kept = {"own"} if gate == "query" else {"own", "alike"} if causal else {"own", "alike", "concatenated"}
    return [name for name, plan in plans.PLANS.items() if plan.prefix in kept]


def run_plan(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Return a decorator that makes a call of the composed backend use a plan."""

    def decorate(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            plans.force(name)
            try:
                return call()
            finally:
                plans.force(None)

        return run

    return decorate


def build_problem(shape: Shape, gate: str, causal: bool, flex: bool = True) -> Problem:
    """Return a problem with all peers.

    The peers are the Triton backend, the plans of the composed backend, concatenation and the tokens alone on each
    kernel of SDPA, and compiled FlexAttention. Masks are built here, outside the timed part.
    """
    inputs = Inputs(shape, torch.bfloat16, causal, device.CUDA, gate=gate)

    def build(role: Role, call: Callable[[], Tensor], leaves: Sequence[Tensor] = inputs.leaves) -> Work:
        return build_kernel_work(role, call, () if shape.N == 1 else leaves, inputs.grad)  # decoding has no backward

    works = {"fused": build("ours", inputs.run_fused)}
    for name in list_plans(shape, gate, causal):
        work = build("ours", partial(inputs.run_backend, BACKEND))
        by_plan = run_plan(name)
        works[f"composed, {name}"] = work._replace(calls={of: by_plan(call) for of, call in work.calls.items()})
    for name in SDPA:
        variant = copy.copy(inputs)
        variant.repeats_heads = name == "efficient" and shape.Hq != shape.Hkv
        if name == "cudnn" and causal and gate != "segments":  # it only supports causal masks aligned to the upper left
            variant.mask = build_dense_mask(shape.N, shape.M, shape.P, inputs.q.device)
        works[f"tokens, {name}"] = build("floor", choose(variant.run_tokens, name), inputs.leaves[:3])
        if gate != "query":  # a gate for each query cannot be folded into the keys
            works[f"concat, {name}"] = build("theirs", choose(variant.run_concat, name))
    if flex and has_flex(shape, gate, causal):
        torch.compiler.reset()  # avoids the limit of recompilations
        works["concat, flex"] = build("theirs", inputs.compile_flex())
    case = {**shape._asdict(), "gate": gate, "causal": causal}
    if gate != "query":
        return Problem(case, works, {name: work for name, work in works.items() if work.role == "theirs"}, list)
    row = inputs.take_row()
    eager = build_kernel_work("theirs", partial(row.run_backend, "eager"), row.leaves, row.grad)
    return Problem(case, works, {"eager": eager}, take_first_row)


def has_flex(shape: Shape, gate: str, causal: bool) -> bool:
    """Return whether FlexAttention, which compiles for each shape, is a peer in a case."""
    return gate == "none" and causal and shape.P == 128


def choose(call: Callable[[], Tensor], name: str) -> Callable[[], Tensor]:
    """Return a call that lets SDPA use only one kernel.

    The context ``torch.nn.attention.sdpa_kernel`` would do the same, but entering it takes longer than a short call.
    """
    cuda = torch.backends.cuda
    switches: tuple[tuple[str, Callable[[], bool], Callable[[bool], None]], ...] = (
        ("flash", cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        ("cudnn", cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        ("efficient", cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        ("math", cuda.math_sdp_enabled, cuda.enable_math_sdp),
    )

    def run() -> Tensor:
        before = [is_enabled() for _, is_enabled, _ in switches]
        for of, _, enable in switches:
            enable(of == name)
        try:
            return call()
        finally:
            for (_, _, enable), value in zip(switches, before, strict=True):
                enable(value)

    return run


def take_first_row(results: Sequence[Tensor]) -> list[Tensor]:
    """Return the first row of the output, or of the gradients that have rows: those of the tokens and gates."""
    with_rows = results if len(results) == 1 else [*results[:3], *results[5:]]
    return [x[:1] for x in with_rows]


def build_embeddings() -> Iterator[Problem]:
    """Yield problems of prompt embeddings, with their eager peers and a lookup.

    The reference has the name of the eager peer, which is therefore not compared, and computes the same in float32.
    In bfloat16, cuBLAS adds parts of a product in bfloat16. The sign of some hidden units differs then, and with it the
    gradients of w1 and b1, by 2 to 6 %.
    """
    for setting in EMBEDDINGS:
        inputs = draw_inputs(setting, torch.bfloat16, device.CUDA)
        _, works = build_works(setting, torch.bfloat16, device.CUDA, inputs)
        kept = {name: work for name, work in works.items() if not name.endswith("compiled")}
        case = {**setting._asdict(), "dtype": "bfloat16"}
        for method, name in (("pt", "PT"), ("dept", "DePT"), ("adept", "ADePT")):
            peers = {"lookup": kept["lookup"], method: kept[method], f"{method}_eager": kept[f"{method}_eager"]}
            reference = build_exact(inputs, name)
            yield Problem({**case, "method": method}, peers, {f"{method}_eager": reference}, list)


def build_exact(inputs: EmbeddingInputs, name: str) -> Work:
    """Return the work of a method in eager PyTorch, in float32, on the values of inputs in another dtype."""
    offsets: dict[str, tuple[Tensor, ...]] = {"PT": (), "DePT": inputs.low_rank, "ADePT": inputs.ffn}
    leaves = [x.detach().float().requires_grad_() for x in (inputs.prompt, *offsets[name])]

    def run() -> Tensor:
        return EAGER[name](inputs.ids, inputs.weight.float(), *leaves)

    return build_kernel_work("theirs", run, leaves, inputs.grad.float())


def compile_problem(shape: Shape, gate: str, causal: bool) -> dict[str, Any]:
    """Compile the kernels of a case by running them."""
    for name, work in build_problem(shape, gate, causal, flex=False).works.items():
        if name == "fused" or name.startswith("composed"):
            for call in work.calls.values():
                call()
    torch.cuda.synchronize()
    return {}


def compile_flex(shape: Shape, gate: str, causal: bool) -> dict[str, Any]:
    """Compile FlexAttention for a shape. PyTorch stores the result on disk, where other processes find it."""
    inputs = Inputs(shape, torch.bfloat16, causal, device.CUDA, gate=gate)
    for call in build_kernel_work("theirs", inputs.compile_flex(), inputs.leaves, inputs.grad).calls.values():
        call()
    torch.cuda.synchronize()
    return {}


def list_compilations(kinds: Sequence[Kind]) -> list[Job]:
    """Return one job per specialization of the kernels, on small shapes with the same specialization."""
    found: dict[Job, None] = {}
    for shape, gate, causal in kinds:
        if has_flex(shape, gate, causal):
            found[compile_flex, shape, gate, causal] = None
        small = shape._replace(B=min(shape.B, 2))
        found[compile_problem, small if shape.N == 1 else small._replace(N=256, M=256), gate, causal] = None
    return list(found)
