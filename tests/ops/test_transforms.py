"""Test calls in transforms of ``torch.func``, for which the operations run PyTorch's operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastprefix import prefix_attention, prompt_embedding
from fastprefix.parity import AttentionCase, Case, EmbeddingCase

CASES: dict[str, tuple[Case, Callable[..., Tensor], tuple[str, ...]]] = {
    "attention": (AttentionCase(B=3, Hq=4, gate="hP", sinks=True), prefix_attention, ("query", "key", "value")),
    "embedding": (EmbeddingCase(B=3, S=3, offset="ffn"), prompt_embedding, ("input_ids",)),
}
"""A case, its operation, and the names of the arguments with a row for each sample."""


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def split(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Any], Callable[..., Tensor]]:
    """Return the arguments that are the same for all samples, the others, and the operation. Cast floats to dtype."""
    case, operation, of_rows = CASES[name]
    tensors = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, case.build(torch.float32).tensors)
    rows = {key: tensors.pop(key) for key in of_rows}
    return tensors, rows, operation


def flatten(gradients: dict[str, Any]) -> list[Tensor]:
    return [x for value in gradients.values() for x in (value if isinstance(value, tuple) else (value,))]


def test_gradients_of_each_sample(name: str) -> None:
    shared, rows, operation = split(name)
    fixed = {"weight": shared.pop("weight")} if "weight" in shared else {}

    def loss(trained: dict[str, Any], sample: dict[str, Tensor]) -> Tensor:
        one = {key: x[None] for key, x in sample.items()}
        return operation(**one, **fixed, **trained).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(shared, rows)
    for index in range(3):
        leaves = {key: _require(value) for key, value in shared.items()}
        loss(leaves, {key: x[index] for key, x in rows.items()}).backward()
        wanted = [x.grad for x in flatten(leaves)]
        torch.testing.assert_close([x[index] for x in flatten(found)], wanted)


def _require(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_require(x) for x in value)
    return value.detach().requires_grad_()


def make_call(
    name: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a call as a function of a tensor on which its result depends linearly, and the tensor."""
    shared, rows, operation = split(name, dtype)
    key = "prefix_value" if name == "attention" else "prompt"
    x = shared.pop(key)
    return lambda x: operation(**rows, **shared, **{key: x}, **options), x


def test_forward_mode(name: str) -> None:
    call, x = make_call(name)
    _, tangent = torch.func.jvp(call, (x,), (x,))
    torch.testing.assert_close(tangent, call(x) - call(torch.zeros_like(x)))


def test_backends_chosen_by_name_refuse(name: str) -> None:
    call, x = make_call(name, backend="eager")
    with pytest.raises(NotImplementedError, match=r"no rules for the transforms of torch\.func.*Leave out `backend`"):
        torch.func.grad(lambda x: call(x).sum())(x)


def test_compiled_transforms(name: str) -> None:
    call, x = make_call(name)
    gradient = torch.func.grad(lambda x: call(x).square().sum())
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), gradient(x))


def test_autocast_is_the_same_in_a_transform(name: str) -> None:
    call, x = make_call(name)
    with torch.autocast("cpu", torch.bfloat16):
        dtype = call(x).dtype
        found, _ = torch.func.vjp(call, x)
    wanted, _ = torch.func.vjp(*make_call(name, dtype))  # the same formulas, on tensors that are cast before
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_in_16_bits_are_float32(dtype: torch.dtype) -> None:
    """The products of 100 times larger queries and keys exceed float16's range before they are scaled."""
    t = AttentionCase(P=0, D=64).build(dtype).tensors
    query, key = 100 * t["query"], 100 * t["key"]
    found = torch.func.vmap(lambda x: prefix_attention(x[None], key[:1], t["value"][:1])[0])(query[:1])
    torch.testing.assert_close(found, prefix_attention(query[:1], key[:1], t["value"][:1]))


def test_spans_are_not_mapped() -> None:
    case = AttentionCase(B=3, spans="own").build(torch.float32)
    t, spans = case.tensors, case.options["prefix_spans"]
    store = t["prefix_key"], t["prefix_value"]

    def call(query: Tensor, key: Tensor, value: Tensor, spans: Tensor) -> Tensor:
        return prefix_attention(query[None], key[None], value[None], *store, prefix_spans=spans[None])[0]

    with pytest.raises(ValueError, match="`prefix_spans` must be the same in all calls"):
        torch.func.vmap(call)(t["query"], t["key"], t["value"], spans)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda loss: lambda x: torch.func.jvp(loss, (x,), (x,))])
def test_values_of_ids_are_checked(transform: Callable[..., Any]) -> None:
    ids, weight = torch.tensor([[1, -1]]), torch.randn(9, 4)
    with pytest.raises(ValueError, match="`input_ids` must hold ids"):
        transform(lambda x: prompt_embedding(ids, weight, x).sum())(torch.randn(3, 4))
