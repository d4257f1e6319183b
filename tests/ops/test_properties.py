"""Test every backend against float64 with shapes and options drawn by hypothesis."""

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprefix.parity import DTYPES, AttentionCase, EmbeddingCase, _condition, measure

SETTINGS = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GATES = st.sampled_from([None, "", "P", "hP", "h1", "B1P", "BhP", "BHNP", "1H1P", "B1NP"])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "is_causal": st.booleans(),
        "window_size": st.integers(1, 9),
        "softcap": st.floats(1.0, 30.0),
        "scale": st.floats(-1.0, 1.0),
        "dropout_p": st.floats(0.0, 0.9),
    },
)


@st.composite
def attention_cases(draw):
    hkv = draw(st.integers(1, 3))
    rows = draw(st.integers(1, 3))
    spans = draw(st.none() | st.tuples(*[st.tuples(st.integers(0, 9), st.integers(0, 9))] * rows))
    longest = max((length for _, length in spans or ()), default=0)
    case = AttentionCase(
        B=rows, Hq=hkv * draw(st.integers(1, 3)), Hkv=hkv, N=draw(st.integers(0, 9)),
        M=draw(st.integers(0, 9)), P=draw(st.none() | st.integers(0, 9)) if spans is None else longest,
        D=draw(st.integers(2, 9)), Dv=draw(st.integers(2, 9)),
        prefix_a_row=draw(st.booleans()), gate=draw(GATES), spans=spans,
        output_gate=draw(st.sampled_from([None, None, "BH", "H", "B1"])),
        mask=draw(st.sampled_from([None, "padding", "bool", "float"])), bias=draw(st.sampled_from([None, "P", "BHNP"])),
        key_bias=draw(st.sampled_from([None, "P", "hP", "BhP", "B1P", "h1"])),
        frozen=draw(st.integers(0, 20)), segments=draw(st.booleans()), sinks=True,
        layout=draw(st.sampled_from(["BHND", "BNHD"])), options=draw(OPTIONS),
    )  # fmt: skip
    if spans is not None and min(length for _, length in spans) <= 1:
        case = replace(case, output_gate=None)
    return _condition(case)


@given(case=attention_cases(), dtype=st.sampled_from(list(DTYPES)))
@SETTINGS
def test_prefix_attention(device, backend, case, dtype):
    report = measure(case, DTYPES[dtype], backend, device, draws=4)
    assert report.ok, f"\n{report}"


@st.composite
def embedding_cases(draw):
    B, S = draw(st.integers(0, 4)), draw(st.none() | st.integers(0, 5))
    offset = draw(st.sampled_from([None, "ffn", "low_rank", "position_offset"]))
    spans, options, K, index = None, {"offset_scale": draw(st.floats(-2.0, 2.0))}, None, None
    if S is not None and draw(st.booleans()):
        starts = [draw(st.integers(0, S)) for _ in range(B)]
        spans = [(start, draw(st.integers(0, S - start))) for start in starts]
        longest = max((length for _, length in spans), default=0)
        options["prompt_length"] = draw(st.none() | st.integers(longest, longest + 2))
    if offset is not None and draw(st.booleans()):
        K = draw(st.integers(0, 3))
        index = [draw(st.integers(-1, K - 1)) for _ in range(B)]
    return EmbeddingCase(
        B=B, N=draw(st.integers(0, 9)), S=S, V=draw(st.integers(1, 20)), d=draw(st.integers(1, 40)),
        r=draw(st.integers(1, 20)), offset=offset, spare=draw(st.integers(0, 5)), spans=spans, K=K, index=index,
        options=options,
    )  # fmt: skip


@given(case=embedding_cases(), dtype=st.sampled_from(list(DTYPES)))
@settings(SETTINGS, max_examples=50)
def test_prompt_embedding(device, backend, case, dtype):
    report = measure(case, DTYPES[dtype], backend, device, draws=4)
    assert report.ok, f"\n{report}"
