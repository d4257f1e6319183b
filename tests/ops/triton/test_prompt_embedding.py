"""Test the Triton kernels of ``prompt_embedding`` against the float64 reference, forward and every gradient."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastprefix.ops.prompt_embedding.arguments import DIFFERENTIABLE, EmbeddingArguments
from fastprefix.ops.prompt_embedding.registration import OPERATION
from fastprefix.ops.prompt_embedding.validation import canonical_arguments
from fastprefix.parity import EmbeddingCase, measure

OFFSETS = {"pt": None, "dept": "low_rank", "accept": "position_offset", "adept": "ffn"}


def make_case(kind: str, own: bool = False, **named: Any) -> EmbeddingCase:
    """Return a case. With ``own``, three rows in four have a separate prompt, and three a separate offset."""
    sizes = {"B": 4 if own else 2, "N": 21, "S": 3, "V": 17, "d": 65, "r": 7, "spare": 2}
    sizes |= {name: named.pop(name) for name in sizes if name in named}
    rows: dict[str, Any] = {}
    if own:
        rows["spans"] = [((0, 3), (1, 1), (0, 0), (1, 2))[row % 4] for row in range(sizes["B"])]
    if own and kind != "pt":
        rows |= {"K": 3, "index": [(2, 0, -1, 2)[row % 4] for row in range(sizes["B"])]}
    return EmbeddingCase(**sizes, **rows, offset=OFFSETS[kind], options={"offset_scale": 0.5, **named})


def arguments(device: str, kind: str, **named: Any) -> EmbeddingArguments:
    """Return the arguments of the operator."""
    inputs = make_case(kind, **named).build(torch.float32, device)
    return canonical_arguments(**inputs.tensors, **inputs.options)


def results(function, a: EmbeddingArguments, dy: Tensor) -> list[Tensor]:
    """Return the output, then every gradient."""
    inputs = [x.detach().clone().requires_grad_() if _differentiable(x) else x for x in a]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if _differentiable(x)], dy)]


def _differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


CASES = [
    {"kind": "pt"},
    {"kind": "pt", "S": 0},
    {"kind": "dept"},
    {"kind": "dept", "B": 9, "N": 2, "d": 13, "r": 3},
    {"kind": "adept"},
    {"kind": "adept", "d": 8, "r": 1},
    {"kind": "adept", "d": 13, "r": 33},
    {"kind": "adept", "d": 130, "r": 19, "N": 60},
    {"kind": "adept", "d": 40, "r": 130},
    {"kind": "adept", "dropout_p": 0.3},
    {"kind": "adept", "dropout_p": 1.0},
    {"kind": "accept"},
    {"kind": "accept", "B": 9, "N": 2, "d": 13},
    *({"kind": kind, size: 0} for kind in OFFSETS for size in ("B", "N", "S")),
    *({"kind": kind, "own": True} for kind in OFFSETS),
    *({"kind": kind, "own": True, size: 0} for kind in OFFSETS for size in ("B", "N")),
    {"kind": "pt", "own": True, "N": 0, "d": 130, "S": 70, "B": 2},
    {"kind": "adept", "own": True, "d": 130, "r": 33, "N": 70},
    {"kind": "adept", "own": True, "N": 1},
    {"kind": "adept", "own": True, "dropout_p": 0.3, "N": 40},
    {"kind": "dept", "own": True, "d": 13, "r": 70, "N": 40},
]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(device: str, case: dict, dtype: torch.dtype) -> None:
    report = measure(make_case(**case), dtype, "triton", device, draws=2)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("own", [False, True])
def test_every_element_is_stored_once(device: str, own: bool, store_counts: list[numpy.ndarray]) -> None:
    """If two programs stored the same sum, they would do the same work twice."""
    a = arguments(device, "adept", own=own, r=130)
    results(OPERATION.operator("triton"), a, torch.randn(len(a.input_ids), 24, 65, device=device))
    assert len(store_counts) >= 3
    assert all((count == 1).all() for count in store_counts)


@pytest.mark.parametrize("own", [False, True])
def test_integers_of_32_bits(device: str, own: bool) -> None:
    a = arguments(device, "adept", own=own)
    dy = torch.randn(len(a.input_ids), 24, 65, device=device)
    short = {name: x.int() for name in ("input_ids", "prompt_spans", "entries") if (x := getattr(a, name)) is not None}
    got = results(OPERATION.operator("triton"), a._replace(**short), dy)
    for x, y in zip(got, results(OPERATION.operator("triton"), a, dy), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "own"),
    [(kind, own) for kind in OFFSETS for own in (False, True) if (kind, own) != ("dept", False)],  # PyTorch's products
)
def test_any_strides(device: str, kind: str, own: bool) -> None:
    a = arguments(device, kind, own=own)
    dy = torch.randn(65, 24, len(a.input_ids), device=device).permute(2, 1, 0)
    odd = EmbeddingArguments(*(x.mT.contiguous().mT if isinstance(x, Tensor) and x.ndim > 1 else x for x in a))
    got = results(OPERATION.operator("triton"), odd, dy)
    wanted = results(OPERATION.operator("triton"), a, dy.contiguous())
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OFFSETS)
def test_the_same_from_run_to_run(device: str, kind: str) -> None:
    a = arguments(device, kind, own=True)
    dy = torch.randn(4, 24, 65, device=device)
    first, second = (results(OPERATION.operator("triton"), a, dy) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("kind", "names"), [("adept", ("w1", "b1", "w2", "b2")), ("dept", ("low_rank_a", "low_rank_b"))]
)
def test_partial_gradients_of_a_bank(device: str, kind: str, names: tuple[str, ...]) -> None:
    a = arguments(device, kind, own=True)
    dy = torch.randn(4, 24, 65, device=device)
    wanted = dict(zip(("weight", "prompt", *names), results(OPERATION.operator("triton"), a, dy)[1:], strict=True))
    for name, gradient in wanted.items():
        leaf = getattr(a, name).detach().clone().requires_grad_()
        (got,) = torch.autograd.grad(OPERATION.operator("triton")(*a._replace(**{name: leaf})), leaf, dy)
        torch.testing.assert_close(got, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dept", "accept", "adept"])
def test_a_shared_prompt_and_an_empty_bank(device: str, kind: str, poisoned: None) -> None:
    case = EmbeddingCase(offset=OFFSETS[kind], K=0, index=[-1, -1])
    report = measure(case, torch.float32, "triton", device, draws=1)
    assert report.ok, f"\n{report}"


class GridRecorder:
    """A target that stores the grids of launches and launches nothing."""

    architecture, processors, split_from = "sm_90", 132, 256

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: Any, constants: Any, tile: Any) -> None:
        self.grids.append(grid)


@pytest.mark.parametrize("kind", ["dept", "accept", "adept"])
def test_grids_of_a_large_bank(kind: str) -> None:
    """Only the first index of a grid may exceed 65,535."""
    from fastprefix.ops.prompt_embedding.triton_backend import launch

    inputs = EmbeddingCase(d=8, r=1, offset=OFFSETS[kind], K=70_000, index=[69_999, -1]).build(torch.float32)
    a, target = canonical_arguments(**inputs.tensors, **inputs.options), GridRecorder()
    output = launch.forward(*a, target=target)
    launch.backward(output, [isinstance(getattr(a, name), Tensor) for name in DIFFERENTIABLE], *a, target=target)
    assert target.grids
    assert max(size for grid in target.grids for size in grid[1:] or (1,)) < 65_536


@pytest.mark.parametrize(("field", "name"), [("entries", "index"), ("prompt_spans", "prompt_spans")])
def test_values_out_of_range(device: str, monkeypatch: pytest.MonkeyPatch, field: str, name: str) -> None:
    monkeypatch.setenv("FASTPREFIX_CHECK_IDS", "1")
    a = arguments(device, "adept", own=True)
    with pytest.raises(ValueError, match=f"^`{name}`"):
        OPERATION.operator("triton")(*a._replace(**{field: getattr(a, field) + 3}))


def test_ids_out_of_range(device: str) -> None:
    a = arguments(device, "adept")
    a.input_ids[0, 0] = 17
    with pytest.raises(ValueError, match=r"`input_ids` .* 16, got 17"):
        OPERATION.operator("triton")(*a)
