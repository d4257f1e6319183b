"""Test the reference against scalar loops written from the formulas, and against its invariants."""

import math

import pytest
import torch

from fastprefix.parity import AttentionCase
from fastprefix.reference import prefix_attention


def brute_force(
    query, key, value, prefix_key, prefix_value, *, prefix_gate=None, output_gate=None, attn_mask=None,
    prefix_bias=None, is_causal=False, window_size=None, segment_ids=None, softcap=None, sinks=None, scale=None,
):  # fmt: skip
    """Compute one output row at a time, in Python floats."""
    (B, Hq, N, D), (_, Hkv, M, Dv) = query.shape, value.shape
    P, c = prefix_key.shape[-2], 1 / math.sqrt(D) if scale is None else scale

    def cap(s):
        return s if softcap is None else softcap * math.tanh(s / softcap)

    def sees(b, h, i, j):
        distance = i + (M - N) - j
        visible = not (is_causal and distance < 0)
        if window_size is not None:
            visible &= distance < window_size if is_causal else abs(distance) < window_size
        if segment_ids is not None:
            visible &= bool(segment_ids[0][b, i] == segment_ids[1][b, j])
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            padding = attn_mask.ndim == 2
            visible &= bool(attn_mask[b, j] if padding else attn_mask.expand(B, Hq, N, M)[b, h, i, j])
        return visible

    def gate(b, h, i, p):
        if prefix_gate is None:
            return 1.0
        if prefix_gate.ndim == 4:
            return float(prefix_gate.expand(B, Hq, N, P)[b, h, i, p])
        return float(prefix_gate.expand(B, Hkv, P)[b, h // (Hq // Hkv), p])

    def softmax_sum(columns, sink=None):
        z = sum(math.exp(s) for s, _ in columns) + (0.0 if sink is None else math.exp(sink))
        total = torch.zeros(Dv, dtype=torch.float64)
        for s, v in columns:
            total += math.exp(s) / z * v
        return total

    output = torch.zeros(B, Hq, N, Dv, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(Hq) for i in range(N)):
        kv, q = h // (Hq // Hkv), query[b, h, i]
        pk, pv = (x[b, kv] if x.ndim == 4 else x[kv] for x in (prefix_key, prefix_value))
        prefix = []
        for p in range(P):
            g = gate(b, h, i, p)
            bias = 0.0 if prefix_bias is None else float(prefix_bias.expand(B, Hq, N, P)[b, h, i, p])
            prefix.append((cap(c * g * float(q @ pk[p])) + bias, g * pv[p]))
        tokens = []
        for j in (j for j in range(M) if sees(b, h, i, j)):
            added = attn_mask is not None and attn_mask.is_floating_point()
            bias = float(attn_mask.expand(B, Hq, N, M)[b, h, i, j]) if added else 0.0
            tokens.append((cap(c * float(q @ key[b, kv, j])) + bias, value[b, kv, j]))
        sink = None if sinks is None else float(sinks[h])
        if output_gate is None:
            output[b, h, i] = softmax_sum(prefix + tokens, sink)
        else:
            og = float(output_gate.expand(B, Hq)[b, h])
            output[b, h, i] = softmax_sum(tokens, sink) + og * softmax_sum(prefix)
    return output


FEATURES = [
    {}, {"Hq": 4}, {"Hq": 3, "Hkv": 1}, {"P": 0}, {"M": 0}, {"Dv": 3}, {"prefix_a_row": True, "Hq": 4},
    *({"Hq": 4, "gate": gate} for gate in ("", "P", "hP", "B1P", "Bh1", "BHNP", "1H1P", "B1NP")),
    {"output_gate": "H"}, {"output_gate": "BH", "gate": "BhP", "sinks": True}, {"output_gate": "B1", "P": 0},
    {"mask": "padding"}, {"mask": "bool"}, {"mask": "float"}, {"bias": "BHNP"}, {"bias": "P", "gate": "P"},
    {"segments": True}, {"segments": True, "P": 0}, {"sinks": True}, {"sinks": True, "P": 0, "M": 0},
    *({"options": options} for options in (
        {"is_causal": True}, {"is_causal": True, "window_size": 2}, {"window_size": 2}, {"softcap": 1.5},
        {"scale": -0.3}, {"is_causal": True, "softcap": 0.7},
    )),
    {"N": 7, "M": 3, "P": 0, "options": {"is_causal": True}},
]  # fmt: skip


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_equals_scalar_loops(features):
    case = AttentionCase(**({"N": 3, "M": 4, "D": 4} | features)).build(torch.float64)
    expected = brute_force(**case.tensors, **case.options)
    torch.testing.assert_close(prefix_attention(**case.tensors, **case.options), expected, rtol=1e-12, atol=1e-12)


def test_equals_sdpa_over_the_concatenation():
    t = AttentionCase().build(torch.float64).tensors
    k, v = (
        torch.cat([prefix.expand(2, -1, -1, -1), tokens], dim=2)
        for prefix, tokens in ((t["prefix_key"], t["key"]), (t["prefix_value"], t["value"]))
    )
    expected = torch.nn.functional.scaled_dot_product_attention(t["query"], k, v)
    torch.testing.assert_close(prefix_attention(**t), expected)


def test_a_gate_of_zero_still_takes_mass():
    t = AttentionCase(P=1, M=1).build(torch.float64).tensors
    s = (t["query"] @ t["key"].mT) / math.sqrt(8)
    expected = torch.sigmoid(s) * t["value"]  # the prefix's score is 0, its value 0
    torch.testing.assert_close(prefix_attention(**t, prefix_gate=torch.zeros(1, dtype=torch.float64)), expected)
