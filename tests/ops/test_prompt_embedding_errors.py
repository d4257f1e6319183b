"""Bad inputs of prompt_embedding: the type of the error, and the argument's name in its message."""

from typing import Any

import pytest
import torch

import fastprefix

Z = torch.zeros
B, N, S, V, D, R = 2, 5, 3, 11, 8, 4
IDS = Z(B, N, dtype=torch.int64)
FFN = (Z(D, R), Z(R), Z(R, D), Z(D))
PAIR = (Z(N, R), Z(R, D))

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("ids list", {"input_ids": [[1, 2]]}, TypeError, "input_ids"),
    ("ids float", {"input_ids": Z(B, N)}, TypeError, "input_ids"),
    ("ids rank", {"input_ids": IDS[0]}, ValueError, "input_ids"),
    ("ids device", {"input_ids": IDS.to("meta")}, ValueError, "input_ids"),
    ("ids negative", {"input_ids": IDS - 1}, ValueError, "input_ids"),
    ("ids too large", {"input_ids": IDS + V}, ValueError, "input_ids"),
    ("weight rank", {"weight": Z(V)}, ValueError, "weight"),
    ("weight integer", {"weight": Z(V, D).long()}, TypeError, "weight"),
    ("prompt rank", {"prompt": Z(1, S, D)}, ValueError, "prompt"),
    ("prompt width", {"prompt": Z(S, D + 1)}, ValueError, "prompt"),
    ("prompt dtype", {"prompt": Z(S, D).half()}, TypeError, "prompt"),
    ("prompt device", {"prompt": Z(S, D, device="meta")}, ValueError, "prompt"),
    ("ffn tensor", {"ffn": Z(D, R)}, TypeError, "ffn"),
    ("ffn length", {"ffn": FFN[:3]}, ValueError, "ffn"),
    ("ffn w1", {"ffn": (Z(D + 1, R), *FFN[1:])}, ValueError, r"ffn\[0\] \(w1\)"),
    ("ffn empty", {"ffn": (Z(D, 0), Z(0), Z(0, D), Z(D))}, ValueError, r"ffn\[0\] \(w1\)"),
    ("ffn b1", {"ffn": (FFN[0], Z(R + 1), *FFN[2:])}, ValueError, r"ffn\[1\] \(b1\)"),
    ("ffn w2", {"ffn": (*FFN[:2], Z(D, R), FFN[3])}, ValueError, r"ffn\[2\] \(w2\)"),
    ("ffn b2 dtype", {"ffn": (*FFN[:3], Z(D).double())}, TypeError, r"ffn\[3\] \(b2\)"),
    ("low_rank tensor", {"low_rank": Z(N, R)}, TypeError, "low_rank"),
    ("low_rank length", {"low_rank": PAIR[:1]}, ValueError, "low_rank"),
    ("low_rank too short", {"low_rank": (Z(N - 1, R), PAIR[1])}, ValueError, r"low_rank\[0\] \(a\)"),
    ("low_rank rank", {"low_rank": (PAIR[0], Z(R + 1, D))}, ValueError, r"low_rank\[1\] \(b\)"),
    ("both offsets", {"ffn": FFN, "low_rank": PAIR}, ValueError, "ffn and low_rank"),
    ("scale text", {"offset_scale": "2"}, TypeError, "offset_scale"),
    ("scale infinite", {"offset_scale": float("inf")}, ValueError, "offset_scale"),
    ("dropout_p negative", {"ffn": FFN, "dropout_p": -0.5}, ValueError, "dropout_p"),
    ("dropout_p above one", {"ffn": FFN, "dropout_p": 1.5}, ValueError, "dropout_p"),
    ("dropout_p flag", {"ffn": FFN, "dropout_p": True}, TypeError, "dropout_p"),
    ("dropout_p without ffn", {"dropout_p": 0.5}, ValueError, "dropout_p"),
]


@pytest.mark.parametrize("function", [fastprefix.prompt_embedding, fastprefix.reference.prompt_embedding])
@pytest.mark.parametrize(("bad", "error", "name"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(function, bad, error, name):
    with pytest.raises(error, match=rf"^{name}"):
        function(**({"input_ids": IDS, "weight": Z(V, D), "prompt": Z(S, D)} | bad))
