"""Test Philox4x32-10 against the known answers of Random123, and the dropout factors that it determines."""

import pytest
import torch

from fastprefix.ops import random

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str):
    k0, k1 = words(key)
    seed = (k1 << 32) | k0
    signed = seed - 2**64 if seed >= 2**63 else seed
    got = random.philox(torch.tensor([signed]), *(torch.tensor([word]) for word in words(counter)))
    assert [int(word) for word in got] == words(expected)


@pytest.mark.parametrize("tokens", [False, True])
def test_four_words_decide_for_two_rows_and_two_columns(tokens: bool):
    seed, p = torch.tensor([1234567]), 0.4
    whole = random.draw_pair_factor(seed, p, torch.Size((2, 3, 21, 43)), tokens)
    for plane, row, column in ((0, 0, 0), (1, 3, 8), (2, 8, 5), (3, 13, 29), (5, 20, 42), (5, 7, 15)):
        counter = (column & ~8, row & ~8, plane, int(tokens))
        words = random.philox(seed, *(torch.tensor([word]) for word in counter))
        word = words[2 * (row // 8 % 2) + column // 8 % 2]
        assert (whole.flatten(0, 1)[plane, row, column] != 0) == (word >= random.find_threshold(p))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep_factor_has_the_right_mean(p: float):
    seed, shape = torch.tensor([42]), torch.Size((300, 1000))
    for factor in (random.draw_factor(seed, p, shape), random.draw_pair_factor(seed, p, shape, tokens=True)):
        assert (factor == 0).double().mean().item() == pytest.approx(p, abs=0.005)
        assert factor.mean().item() == pytest.approx(0.0 if p == 1.0 else 1.0, abs=0.03)


def test_prefix_and_tokens_are_dropped_independently():
    seed, shape = torch.tensor([7]), torch.Size((64, 512))
    first, second = (random.draw_pair_factor(seed, 0.5, shape, tokens) == 0 for tokens in (False, True))
    assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.01)
