"""The comparisons that other tests rely on: they must see every difference, and say where it is."""

import pytest
import torch

from tests.support.tensors import assert_close, assert_equal, integer_tensor


def test_equal_tensors_pass() -> None:
    assert_equal(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    assert_equal(torch.zeros(0), torch.zeros(0))
    assert_equal(torch.tensor(3.0), torch.tensor(3.0))


def test_the_first_difference_is_shown() -> None:
    expected = integer_tensor(3, 4, seed=1)
    actual = expected.clone()
    actual[1, 2] += 1
    with pytest.raises(AssertionError, match=r"masters: 1 of 12 elements differ.*\(1, 2\)"):
        assert_equal(actual, expected, "masters")


@pytest.mark.parametrize(
    "actual", [torch.tensor([-0.0]), torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1)]
)
def test_sign_of_zero_dtype_and_shape_count(actual: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_equal(actual, torch.tensor([0.0]))


def test_close_keeps_torch_message_and_appends_ours() -> None:
    with pytest.raises(AssertionError, match=r"Greatest absolute difference[\s\S]*one rounding"):
        assert_close(torch.ones(1), torch.zeros(1), rtol=0, atol=0.5, message="one rounding")
