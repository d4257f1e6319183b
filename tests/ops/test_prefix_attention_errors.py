"""Test invalid inputs of prefix_attention: the type of the error, and the argument's name in its message."""

from typing import Any

import pytest
import torch

import fastprefix

Z = torch.zeros
B, HQ, HKV, N, M, P, D, DV = 2, 4, 2, 3, 5, 6, 8, 7
NONE: dict[str, Any] = {"prefix_key": None, "prefix_value": None}
SPANS: dict[str, Any] = {"prefix_spans": Z(B, 2, dtype=torch.int64)}

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("query no tensor", {"query": 1.0}, TypeError, "query"),
    ("query integer", {"query": Z(B, HQ, N, D, dtype=torch.int64)}, TypeError, "query"),
    ("query float8", {"query": Z(B, HQ, N, D).to(torch.float8_e5m2)}, TypeError, "query"),
    ("query rank", {"query": Z(B, N, D)}, ValueError, "query"),
    ("query without head dimension", {"query": Z(B, HQ, N, 0)}, ValueError, "query"),
    ("query heads", {"query": Z(B, 3, N, D)}, ValueError, "query"),
    ("query sparse", {"query": Z(B, HQ, N, D).to_sparse()}, TypeError, "query"),
    ("key rank", {"key": Z(B, M, D)}, ValueError, "key"),
    ("key batch", {"key": Z(B + 1, HKV, M, D)}, ValueError, "key"),
    ("key size", {"key": Z(B, HKV, M, D + 1)}, ValueError, "key"),
    ("key dtype", {"key": Z(B, HKV, M, D, dtype=torch.float64)}, TypeError, "key"),
    ("key device", {"key": Z(B, HKV, M, D, device="meta")}, ValueError, "key"),
    ("value length", {"value": Z(B, HKV, M + 1, DV)}, ValueError, "value"),
    ("value heads", {"value": Z(B, 1, M, DV)}, ValueError, "value"),
    ("value empty", {"value": Z(B, HKV, M, 0)}, ValueError, "value"),
    ("prefix_key rank", {"prefix_key": Z(P, D)}, ValueError, "prefix_key"),
    ("prefix_key heads", {"prefix_key": Z(HQ, P, D)}, ValueError, "prefix_key"),
    ("prefix_key size", {"prefix_key": Z(HKV, P, DV)}, ValueError, "prefix_key"),
    ("prefix_key None", {"prefix_key": None}, TypeError, "prefix_key"),
    ("prefix_value None", {"prefix_value": None}, TypeError, "prefix_value"),
    ("prefix_value rank", {"prefix_value": Z(B, HKV, P, DV)}, ValueError, "prefix_value"),
    ("prefix_value length", {"prefix_value": Z(HKV, P + 1, DV)}, ValueError, "prefix_value"),
    ("prefix_value dtype", {"prefix_value": Z(HKV, P, DV).half()}, TypeError, "prefix_value"),
    ("prefix_gate shape", {"prefix_gate": Z(P + 1)}, ValueError, "prefix_gate"),
    ("prefix_gate with query heads", {"prefix_gate": Z(B, HQ, P)}, ValueError, "prefix_gate"),
    ("prefix_gate 4-D", {"prefix_gate": Z(B, HKV, N, P)}, ValueError, "prefix_gate"),
    ("prefix_gate bool", {"prefix_gate": Z(P).bool()}, TypeError, "prefix_gate"),
    ("output_gate shape", {"output_gate": Z(HKV)}, ValueError, "output_gate"),
    ("output_gate rank", {"output_gate": Z(B, HQ, 1)}, ValueError, "output_gate"),
    ("attn_mask shape", {"attn_mask": Z(B, 1, N, M + 1)}, ValueError, "attn_mask"),
    ("attn_mask padding", {"attn_mask": Z(N, M).bool()}, ValueError, "attn_mask"),
    ("attn_mask integer", {"attn_mask": Z(N, M, dtype=torch.int64)}, TypeError, "attn_mask"),
    ("attn_mask dtype", {"attn_mask": Z(N, M).half()}, TypeError, "attn_mask"),
    ("prefix_bias shape", {"prefix_bias": Z(N, P + 1)}, ValueError, "prefix_bias"),
    ("prefix_bias bool", {"prefix_bias": Z(N, P).bool()}, TypeError, "prefix_bias"),
    ("prefix_key_bias shape", {"prefix_key_bias": Z(P + 1)}, ValueError, "prefix_key_bias"),
    ("prefix_key_bias with query heads", {"prefix_key_bias": Z(HQ, P)}, ValueError, "prefix_key_bias"),
    ("prefix_key_bias rank", {"prefix_key_bias": Z(B, HQ, N, P)}, ValueError, "prefix_key_bias"),
    ("prefix_key_bias dtype", {"prefix_key_bias": Z(P).double()}, TypeError, "prefix_key_bias"),
    ("prefix_key_bias device", {"prefix_key_bias": Z(P, device="meta")}, ValueError, "prefix_key_bias"),
    ("prefix_key_bias without prefix", {**NONE, "prefix_key_bias": Z(P)}, ValueError, "prefix_key_bias"),
    ("prefix_key_bias of rows", {**SPANS, "prefix_key_bias": Z(B, HKV, P)}, ValueError, "prefix_key_bias"),
    ("prefix_spans shape", {"prefix_spans": Z(B, 3).long()}, ValueError, "prefix_spans"),
    ("prefix_spans rank", {"prefix_spans": Z(2).long()}, ValueError, "prefix_spans"),
    ("prefix_spans batch", {"prefix_spans": Z(B + 1, 2).long()}, ValueError, "prefix_spans"),
    ("prefix_spans float", {"prefix_spans": Z(B, 2)}, TypeError, "prefix_spans"),
    ("prefix_spans list", {"prefix_spans": [(0, 1)] * B}, TypeError, "prefix_spans"),
    ("prefix_spans device", {"prefix_spans": Z(B, 2, device="meta").long()}, ValueError, "prefix_spans"),
    ("prefix_spans without prefix", {**NONE, **SPANS}, ValueError, "prefix_spans"),
    ("prefix_spans of rows", {**SPANS, "prefix_key": Z(B, HKV, P, D)}, ValueError, "prefix_key"),
    ("spans, gate and bias", {**SPANS, "prefix_gate": Z(3), "prefix_bias": Z(4)}, ValueError, "prefix_bias"),
    ("frozen_prefix negative", {"frozen_prefix": -1}, ValueError, "frozen_prefix"),
    ("frozen_prefix too many", {"frozen_prefix": P + 1}, ValueError, "frozen_prefix"),
    ("frozen_prefix float", {"frozen_prefix": 1.0}, TypeError, "frozen_prefix"),
    ("frozen_prefix bool", {"frozen_prefix": True}, TypeError, "frozen_prefix"),
    ("frozen_prefix without prefix", {**NONE, "frozen_prefix": 1}, ValueError, "frozen_prefix"),
    ("prefix_gate without prefix", {**NONE, "prefix_gate": Z(P)}, ValueError, "prefix_gate"),
    ("prefix_bias without prefix", {**NONE, "prefix_bias": Z(P)}, ValueError, "prefix_bias"),
    ("output_gate without prefix", {**NONE, "output_gate": Z(HQ)}, ValueError, "output_gate"),
    ("is_causal", {"is_causal": 1}, TypeError, "is_causal"),
    ("window_size zero", {"window_size": 0}, ValueError, "window_size"),
    ("window_size beyond 64 bits", {"window_size": 2**63}, ValueError, "window_size"),
    ("window_size float", {"window_size": 2.0}, TypeError, "window_size"),
    ("segment_ids tensor", {"segment_ids": Z(B, N).long()}, TypeError, "segment_ids"),
    ("segment_ids single", {"segment_ids": (Z(B, N).long(),)}, ValueError, "segment_ids"),
    ("segment_ids float", {"segment_ids": (Z(B, N), Z(B, M).long())}, TypeError, "segment_ids"),
    ("segment_ids shape", {"segment_ids": (Z(B, N).long(), Z(B, N).long())}, ValueError, "segment_ids"),
    ("softcap zero", {"softcap": 0.0}, ValueError, "softcap"),
    ("softcap that float32 cannot represent", {"softcap": 1e-50}, ValueError, "softcap"),
    ("softcap text", {"softcap": "5"}, TypeError, "softcap"),
    ("sinks shape", {"sinks": Z(HKV)}, ValueError, "sinks"),
    ("sinks dtype", {"sinks": Z(HQ).double()}, TypeError, "sinks"),
    ("scale nan", {"scale": float("nan")}, ValueError, "scale"),
    ("scale that float32 cannot represent", {"scale": 1e39}, ValueError, "scale"),
    ("scale text", {"scale": "1"}, TypeError, "scale"),
    ("dropout_p negative", {"dropout_p": -0.1}, ValueError, "dropout_p"),
    ("dropout_p above one", {"dropout_p": 1.1}, ValueError, "dropout_p"),
    ("dropout_p text", {"dropout_p": "0.1"}, TypeError, "dropout_p"),
]


