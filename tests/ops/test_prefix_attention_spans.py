"""Test stores of prefixes with a span per row, biases of keys, frozen keys, and attention without a prefix."""

import itertools

import pytest
import torch

import fastprefix
from fastprefix import prefix_attention
from fastprefix.parity import DTYPES, make_attention_case, measure
from fastprefix.testing import assert_parity

SPANS = ["own", "equal", "ragged", ((3, 9), (3, 9), (0, 0), (5, 2))]
FEATURES = {
    "nothing": {},
    "gate": {"gate": "BhP", "bias": "H1P"},
    "broadcast gate": {"gate": "h1"},
    "query gate": {"gate": "BHNP", "bias": "BHNP"},
    "head gate": {"gate": "1H1P"},
    "separate": {"gate": "P", "output_gate": "BH", "sinks": True},
    "masked": {"mask": "float", "segments": True, "sinks": True},
    "capped": {"key_bias": "hT", "softcap": 3.0, "mask": "padding"},
    "dropout": {"key_bias": "T", "gate": "P", "dropout_p": 0.4},
    "causal": {"key_bias": "", "is_causal": True, "window_size": 4, "layout": "BNHD"},
    "frozen": {"frozen": 8, "gate": "B1P", "key_bias": "h1"},
}


def make_case(**named):
    return make_attention_case(**({"B": 4, "Hq": 4, "N": 6, "M": 5, "P": 11, "D": 16} | named))


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("spans", SPANS, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_spans(device, backend, spans, name, poisoned):
    # a softmax of its own over one key or none: see _condition
    lengths = ((3, 9), (3, 9), (0, 4), (5, 2)) if name == "separate" and spans in ("ragged", SPANS[3]) else spans
    case = make_case(spans=lengths, **FEATURES[name])
    for dtype in DTYPES.values():
        report = measure(case, dtype, backend, device)
        assert report.ok, f"\n{report}"


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_spans_in_decoding(device, backend, spans, N):
    case = make_case(spans=spans, N=N, M=300, gate="BhP", key_bias="hT", sinks=True)
    report = measure(case, torch.float32, backend, device)
    assert report.ok, f"\n{report}"


def test_long_and_empty_spans_stand_in_one_batch(device, backend):
    case = make_case(B=3, spans=((0, 1200), (1200, 0), (1200, 7)), N=3, key_bias="hT", frozen=1100)
    report = measure(case, torch.float32, backend, device)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_spans_are_prefixes_of_rows(device, backend, dtype):
    """A store of the rows' prefixes equals a separate prefix for each row."""
    inputs = make_case(spans="own", gate="BHNP", key_bias=None).build(torch.float32, device)
    t, spans = inputs.tensors, inputs.options["prefix_spans"].to(dtype)
    expected_t = dict(t)
    for name in ("prefix_key", "prefix_value"):
        expected_t[name] = torch.stack([t[name][:, start : start + n] for start, n in spans.tolist()])
    got = prefix_attention(**t, prefix_spans=spans, backend=backend)
    torch.testing.assert_close(got, prefix_attention(**expected_t, backend=backend))


def test_store_keys_that_no_row_sees_have_no_gradient(device, backend, poisoned):
    case = make_case(spans=((2, 3), (4, 4), (20, 5), (30, 0)))
    inputs = case.build(torch.float32, device)
    t = {name: x.requires_grad_() for name, x in inputs.tensors.items()}
    prefix_attention(**t, **inputs.options, backend=backend).sum().backward()
    seen = torch.zeros(case.store, dtype=torch.bool, device=device)
    seen[2:8] = seen[20:25] = True
    for name in ("prefix_key", "prefix_value"):
        assert not t[name].grad[:, ~seen].any()
        assert t[name].grad[:, seen].any(-1).all()


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("key_bias", ["", "P", "hP", "h1", "BhP", "B1P", "Bh1"])
@pytest.mark.parametrize("prefix_a_row", [False, True])
def test_key_bias(device, backend, key_bias, prefix_a_row, poisoned):
    for more in ({}, {"output_gate": "H", "gate": "1h1"}, {"softcap": 2.0, "dropout_p": 0.2}):
        case = make_case(key_bias=key_bias, prefix_a_row=prefix_a_row, **more)
        for dtype in DTYPES.values():
            report = measure(case, dtype, backend, device)
            assert report.ok, f"\n{report}"


@pytest.mark.parametrize("amount", [-200.0, 200.0])
def test_a_key_bias_may_be_large(device, backend, amount, poisoned):
    inputs = make_case(N=5).build(torch.float32, device)
    bias = torch.full((11,), amount, device=device)
    report = assert_parity(
        prefix_attention, {**inputs.tensors, "prefix_key_bias": bias}, options={"backend": backend}, draws=3
    )
    assert report.ok


@pytest.mark.parametrize("asked", [("prefix_value",), ("prefix_key",), ("prefix_key_bias",), ("prefix_gate",)])
@pytest.mark.parametrize("more", [{}, {"output_gate": "BH"}, {"spans": "equal", "key_bias": "hT"}, {"N": 2}])
def test_gradients_of_parts_of_the_prefix(device, backend, asked, more, poisoned):
    case = make_case(**({"gate": "hP", "key_bias": "hP", "frozen": 3} | more))
    report = measure(case, torch.float32, backend, device, grad=asked)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("frozen", [1, 10, 11])
@pytest.mark.parametrize("prefix_a_row", [False, True])
def test_frozen_keys_have_gradients_of_zero(device, backend, frozen, prefix_a_row, poisoned):
    inputs = make_case(prefix_a_row=prefix_a_row).build(torch.float32, device)
    t = {name: x.requires_grad_() for name, x in inputs.tensors.items()}
    names = ("prefix_key", "prefix_value")
    both = [
        torch.autograd.grad(
            prefix_attention(**t, frozen_prefix=count, backend=backend).square().sum(), [t[name] for name in names]
        )
        for count in (0, frozen)
    ]
    for trained, partly in zip(*both, strict=True):
        assert not partly[..., :frozen, :].any()
        torch.testing.assert_close(partly[..., frozen:, :], trained[..., frozen:, :])


@pytest.mark.parametrize(
    "named",
    [{}, {"mask": "bool", "sinks": True}, {"is_causal": True, "window_size": 3}, {"segments": True, "dropout_p": 0.3},
     {"mask": "float", "softcap": 2.0}, {"N": 1, "M": 300}],
    ids=str,
)  # fmt: skip
def test_plain_attention(device, backend, named, poisoned):
    for dtype in DTYPES.values():
        report = measure(make_case(**({"P": None, "N": 9, "M": 13} | named)), dtype, backend, device)
        assert report.ok, f"\n{report}"


def test_results_are_the_same_from_run_to_run(device, backend):
    inputs = make_case(B=5, N=70, spans="ragged", P=130, gate="BhP", key_bias="hT").build(torch.bfloat16, device)
    t = {name: x.requires_grad_() for name, x in inputs.tensors.items()}

    def run():
        output = prefix_attention(**t, **inputs.options, backend=backend)
        return output, *torch.autograd.grad(output, list(t.values()), torch.ones_like(output))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("span", [(-1, 2), (0, -1), (3, 20), (24, 1), (2**40, 1)])
def test_a_span_beyond_the_store_is_an_error(device, backend, span):
    if device != "cpu":
        pytest.skip("looking at the values would wait for the device")
    inputs = make_case(B=2, spans=((0, 9), (9, 11))).build(torch.float32)  # a store of 22
    spans = torch.tensor([(0, 9), span])
    for function in (prefix_attention, fastprefix.reference.prefix_attention):
        named = {"backend": backend} if function is prefix_attention else {}
        with pytest.raises(ValueError, match=r"`prefix_spans` .* 22 prefix keys; row 1 "):
            function(**inputs.tensors, prefix_spans=spans, **named)


@pytest.mark.parametrize("argument", ["prefix_gate", "prefix_bias"])
def test_too_few_columns_for_the_longest_span_are_an_error(device, backend, argument):
    if device != "cpu":
        pytest.skip("looking at the values would wait for the device")
    inputs = make_case(B=2, spans=((0, 9), (9, 11))).build(torch.float32)
    for columns, right in ((10, False), (11, True), (15, True)):
        call = {**inputs.tensors, **inputs.options, argument: torch.ones(columns)}
        if right:
            prefix_attention(**call, backend=backend)
            continue
        with pytest.raises(ValueError, match=rf"`{argument}` .* \(11\).*10"):
            prefix_attention(**call, backend=backend)


def test_columns_beyond_the_longest_span_have_no_gradient(device, backend, poisoned):
    inputs = make_case(B=2, spans=((0, 9), (9, 11))).build(torch.float32, device)
    for shape in ((15,), (2, 4, 6, 15)):
        gate = torch.ones(shape, device=device, requires_grad=True)
        output = prefix_attention(**inputs.tensors, **inputs.options, prefix_gate=gate, backend=backend)
        (gradient,) = torch.autograd.grad(output.sum(), gate)
        assert gradient[..., :11].any()
        assert not gradient[..., 11:].any()


def test_spans_change_without_compiling_anew(device, backend):
    torch._dynamo.reset()
    inputs = make_case(spans="own", gate="BhP", key_bias="hT").build(torch.float32, device)
    t = {name: x.requires_grad_() for name, x in inputs.tensors.items()}

    def run(spans):
        return prefix_attention(**t, prefix_spans=spans, frozen_prefix=2, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    given = inputs.options["prefix_spans"]
    for order in itertools.islice(itertools.permutations(range(4)), 3):
        spans = given[list(order)]
        expected, got = run(spans), compiled(spans)
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(x.sum(), list(t.values())) for x in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)
