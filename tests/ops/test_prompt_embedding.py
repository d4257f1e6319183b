"""prompt_embedding as an operator: parity, autograd, compilation, autocast, dropout."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastprefix import prompt_embedding
from fastprefix.parity import DTYPES, EmbeddingCase, embedding_cases, measure

SMALL = [case for case in embedding_cases() if case.d < 100]
CASES = [EmbeddingCase(), EmbeddingCase(offset="ffn"), EmbeddingCase(offset="low_rank", spare=2)]


def leaves(case, device="cpu", dtype=torch.float32):
    tensors = case.build(dtype, device).tensors
    flat = [x for v in tensors.values() for x in (v if isinstance(v, tuple) else (v,)) if x.is_floating_point()]
    return tensors, [x.requires_grad_() for x in flat]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.B}-{case.N}-{case.S}-{case.offset}")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_parity(device, backend, case, dtype, poisoned):
    report = measure(case, DTYPES[dtype], backend, device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.offset))
def test_gradcheck_and_double_backward(device, backend, case):
    tensors, flat = leaves(case, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *_: prompt_embedding(**tensors, backend="eager"), tuple(flat))
    tensors, flat = leaves(case, device)
    gradient = torch.autograd.grad(prompt_embedding(**tensors, backend=backend).sum(), flat[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.offset))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, backend, case, dynamic):
    torch._dynamo.reset()
    tensors, flat = leaves(case, device)
    compiled = torch.compile(prompt_embedding, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, got = prompt_embedding(**tensors, backend=backend), compiled(**tensors, backend=backend)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), flat), torch.autograd.grad(expected.sum(), flat), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_replays_dropout(device, backend, reentrant):
    tensors, flat = leaves(CASES[1], device)

    def run(prompt):
        return prompt_embedding(**(tensors | {"prompt": prompt}), dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    expected = torch.autograd.grad(run(tensors["prompt"]).sum(), flat)
    torch.manual_seed(1)
    checkpoint(run, tensors["prompt"], use_reentrant=reentrant).sum().backward()
    for tensor, gradient in zip(flat, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


def test_autocast_brings_parameters_to_the_tables_dtype(device, backend):
    tensors, _ = leaves(CASES[1], device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        got = prompt_embedding(**(tensors | {"prompt": tensors["prompt"].float()}), backend=backend)
    assert torch.equal(got, prompt_embedding(**tensors, backend=backend))


def test_nothing_is_saved_but_the_inputs(device, backend):
    (tensors, flat), saved = leaves(CASES[1], device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        prompt_embedding(**tensors, backend=backend)
    known = {x.untyped_storage().data_ptr() for x in (*flat, tensors["input_ids"])}
    assert {x.untyped_storage().data_ptr() for x in saved} <= known
