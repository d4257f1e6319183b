"""Test prefix_attention as an operator: parity, layouts, autograd, compilation, autocast, dropout."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastprefix import prefix_attention
from fastprefix.ops.prefix_attention.validation import canonical_arguments
from fastprefix.parity import DTYPES, AttentionCase, attention_cases, measure

SMALL = [case for case in attention_cases(44, seed=1) if case.scores < 5_000]
FULL = AttentionCase(Hq=4, gate="BhP", output_gate="BH", sinks=True, options={"is_causal": True})
STORE = AttentionCase(
    Hq=4, P=6, gate="BHNP", bias="P", key_bias="hT", spans="ragged", frozen=2, sinks=True, options={"is_causal": True}
)
JOINT = AttentionCase(Hq=4, gate="hP", sinks=True, options={"softcap": 5.0})


def leaves(case, device="cpu", dtype=torch.float32):
    return {name: tensor.requires_grad_() for name, tensor in case.build(dtype, device).tensors.items()}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.N}-{case.M}-{case.P}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(device, backend, case, dtype):
    report = measure(case, DTYPES[dtype], backend, device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("case", [JOINT, FULL], ids=["joint", "separate"])
def test_parity_float32_with_poisoned_memory(device, backend, case, poisoned):
    report = measure(case, torch.float32, backend, device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(
    ("case", "layout"),
    [(JOINT, "BHND"), (JOINT, "sliced"), (FULL, "BNHD"), (STORE, "BHND"), (STORE, "BNHD"), (STORE, "sliced")],
    ids=["joint", "joint-sliced", "separate-BNHD", "store", "store-BNHD", "store-sliced"],
)
def test_opcheck(device, backend, case, layout):
    t = leaves(replace(case, layout=layout), device)
    arguments = canonical_arguments(**t, **case.build(torch.float32, device).options)
    torch.library.opcheck(getattr(torch.ops.fastprefix.prefix_attention, backend), tuple(arguments))


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("case", [JOINT, FULL, replace(STORE, frozen=0)], ids=["joint", "separate", "store"])
def test_gradcheck(case):
    t, options = leaves(case, dtype=torch.float64), case.build(torch.float64).options
    assert torch.autograd.gradcheck(
        lambda *x: prefix_attention(**dict(zip(t, x, strict=True)), **options, backend="eager"), tuple(t.values())
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**63 - 1])
def test_a_window_over_everything_hides_nothing(device, backend, window, causal):
    t = leaves(AttentionCase(N=5, M=7, P=3), device)

    def run(**options):
        output = prefix_attention(**t, is_causal=causal, backend=backend, **options)
        return output, *torch.autograd.grad(output, t.values(), torch.ones_like(output))

    for got, expected in zip(run(window_size=window), run(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", True), ("inductor", False)])
def test_compile(device, backend, compiler, dynamic):
    torch._dynamo.reset()

    def run(**t):
        return prefix_attention(**t, **FULL.options, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend=compiler, dynamic=dynamic)
    for n in (5, 6) if dynamic else (5,):
        t = leaves(replace(FULL, N=n), device)
        expected, got = run(**t), compiled(**t)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got.sum(), t.values()), torch.autograd.grad(expected.sum(), t.values()), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_calls_of_other_shapes_compile_nothing_anew(device, backend):
    """A compiled call does not depend on other calls and their checks."""
    torch._dynamo.reset()
    t = FULL.build(torch.float32, device).tensors
    compiled = torch.compile(functools.partial(prefix_attention, backend=backend), fullgraph=True, backend="eager")
    expected = compiled(**t)
    prefix_attention(**replace(FULL, N=9).build(torch.float32, device).tensors, backend=backend)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(**t), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_replays_dropout(device, backend, reentrant):
    t = leaves(JOINT, device)

    def run(*x):
        return prefix_attention(**dict(zip(t, x, strict=True)), dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    expected = torch.autograd.grad(run(*t.values()).sum(), t.values())
    torch.manual_seed(1)
    checkpoint(run, *t.values(), use_reentrant=reentrant).sum().backward()
    for tensor, gradient in zip(t.values(), expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [JOINT, STORE], ids=["joint", "store"])
def test_autocast_equals_explicit_casts(device, backend, case, dtype):
    inputs = case.build(torch.float32, device)
    with torch.autocast(device, dtype):
        got = prefix_attention(**inputs.tensors, **inputs.options, backend=backend)
    cast = case.build(dtype, device)
    assert torch.equal(got, prefix_attention(**cast.tensors, **cast.options, backend=backend))


def test_no_grad_inference_mode_and_determinism(device, backend):
    t = leaves(JOINT, device)
    expected = prefix_attention(**t, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = prefix_attention(**t, backend=backend)
        assert not got.requires_grad
        assert torch.equal(got, expected)


def test_double_backward_is_refused(device, backend):
    t = leaves(JOINT, device)
    grad = torch.autograd.grad(prefix_attention(**t, backend=backend).sum(), t["query"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_forward_mode_is_refused(device, backend):
    t = JOINT.build(torch.float32, device).tensors
    query = t.pop("query")

    def call(query):
        return prefix_attention(query, **t, backend=backend)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (query,), (torch.ones_like(query),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(dual)
        assert call(query).shape == query.shape  # without tangents


EXPANDED = [
    ("prefix_gate", (1, 4, 1, 9), (3, 4, 5, 9)),
    ("prefix_gate", (3, 4, 1, 9), (3, 4, 5, 9)),
    ("prefix_gate", (3, 4, 5, 1), (3, 4, 5, 9)),
    ("prefix_gate", (1, 2, 9), (3, 2, 9)),
    ("prefix_gate", (1, 1, 1), (3, 2, 9)),
    ("prefix_bias", (1, 1, 1, 9), (3, 4, 5, 9)),
    ("prefix_bias", (3, 1, 5, 1), (3, 4, 5, 9)),
    ("prefix_key_bias", (1, 2, 9), (3, 2, 9)),
    ("prefix_key_bias", (1, 1, 1), (3, 1, 1)),
    ("prefix_key_bias", (3, 1, 9), (3, 2, 9)),
    ("attn_mask", (1, 1, 1, 7), (3, 4, 5, 7)),
    ("attn_mask", (3, 1, 5, 1), (3, 4, 5, 7)),
    ("output_gate", (1, 1), (3, 4)),
    ("sinks", (1,), (4,)),
    ("query", (1, 1, 1, 8), (3, 4, 5, 8)),
    ("key", (1, 1, 7, 8), (3, 2, 7, 8)),
    ("value", (3, 2, 1, 8), (3, 2, 7, 8)),
    ("prefix_key", (1, 9, 8), (2, 9, 8)),
    ("prefix_value", (2, 1, 8), (2, 9, 8)),
]


@pytest.mark.parametrize(("name", "shape", "full"), EXPANDED, ids=str)
def test_expanded_arguments_are_like_dense_ones(device, backend, name, shape, full, poisoned):
    """An expanded tensor has the sizes of a dense one and strides of 0. Its gradient has every element."""
    t = AttentionCase(B=3, Hq=4, Hkv=2, N=5, M=7, P=9, D=8, prefix_a_row=False).build(torch.float32, device).tensors
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for argument in (base.expand(full), base.expand(full).contiguous()):
        inputs = {**t, name: argument.detach()}
        leaves = [x.requires_grad_() for each, x in inputs.items() if each not in ("attn_mask", "prefix_bias")]
        output = prefix_attention(**inputs, backend=backend)
        weights = torch.arange(output.numel(), device=device).view_as(output).cos()
        found.append((output, *torch.autograd.grad((output * weights).sum(), leaves)))
    for expanded, dense in zip(*found, strict=True):
        torch.testing.assert_close(expanded, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (3, 1, 5, 7), (3, 7)])
def test_a_mask_may_be_bytes_viewed_as_bool(device, backend, shape):
    t = AttentionCase(B=3, Hq=4, N=5, M=7).build(torch.float32, device).tensors
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
    bytes_as_bool = (mask.to(torch.uint8) * 6).view(torch.bool)
    expected = prefix_attention(**t, attn_mask=mask, backend=backend)
    torch.testing.assert_close(prefix_attention(**t, attn_mask=bytes_as_bool, backend=backend), expected)


def test_only_gradients_asked_for(device, backend):
    for name in leaves(FULL):
        t = FULL.build(torch.float32, device).tensors
        t[name].requires_grad_()
        prefix_attention(**t, backend=backend).sum().backward()
        assert {n for n, tensor in t.items() if tensor.grad is not None} == {name}


def test_saved_tensors_are_inputs_output_and_normalizers(device, backend):
    t, saved = leaves(AttentionCase(B=5, Hq=4, P=9, layout="BNHD"), device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = prefix_attention(**t, backend=backend)
    known = {x.untyped_storage().data_ptr() for x in (*t.values(), output)}
    others = [x for x in saved if x.untyped_storage().data_ptr() not in known]
    assert [x.shape for x in others] == [(1, 2, *output.shape[:3])]


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("step", [1, 2])
def test_the_output_is_laid_out_as_the_query(device, backend, layout, step):
    t = AttentionCase(layout=layout).build(torch.float32, device).tensors
    query, expected = t["query"], t["query"].stride()
    t["query"] = torch.empty_strided(query.shape, [step * stride for stride in expected], device=device).copy_(query)
    assert prefix_attention(**t, backend=backend).stride() == expected


@pytest.mark.parametrize("output_gate", [None, "1H"])
def test_a_single_key_has_no_gradient(device, backend, output_gate):
    t = leaves(AttentionCase(P=1, M=0, output_gate=output_gate), device)
    output = prefix_attention(**t, backend=backend)
    assert not torch.autograd.grad(output.square().sum(), t["prefix_key"])[0].any()


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("M", [0, 4])
def test_a_prefix_of_nan_is_seen(device, backend, B, M):
    t = AttentionCase(B=B, N=1, M=M, P=96).build(torch.float32, device).tensors
    t["prefix_key"].fill_(torch.nan)
    assert prefix_attention(**t, backend=backend).isnan().all()


def test_a_query_that_sees_nothing_is_zero(device, backend):
    t = leaves(AttentionCase(P=0), device)
    output = prefix_attention(**t, attn_mask=torch.zeros(2, 7, dtype=torch.bool, device=device), backend=backend)
    assert not output.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(output.sum(), t.values()))


@pytest.mark.parametrize("zero", ["B", "N", "M", "P"])
@pytest.mark.parametrize("more", [{}, {"spans": "own", "key_bias": "T", "gate": "BhP"}], ids=["", "spans"])
def test_zero_sizes(device, backend, zero, more):
    case = AttentionCase(**{zero: 0}, **more)
    t = leaves(case, device)
    output = prefix_attention(**t, **case.build(torch.float32, device).options, backend=backend)
    assert output.shape == t["query"].shape
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), t.values()))


def test_dropout_of_everything_and_replay(device, backend):
    t = JOINT.build(torch.float32, device).tensors
    assert not prefix_attention(**t, dropout_p=1.0, backend=backend).any()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(prefix_attention(**t, dropout_p=0.5, backend=backend))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
