"""Test visual methods without a model: options, initialization, parameter counts, rows."""

import dataclasses

import pytest
import torch

import fastprefix
from fastprefix.methods import SHIP, VisionShape, VisualPrompt

from .test_methods import count

SHAPE = VisionShape(width=96, layers=3, patch=3 * 16 * 16)


@pytest.mark.parametrize(("depth", "layers"), [("shallow", 1), ("deep", 3)])
def test_vpt_initialization_and_parameters(depth: str, layers: int) -> None:
    torch.manual_seed(0)
    method = VisualPrompt(fastprefix.VisualPromptConfig(50, depth=depth), SHAPE)
    method.reset_parameters()
    bound = (6 / (768 + 96)) ** 0.5
    assert count(method) == layers * 50 * 96
    assert 0.99 * bound < method.prompts.abs().max() <= bound
    assert abs(method.prompts.mean()) < 5 * bound / (3 * count(method)) ** 0.5


def test_rows_of_each_depth() -> None:
    shallow, deep = (VisualPrompt(fastprefix.VisualPromptConfig(5, depth=d), SHAPE) for d in ("shallow", "deep"))
    shallow.reset_parameters()
    deep.reset_parameters()
    former = torch.randn(2, 5, 96)
    assert torch.equal(shallow.make_rows(0, None, 2), shallow.prompts[0].expand(2, -1, -1))
    assert shallow.make_rows(1, former, 2) is former
    assert torch.equal(deep.make_rows(1, former, 2), deep.prompts[1].expand(2, -1, -1))
    assert shallow.sees_tokens(training=False) is not None
    assert deep.sees_tokens(training=True) is None


def test_dropout_draws_for_every_image_while_training() -> None:
    method = VisualPrompt(fastprefix.VisualPromptConfig(5, depth="deep", dropout=0.5), SHAPE)
    method.reset_parameters()
    rows = method.train().make_rows(0, None, 2)
    assert not torch.equal(rows[0], rows[1])
    kept = rows != 0
    assert torch.equal(rows[kept], (2 * method.prompts[0]).expand(2, -1, -1)[kept])
    assert method.sees_tokens(training=True) is not None
    assert torch.equal(method.eval().make_rows(0, None, 2)[0], method.prompts[0])
    assert method.sees_tokens(training=False) is None


@pytest.mark.parametrize(("layers", "attributed"), [(None, 2), ([0, 2], 2), ([0], 1)])
def test_ship_initialization_and_parameters(layers: list[int] | None, attributed: int) -> None:
    torch.manual_seed(0)
    bank = torch.randn(200, 96)
    method = SHIP(fastprefix.SHIPConfig(6, layers=layers, num_shared=10, num_attribute=12, bank=bank), SHAPE)
    method.reset_parameters()
    entered = 3 if layers is None else len(layers)
    trained = [p for p in method.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == entered * 6 * 96 + attributed * 12 * 96 + 10 * 96
    bound = (6 / (768 + 96)) ** 0.5
    for parameter in trained:
        assert 0.95 * bound < parameter.abs().max() <= bound
    assert torch.equal(method.bank, bank)
    options = method.config.to_dict()
    assert (options["bank"], options["prototypes"]) == (200, None)


def test_copies_of_ships_options_keep_the_bank() -> None:
    bank = torch.randn(7, 96)
    config = fastprefix.SHIPConfig(2, bank=bank)
    assert torch.equal(dataclasses.replace(config, strength=0.3).prototypes, bank)
    other = torch.randn(5, 96)
    assert torch.equal(dataclasses.replace(config, bank=other).prototypes, other)
    for number in (None, 5):
        copy = dataclasses.replace(config, bank=number)
        assert (copy.bank, copy.prototypes) == (number, None)


def test_ships_rows() -> None:
    method = SHIP(fastprefix.SHIPConfig(2, layers=[0, 1], num_shared=3, num_attribute=4), SHAPE)
    method.reset_parameters()
    first = method.make_rows(0, None, 1)
    assert torch.equal(first, torch.cat([method.prompts[0], method.attributes[0], method.shared])[None])
    entered = method.make_rows(1, torch.randn(1, 9, 96), 1)
    assert torch.equal(entered, torch.cat([method.prompts[1], method.attributes[1], method.shared])[None])
    former = torch.randn(1, 9, 96)
    assert torch.equal(method.make_rows(2, former, 1), torch.cat([former[:, :6], method.shared[None]], dim=1))
    assert [method.strength(layer) for layer in range(3)] == [0.1, 0.1, None]
    assert method.make_image_rows(1, None) is None


def test_ships_attribute_rows_are_their_formula() -> None:
    torch.manual_seed(0)
    method = SHIP(fastprefix.SHIPConfig(2, layers=[0, 2], num_attribute=4, bank=torch.randn(7, 96)), SHAPE)
    method.reset_parameters()
    given = torch.randn(2, 4, 96)
    rows = method.make_image_rows(2, given)
    x, a = given[1, 3], method.attributes[1, 3]
    weights = torch.stack([torch.cosine_similarity(x, prototype, dim=0) for prototype in method.bank]).softmax(0)
    torch.testing.assert_close(rows[1, 3], 0.1 * weights @ method.bank + 0.9 * a)
    assert method.make_rows(2, torch.randn(1, 16, 96), 1).shape == (1, 2 + 10, 96)
    assert method.make_rows(0, None, 1).shape == (1, 2 + 4 + 10, 96)  # no layer comes before the first
    assert method.make_image_rows(0, None) is None
    rows, tokens = torch.randn(2, 5, 96), torch.randn(2, 6, 96)
    pairs = [(rows[b, i], tokens[b]) for b in range(2) for i in range(5)]
    least = [min(1 - torch.cosine_similarity(p, v, dim=0) for v in image) for p, image in pairs]
    torch.testing.assert_close(method.compute_matching_loss(rows, tokens), 0.5 * torch.stack(least).mean())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: fastprefix.SHIPConfig(5, strength=1.0), "strength"),
        (lambda: fastprefix.SHIPConfig(5, layers=[1, 2]), "layers"),
        (lambda: fastprefix.SHIPConfig(5, layers=[0, 2, 2]), "layers"),
        (lambda: fastprefix.SHIPConfig(5, layers=[]), "layers"),
        (lambda: fastprefix.SHIPConfig(5, num_shared=-1), "num_shared"),
        (lambda: fastprefix.SHIPConfig(5, num_attribute=-1), "num_attribute"),
        (lambda: fastprefix.SHIPConfig(5, bank=torch.randn(3)), "bank"),
        (lambda: fastprefix.SHIPConfig(5, bank=0), "bank"),
        (lambda: SHIP(fastprefix.SHIPConfig(5, layers=[0, 3]), SHAPE), "layers"),
        (lambda: SHIP(fastprefix.SHIPConfig(5, bank=torch.randn(3, 32)), SHAPE), "bank"),
        (lambda: fastprefix.VisualPromptConfig(5, depth="middle"), "depth"),
        (lambda: fastprefix.VisualPromptConfig(5, dropout=-0.1), "dropout"),
        (lambda: fastprefix.VisualPromptConfig(0), "num_virtual_tokens"),
    ],
)
def test_bad_options_are_named(make: object, named: str) -> None:
    with pytest.raises(ValueError, match=rf"`{named}`"):
        make()