@pytest.mark.parametrize("function", [fastprefix.prefix_attention, fastprefix.reference.prefix_attention])
@pytest.mark.parametrize(("bad", "error", "name"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(function, bad, error, name):
    good = {
        "query": Z(B, HQ, N, D),
        "key": Z(B, HKV, M, D),
        "value": Z(B, HKV, M, DV),
        "prefix_key": Z(HKV, P, D),
        "prefix_value": Z(HKV, P, DV),
    }
    with pytest.raises(error, match=rf"^`{name}\b"):
        function(**(good | bad))


def test_an_integer_mask_is_told_what_to_become():
    tensors = (Z(B, HQ, N, D), Z(B, HKV, M, D), Z(B, HKV, M, DV), Z(HKV, P, D), Z(HKV, P, DV))
    with pytest.raises(TypeError, match=r"attn_mask\.bool\(\).*torch\.int64") as caught:
        fastprefix.prefix_attention(*tensors, attn_mask=Z(B, M, dtype=torch.int64))
    assert "float32" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Z(B, HQ, N, D).numpy(), r"got numpy\.ndarray of shape \(2, 4, 3, 8\)$"),
        (torch.nn.Embedding(50, D), r"got a module, Embedding: pass its \.weight$"),
        (torch.nn.ReLU(), r"got a module, ReLU$"),
        ([[0.0] * 1000] * 1000, r"got list .{1,300}$"),
    ],
)
def test_what_is_no_tensor_is_named_and_not_printed(value, words):
    tensors = (Z(B, HKV, M, D), Z(B, HKV, M, DV), Z(HKV, P, D), Z(HKV, P, DV))
    with pytest.raises(TypeError, match=words):
        fastprefix.prefix_attention(value, *tensors)


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ({"is_causal": True}, {"is_causal": 1}, "is_causal"),
        ({"window_size": 1}, {"window_size": True}, "window_size"),
        ({"window_size": 1}, {"window_size": 1.0}, "window_size"),
        ({"scale": 1.0}, {"scale": True}, "scale"),
        ({"dropout_p": 0.0}, {"dropout_p": False}, "dropout_p"),
        ({"segment_ids": (Z(2, B, N).long()[0], Z(B, M).long())}, {"segment_ids": Z(2, B, N).long()}, "segment_ids"),
    ],
)
def test_what_equals_a_right_argument_is_not_taken_for_it(right, wrong, name):
    """Calls equal to a checked call are not checked again."""
    tensors = (Z(B, HQ, N, D), Z(B, HKV, M, D), Z(B, HKV, M, DV), Z(HKV, P, D), Z(HKV, P, DV))
    for _ in range(2):
        fastprefix.prefix_attention(*tensors, **right)
        with pytest.raises(TypeError, match=rf"^`{name}\b"):
            fastprefix.prefix_attention(*tensors, **wrong)


def test_autocast_is_part_of_what_was_checked():
    query, rest = Z(B, HQ, N, D), (Z(B, HKV, M, D), Z(B, HKV, M, DV), Z(HKV, P, D), Z(HKV, P, DV))
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fastprefix.prefix_attention(query.bfloat16(), *rest)
        with pytest.raises(TypeError, match=r"^`key`"):
            fastprefix.prefix_attention(query.bfloat16(), *rest)
