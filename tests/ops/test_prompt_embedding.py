"""Test prompt_embedding as an operator: parity, autograd, compilation, autocast, dropout."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastprefix import prompt_embedding
from fastprefix.parity import DTYPES, EmbeddingCase, embedding_cases, measure

SMALL = [case for case in embedding_cases() if case.d < 100]
SHARED = [
    EmbeddingCase(),
    EmbeddingCase(offset="ffn"),
    EmbeddingCase(offset="low_rank", spare=2),
    EmbeddingCase(offset="position_offset", spare=2),
]
OWN = [
    replace(case, B=4, S=6, spans=[(0, 3), (2, 4), (6, 0), (2, 4)], options={"prompt_length": 5}, **bank)
    for case in SHARED
    for bank in [{} if case.offset is None else {"K": 3, "index": [2, 0, -1, 2]}]
]
"""Prompts of the rows' own that overlap, rows 0 and 1 of the store seen by one alone, and entry 1 used by nobody."""
CASES = [*SHARED, *OWN]


def name(case):
    return f"{case.offset}{', rows of their own' if case.spans else ''}"


def leaves(case, device="cpu", dtype=torch.float32):
    inputs = case.build(dtype, device)
    flat = [x for v in inputs.tensors.values() for x in (v if isinstance(v, tuple) else (v,)) if x.is_floating_point()]
    return inputs.tensors | inputs.options, [x.requires_grad_() for x in flat]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.B}-{case.N}-{case.S}-{name(case)}")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_parity(device, backend, case, dtype, poisoned):
    report = measure(case, DTYPES[dtype], backend, device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradcheck_and_double_backward(device, backend, case):
    tensors, flat = leaves(case, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *_: prompt_embedding(**tensors, backend="eager"), tuple(flat))
    tensors, flat = leaves(case, device)
    gradient = torch.autograd.grad(prompt_embedding(**tensors, backend=backend).sum(), flat[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, backend, case, dynamic):
    torch._dynamo.reset()
    tensors, flat = leaves(case, device)
    compiled = torch.compile(prompt_embedding, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, got = prompt_embedding(**tensors, backend=backend), compiled(**tensors, backend=backend)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), flat), torch.autograd.grad(expected.sum(), flat), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", [SHARED[1], OWN[1]], ids=name)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_replays_dropout(device, backend, case, reentrant):
    tensors, flat = leaves(case, device)

    def run(prompt):
        return prompt_embedding(**(tensors | {"prompt": prompt}), dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    expected = torch.autograd.grad(run(tensors["prompt"]).sum(), flat)
    torch.manual_seed(1)
    checkpoint(run, tensors["prompt"], use_reentrant=reentrant).sum().backward()
    for tensor, gradient in zip(flat, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("case", [SHARED[1], *OWN], ids=name)
def test_autocast_brings_parameters_to_the_tables_dtype(device, backend, case):
    tensors, _ = leaves(case, device, torch.bfloat16)

    def widen(x):
        return tuple(map(widen, x)) if isinstance(x, tuple) else x.float() if x.is_floating_point() else x

    parameters = {key: widen(tensors[key]) for key in ("prompt", case.offset) if key in tensors}
    with torch.autocast(device, torch.bfloat16):
        got = prompt_embedding(**(tensors | parameters), backend=backend)
    assert torch.equal(got, prompt_embedding(**tensors, backend=backend))


@pytest.mark.parametrize("case", SHARED[1:], ids=name)
def test_autocast_does_not_change_gradients(device, backend, case):
    tensors, flat = leaves(case, device)
    output = prompt_embedding(**tensors, backend=backend)
    wanted = torch.autograd.grad(output.sum(), flat, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(output.sum(), flat)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("case", [SHARED[1], *OWN], ids=name)
def test_nothing_is_saved_but_the_inputs(device, backend, case):
    (tensors, flat), saved = leaves(case, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        prompt_embedding(**tensors, backend=backend)
    integers = [tensors[key] for key in ("input_ids", "prompt_spans", "index") if key in tensors]
    known = {x.untyped_storage().data_ptr() for x in (*flat, *integers)}
    assert {x.untyped_storage().data_ptr() for x in saved} <= known


def of_row(tensors, row, case):
    """Return the call of one row alone."""
    start, length = case.spans[row]
    alone = {"input_ids": tensors["input_ids"][row : row + 1], "weight": tensors["weight"]}
    alone["prompt"] = tensors["prompt"][start : start + length]
    if case.offset is not None and case.index[row] >= 0:
        bank = tensors[case.offset]
        entry = case.index[row]
        alone[case.offset] = tuple(x[entry] for x in bank) if isinstance(bank, tuple) else bank[entry]
    return alone


@pytest.mark.parametrize("case", OWN, ids=name)
def test_rows_of_their_own_are_those_of_calls_of_one_row(device, backend, case, poisoned):
    tensors, flat = leaves(case, device)
    output = prompt_embedding(**tensors, backend=backend)
    assert output.shape == (case.B, 5 + case.N, case.d)
    upstream, alone = torch.randn_like(output), 0.0
    for row, (_, length) in enumerate(case.spans):
        expected = prompt_embedding(**of_row(tensors, row, case), backend=backend)[0]
        assert not output[row, : 5 - length].any()
        torch.testing.assert_close(output[row, 5 - length :], expected)
        alone = alone + (expected * upstream[row, 5 - length :]).sum()
    expected = torch.autograd.grad(alone, flat, allow_unused=True)
    for a, b in zip(torch.autograd.grad(output, flat, upstream), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", OWN, ids=name)
def test_gradients_of_what_nobody_uses(device, backend, case, poisoned):
    """Only row 1 has an upstream gradient, and row 2 in the unused columns left of its prompt."""
    tensors, flat = leaves(case, device)
    output = prompt_embedding(**tensors, backend=backend)
    upstream = torch.zeros_like(output)
    upstream[1], upstream[2, :5] = 1.0, 1.0
    weight, prompt, *bank = torch.autograd.grad(output, flat, upstream)
    assert weight.any()
    assert prompt[:2].eq(0).all()
    assert prompt[2:].eq(1).all()
    for gradient in bank:
        assert gradient[0].any()
        assert not gradient[1:].any()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_same_from_run_to_run(device, backend, case):
    tensors, flat = leaves(case, device, torch.bfloat16)
    runs = []
    for _ in range(2):
        output = prompt_embedding(**tensors, backend=backend)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        runs.append([output, *torch.autograd.grad(output, flat, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", OWN, ids=name)
def test_integers_of_32_bits(device, backend, case):
    tensors, flat = leaves(case, device)
    short = {key: tensors[key].int() for key in ("prompt_spans", "index") if key in tensors}
    results = []
    for given in tensors, tensors | short:
        output = prompt_embedding(**given, backend=backend)
        results.append([output, *torch.autograd.grad(output.square().sum(), flat)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_prompt_length_is_read_from_the_spans(device, backend):
    tensors, _ = leaves(OWN[0], device)
    del tensors["prompt_length"]
    assert prompt_embedding(**tensors, backend=backend).shape[1] == 4 + OWN[0].N
    none = torch.zeros(4, 2, dtype=torch.int64, device=device)
    assert prompt_embedding(**(tensors | {"prompt_spans": none}), backend=backend).shape[1] == OWN[0].N
    empty = {"input_ids": tensors["input_ids"][:0], "prompt_spans": none[:0]}
    assert prompt_embedding(**(tensors | empty), backend=backend).shape == (0, OWN[0].N, OWN[0].d)


@pytest.mark.parametrize("offset", ["ffn", "low_rank", "position_offset"])
@pytest.mark.parametrize("sizes", [{"K": 0, "S": 0}, {"K": 1, "N": 0}, {"K": 2, "B": 0}], ids=str)
def test_empty_stores_and_banks(device, backend, offset, sizes, poisoned):
    B = sizes.get("B", 2)
    options = {"prompt_length": 2}
    case = EmbeddingCase(offset=offset, spans=[(0, 0)] * B, index=[-1] * B, options=options, **sizes)
    tensors, flat = leaves(case, device)
    output = prompt_embedding(**tensors, backend=backend)
    assert output.shape == (B, 2 + case.N, case.d)
    assert not output[:, :2].any()
    assert torch.equal(output[:, 2:], tensors["weight"][tensors["input_ids"]])
    weight, *others = torch.autograd.grad(output.sum(), flat)
    assert weight.any() == (B * case.N > 0)
    assert not any(gradient.any() for gradient in others)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"index": [0, 3]}, r"^`index` must hold values from -1 \(no offset\) to K - 1 = 2, got 3"),
        ({"index": [-2, 0]}, r"^`index` must hold .*, got -2"),
        (
            {"prompt_spans": [[0, 3], [4, 3]]},
            r"^`prompt_spans` must hold .* within the prompt's 6 rows, got \(4, 3\) in row 1",
        ),
        ({"prompt_spans": [[-1, 3], [0, 3]]}, r"^`prompt_spans` must hold .*, got \(-1, 3\) in row 0"),
        ({"prompt_spans": [[2, -2], [0, 3]]}, r"^`prompt_spans` must hold .*, got \(2, -2\) in row 0"),
        ({"prompt_spans": [[2**62, 2**62], [0, 3]]}, r"^`prompt_spans` must hold .* in row 0"),
        ({"prompt_length": 2}, r"^`prompt_spans` must hold lengths up to prompt_length = 2, got \(0, 3\) in row 0"),
    ],
    ids=str,
)
def test_values_out_of_range(device, backend, monkeypatch, wrong, message):
    monkeypatch.setenv("FASTPREFIX_CHECK_IDS", "1")
    case = EmbeddingCase(S=6, spans=[(0, 3), (1, 2)], offset="ffn", K=3, index=[0, 1], options={"prompt_length": 3})
    tensors, _ = leaves(case, device)
    wrong = {
        key: torch.tensor(value, device=device) if isinstance(value, list) else value for key, value in wrong.items()
    }
    with pytest.raises(ValueError, match=message):
        prompt_embedding(**(tensors | wrong), backend=backend)
