"""Test invalid inputs of prompt_embedding: the type of the error, and the argument's name in its message."""

from typing import Any

import pytest
import torch

import fastprefix

Z = torch.zeros
B, N, S, V, D, R = 2, 5, 3, 11, 8, 4
IDS = Z(B, N, dtype=torch.int64)
FFN = (Z(D, R), Z(R), Z(R, D), Z(D))
PAIR = (Z(N, R), Z(R, D))
POSITIONS = Z(N, D)
SPANS, INDEX = Z(B, 2, dtype=torch.int64), Z(B, dtype=torch.int64)
K = 3
BANK = tuple(Z(K, *x.shape) for x in FFN)
PAIRS = tuple(Z(K, *x.shape) for x in PAIR)

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
    ("both offsets", {"ffn": FFN, "low_rank": PAIR}, ValueError, "ffn` and `low_rank`"),
    (
        "offsets three",
        {"ffn": FFN, "low_rank": PAIR, "position_offset": POSITIONS},
        ValueError,
        "ffn` and `low_rank` and",
    ),
    ("offsets two", {"low_rank": PAIR, "position_offset": POSITIONS}, ValueError, "low_rank` and `position_offset`"),
    ("positions list", {"position_offset": [0.0]}, TypeError, "position_offset"),
    ("positions integer", {"position_offset": POSITIONS.long()}, TypeError, "position_offset"),
    ("positions rank", {"position_offset": Z(1, N, D)}, ValueError, "position_offset"),
    ("positions width", {"position_offset": Z(N, D + 1)}, ValueError, "position_offset"),
    ("positions too short", {"position_offset": Z(N - 1, D)}, ValueError, "position_offset"),
    ("positions dtype", {"position_offset": POSITIONS.half()}, TypeError, "position_offset"),
    ("positions device", {"position_offset": POSITIONS.to("meta")}, ValueError, "position_offset"),
    ("spans list", {"prompt_spans": [(0, 1), (0, 1)]}, TypeError, "prompt_spans"),
    ("spans float", {"prompt_spans": SPANS.float()}, TypeError, "prompt_spans"),
    ("spans rank", {"prompt_spans": SPANS[:, 0]}, ValueError, "prompt_spans"),
    ("spans rows", {"prompt_spans": Z(B + 1, 2, dtype=torch.int64)}, ValueError, "prompt_spans"),
    ("spans device", {"prompt_spans": SPANS.to("meta")}, ValueError, "prompt_spans"),
    ("spans without prompt", {"prompt": None, "prompt_spans": SPANS}, ValueError, "prompt_spans"),
    ("spans beyond", {"prompt_spans": SPANS + S}, ValueError, "prompt_spans"),
    ("spans negative", {"prompt_spans": SPANS - 1}, ValueError, "prompt_spans"),
    ("spans too long", {"prompt_spans": SPANS + 1, "prompt_length": 0}, ValueError, "prompt_spans"),
    ("store rank", {"prompt": Z(1, S, D), "prompt_spans": SPANS}, ValueError, "prompt"),
    ("length without spans", {"prompt_length": 3}, ValueError, "prompt_length"),
    ("length text", {"prompt_spans": SPANS, "prompt_length": "3"}, TypeError, "prompt_length"),
    ("length flag", {"prompt_spans": SPANS, "prompt_length": True}, TypeError, "prompt_length"),
    ("length negative", {"prompt_spans": SPANS, "prompt_length": -1}, ValueError, "prompt_length"),
    ("index without offset", {"index": INDEX}, ValueError, "index"),
    ("index list", {"ffn": BANK, "index": [0, 0]}, TypeError, "index"),
    ("index float", {"ffn": BANK, "index": INDEX.float()}, TypeError, "index"),
    ("index rank", {"ffn": BANK, "index": INDEX[:, None]}, ValueError, "index"),
    ("index rows", {"ffn": BANK, "index": INDEX[:1]}, ValueError, "index"),
    ("index device", {"ffn": BANK, "index": INDEX.to("meta")}, ValueError, "index"),
    ("index beyond", {"low_rank": PAIRS, "index": INDEX + K}, ValueError, "index"),
    ("index below -1", {"position_offset": Z(K, N, D), "index": INDEX - 2}, ValueError, "index"),
    ("bank without index", {"ffn": BANK}, ValueError, r"ffn\[0\] \(w1\)"),
    ("index without bank", {"ffn": FFN, "index": INDEX}, ValueError, r"ffn\[0\] \(w1\)"),
    ("bank of b1", {"ffn": (BANK[0], BANK[1][1:], *BANK[2:]), "index": INDEX}, ValueError, r"ffn\[1\] \(b1\)"),
    ("bank of w2", {"ffn": (*BANK[:2], FFN[2], BANK[3]), "index": INDEX}, ValueError, r"ffn\[2\] \(w2\)"),
    ("bank of b2", {"ffn": (*BANK[:3], Z(K + 1, D)), "index": INDEX}, ValueError, r"ffn\[3\] \(b2\)"),
    ("bank of a", {"low_rank": PAIR, "index": INDEX}, ValueError, r"low_rank\[0\] \(a\)"),
    ("bank of b", {"low_rank": (PAIRS[0], PAIRS[1][1:]), "index": INDEX}, ValueError, r"low_rank\[1\] \(b\)"),
    ("bank too short", {"low_rank": (PAIRS[0][:, 1:], PAIRS[1]), "index": INDEX}, ValueError, r"low_rank\[0\] \(a\)"),
    ("bank of positions", {"position_offset": POSITIONS, "index": INDEX}, ValueError, "position_offset"),
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
    with pytest.raises(error, match=rf"^`{name}"):
        function(**({"input_ids": IDS, "weight": Z(V, D), "prompt": Z(S, D)} | bad))
