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


def test_a_finite_value_where_plain_pytorch_overflows_is_compared():
    x = torch.full((4,), 300.0, dtype=torch.float16)
    with pytest.raises(AssertionError, match="MISS"):
        assert_parity(lambda x: x * 0 - 5, (x,), reference=lambda x: x * x / 10, grad=False)


def test_imaginary_parts_are_compared():
    x, y = inputs()
    with pytest.raises(AssertionError, match="MISS"):
        assert_parity(lambda x, y: torch.complex(x, 5 * y), (x, y), reference=torch.complex, grad=False)
    assert_parity(lambda x, y: torch.complex(x, y), (x, y), reference=torch.complex)


@pytest.mark.parametrize("result", [None, 1.0, nn.Linear(1, 1), {"a": [nn.Linear(1, 1), torch.zeros(2)]}], ids=repr)
def test_results_without_tensors_are_refused(result):
    with pytest.raises(TypeError, match="must return a tensor"):
        assert_parity(lambda x, y: result, inputs(), reference=lambda x, y: result, grad=False)


@pytest.mark.parametrize("grad", [["X"], "output", ["x", "ids"]])
def test_gradients_of_unknown_inputs_are_refused(grad):
    named = {"x": torch.randn(3), "ids": torch.arange(3)}
    with pytest.raises(ValueError, match="`grad` must have names of floating-point inputs"):
        assert_parity(lambda x, ids: x, named, reference=lambda x, ids: x, grad=grad)


@pytest.mark.parametrize(("grad", "rows"), [("p", 2), (["p"], 2), (["p[1]"], 1), (["x"], 1), (True, 3)])
def test_gradients_of_named_inputs(grad, rows):
    x, y = inputs()
    report = assert_parity(lambda p, x: p[0] * p[1] * x, ((x, y), y), reference=lambda p, x: p[0] * p[1] * x, grad=grad)
    assert len(report.rows) == 1 + rows


@pytest.mark.parametrize("nested", [False, True])
def test_inputs_are_copied(nested):
    """A function that changes its inputs is caught, and the caller's tensors stay as they are."""
    x, y = inputs()
    before = x.clone()

    def change(x, y):
        return (x["x"] if nested else x).mul_(2) + y

    with pytest.raises(AssertionError, match="MISS"):
        assert_parity(change, ({"x": x} if nested else x, y), reference=lambda x, y: (x["x"] if nested else x) + y,
                      grad=False)  # fmt: skip
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_variants_keep_the_layout():
    x, strides = torch.randn(2, 3, 48)[..., :8], []
    assert_parity(lambda x: strides.append(x.stride()) or x.sin(), (x,), reference=torch.sin, draws=2)
    assert set(strides) == {x.stride()}


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
