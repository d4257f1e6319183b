"""Visual methods by themselves: options, initialization, parameter counts, rows."""

import pytest
import torch

import fastprefix
from fastprefix.methods import VisionShape, VisualPrompt

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


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: fastprefix.VisualPromptConfig(5, depth="middle"), "depth"),
        (lambda: fastprefix.VisualPromptConfig(5, dropout=-0.1), "dropout"),
        (lambda: fastprefix.VisualPromptConfig(0), "num_virtual_tokens"),
    ],
)
def test_bad_options_are_named(make: object, named: str) -> None:
    with pytest.raises(ValueError, match=rf"`{named}`"):
        make()
