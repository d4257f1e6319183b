"""Test that assert_parity accepts correct results and finds errors."""

import pytest
import torch
from torch import nn

import fastprefix
from fastprefix.parity import AttentionCase, EmbeddingCase
from fastprefix.testing import Row, assert_parity, measure_parity


def plain(x, y):
    return (x * y).sum(-1).tanh()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_function_equals_itself(dtype):
    report = assert_parity(plain, inputs(dtype), reference=plain, draws=2)
    assert [row.name for row in report.rows] == ["output", "grad x", "grad y"]
    assert report.worst.ratio <= 0.5


def test_wrong_output_is_caught():
    with pytest.raises(AssertionError, match=r"output .*MISS"):
        assert_parity(lambda x, y: plain(x, y) + 1e-4, inputs(), reference=plain)


def test_wrong_gradient_is_caught():
    with pytest.raises(AssertionError, match=r"grad y .*MISS"):
        assert_parity(lambda x, y: plain(x, WrongGradient.apply(y)), inputs(), reference=plain)


def test_missing_gradient_is_caught():
    with pytest.raises(AssertionError, match=r"grad y .*MISS"):
        assert_parity(lambda x, y: plain(x, y.detach()), inputs(), reference=plain)


@pytest.mark.parametrize(("error", "rms_error"), [(0.0, float("nan")), (float("nan"), 0.0)])
def test_a_row_whose_error_is_nan_is_a_miss(error, rms_error):
    assert not Row("output", error, 0.0, 1.0, rms_error, 0.0, 1.0).ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_caught(bad):
    def poisoned(x, y):
        return plain(x, y).index_fill(0, torch.tensor([1]), bad)

    with pytest.raises(AssertionError, match="NaN or infinite"):
        assert_parity(poisoned, inputs(), reference=plain, grad=False)


def test_lost_infinity_is_caught():
    with pytest.raises(AssertionError, match="are missing"):
        assert_parity(lambda x: x, (torch.zeros(3),), reference=lambda x: x - torch.inf, grad=False)


def test_wrong_shape_and_dtype_are_caught():
    for wrong in (lambda x, y: plain(x, y)[:, None], lambda x, y: plain(x, y).half()):
        with pytest.raises(AssertionError, match="expected"):
            assert_parity(wrong, inputs(), reference=plain, grad=False)


def test_modules_compare_their_parameters():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    report = assert_parity(module, (torch.randn(3, 4),), reference=module)
    assert {row.name for row in report.rows} == {
        "output", "grad input", "grad parameter 0.weight", "grad parameter 0.bias",
    }  # fmt: skip
    assert all(parameter.grad is None for parameter in module.parameters())
    with pytest.raises(ValueError, match="reference"):
        assert_parity(module, (torch.randn(3, 4),), reference=nn.Linear(4, 5))


def test_operations_find_their_reference():
    case = AttentionCase().build(torch.float32)
    assert_parity(fastprefix.prefix_attention, case.tensors, options={"backend": "eager", "dropout_p": 0.3})
    embedding = EmbeddingCase(offset="ffn").build(torch.bfloat16)
    names = [row.name for row in assert_parity(fastprefix.prompt_embedding, embedding.tensors, grad=["ffn[0]"]).rows]
    assert names == ["output", "grad ffn[0]"]


def test_a_function_without_reference_and_float64_are_refused():
    with pytest.raises(ValueError, match="reference"):
        measure_parity(plain, inputs())
    with pytest.raises(ValueError, match="inputs"):
        measure_parity(plain, inputs(torch.float64), reference=plain)


def test_the_users_random_state_is_left_alone():
    x = inputs()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert_parity(plain, x, reference=plain)
    assert torch.equal(torch.rand(2), expected)
