"""Magnitude and direction, the best low-rank approximation, ΔM and ΔD."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import array, assert_close, normal
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_utils.decompose import (
    direction_change,
    low_rank_approximation,
    magnitude_and_direction,
    magnitude_change,
    row_norms,
)

sides = {"rows": st.integers(1, 12), "columns": st.integers(1, 12)}
shapes = {**sides, "seed": st.integers(0, 10**6)}


# --- magnitude_and_direction ---------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[1.0, 2.0], [1, 2]])
def test_the_articles_vector_has_magnitude_2_24_and_direction_0_447_0_894(numbers):
    magnitude, direction = magnitude_and_direction(torch.tensor(numbers))
    assert magnitude.shape == ()
    assert f"{magnitude.item():.2f}" == "2.24"
    assert [f"{number:.3f}" for number in direction.tolist()] == ["0.447", "0.894"]
    assert_close(magnitude * direction, torch.tensor([1.0, 2.0]), rtol=1e-6)


@given(**shapes)
def test_every_row_is_its_magnitude_times_a_unit_vector(rows, columns, seed):
    original = normal(rows, columns, seed=seed)
    magnitude, direction = magnitude_and_direction(original)
    assert magnitude.shape == (rows,)
    assert direction.shape == (rows, columns)
    assert_close(magnitude, np.sqrt((array(original) ** 2).sum(axis=1)))
    assert_close((array(direction) ** 2).sum(axis=1), np.ones(rows))
    assert_close(magnitude.unsqueeze(1) * direction, original)


def test_a_matrix_is_split_by_rows_and_not_by_columns():
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]])
    magnitude, direction = magnitude_and_direction(rows)
    assert magnitude.tolist() == [5, 2, 1, 0]
    expected = torch.tensor([[0.6, 0.8], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    assert_close(direction, expected, rtol=1e-6)
    assert direction[3].tolist() == [0, 0]
    # A vector is split like the row of a matrix.
    for row, length, unit in zip(rows, magnitude, direction, strict=True):
        alone = magnitude_and_direction(row)
        assert torch.equal(alone.magnitude, length)
        assert torch.equal(alone.direction, unit)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_the_split_keeps_the_dtype(dtype):
    magnitude, direction = magnitude_and_direction(normal(4, 6, dtype=dtype))
    assert magnitude.dtype == direction.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_rows_are_as_exact_as_float32(dtype):
    weight = normal(8, 4096, dtype=dtype)
    exact = np.sqrt((array(weight) ** 2).sum(axis=1))
    norms = row_norms(weight)
    assert norms.dtype == torch.float64
    relative = np.abs(array(norms) - exact) / exact
    assert relative.max() < 1e-6
    # Adding up in the dtype itself is off by more than a thousand times as much.
    total = torch.zeros(8, dtype=dtype)
    for column in weight.T:
        total += column * column
    careless = np.abs(array(total.sqrt()) - exact) / exact
    assert careless.max() > 1000 * relative.max()


def test_norms_of_float64_rows_are_float64():
    weight = normal(5, 300)
    assert row_norms(weight).dtype == torch.float64
    assert_close(row_norms(weight), np.linalg.norm(array(weight), axis=1), rtol=1e-14)


def test_on_apples_gpus_which_have_no_float64_norms_are_float32():
    # Shapes and dtypes alone, as torch works them out where there is no such GPU.
    with FakeTensorMode():
        weight = torch.empty(3, 4, device="mps")
        assert row_norms(weight).dtype == torch.float32
        assert magnitude_and_direction(weight).direction.dtype == torch.float32


# --- low_rank_approximation ----------------------------------------------------------------------


@given(**shapes)
def test_the_approximation_is_the_nearest_that_there_is(rows, columns, seed):
    original = normal(rows, columns, seed=seed)
    singular_values = np.linalg.svd(array(original), compute_uv=False)
    for rank in range(1, min(rows, columns) + 1):
        A, B = low_rank_approximation(original, rank)
        assert A.shape == (rows, rank)
        assert B.shape == (rank, columns)
        # Eckart and Young: what is left are the singular values that were cut off.
        left = np.linalg.svd(array(original - A @ B), compute_uv=False)
        cut = singular_values[rank:]
        unit = singular_values[0]
        assert np.allclose(left[: len(cut)], cut, rtol=0, atol=1e-12 * unit)
        assert np.allclose(left[len(cut) :], 0, rtol=0, atol=1e-12 * unit)


def test_the_singular_values_are_shared_evenly_between_the_factors():
    A, B = low_rank_approximation(normal(6, 8), 3)
    values = np.linalg.svd(array(normal(6, 8)), compute_uv=False)[:3]
    assert_close(A.T @ A, torch.from_numpy(np.diag(values)), rtol=1e-11)
    assert_close(B @ B.T, torch.from_numpy(np.diag(values)), rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_keep_the_dtype_and_are_computed_in_float32(dtype):
    original = normal(6, 8, dtype=dtype)
    A, B = low_rank_approximation(original, 6)
    assert A.dtype == B.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    product = A.float() @ B.float()
    torch.testing.assert_close(
        product, original.float(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("shape", [(4, 2000), (2000, 4)])
def test_a_thin_matrix_takes_no_square_of_its_longer_side(shape):
    original = normal(*shape)
    with torch.profiler.profile(profile_memory=True) as profile:
        low_rank_approximation(original, 2)
    used = max(event.cpu_memory_usage for event in profile.key_averages())
    assert 0 < used < 20 * original.nbytes


def test_whole_numbers_are_approximated_as_what_they_stand_for():
    A, B = low_rank_approximation(torch.tensor([[1, 2], [3, 6]]), 1)
    assert_close(A @ B, torch.tensor([[1.0, 2.0], [3.0, 6.0]]), rtol=1e-5)


# --- ΔM and ΔD -------------------------------------------------------------------------------------


def test_the_changes_are_those_of_equations_3_and_4():
    before, after = normal(5, 7, seed=1), normal(5, 7, seed=2)
    w0, w = array(before), array(after)
    n0, n = np.linalg.norm(w0, axis=1), np.linalg.norm(w, axis=1)
    assert_close(magnitude_change(after, before), np.abs(n - n0).mean())
    assert_close(
        direction_change(after, before), (1 - (w * w0).sum(axis=1) / (n * n0)).mean()
    )


def test_scaling_changes_the_magnitude_only_and_turning_the_direction_only():
    weight = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    assert_close(magnitude_change(3 * weight, weight), (10 + 2) / 2)
    assert abs(direction_change(3 * weight, weight)) < 1e-15
    assert magnitude_change(weight, weight) == 0
    turned = weight @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert magnitude_change(turned, weight) < 1e-15
    assert_close(direction_change(turned, weight), 1.0)
    assert_close(direction_change(-weight, weight), 2.0)


def test_rows_that_grow_and_shrink_do_not_cancel_and_a_zero_row_is_a_right_angle():
    weight = torch.eye(2)
    assert magnitude_change(torch.diag(torch.tensor([1.5, 0.5])), weight) == 0.5
    lost = torch.diag(torch.tensor([1.0, 0.0]))
    assert direction_change(lost, weight) == 0.5
    assert direction_change(weight, lost) == 0.5
    assert magnitude_change(lost, weight) == 0.5


@given(**shapes)
def test_both_changes_lie_in_their_ranges(rows, columns, seed):
    first, second = (
        normal(rows, columns, seed=seed),
        normal(rows, columns, seed=seed + 1),
    )
    assert magnitude_change(first, second) >= 0
    assert -1e-12 <= direction_change(first, second) <= 2 + 1e-12


# --- What is refused ---------------------------------------------------------------------------------


SAME = r"^weight and reference must have the same shape; got \(2, 3\) and "
ones = torch.ones


@pytest.mark.parametrize(
    ("function", "given", "error", "message"),
    [
        (magnitude_and_direction, [[1.0, 2.0]], TypeError, "tensor must .*; got list"),
        (magnitude_and_direction, [None], TypeError, "tensor must .*; got NoneType"),
        (
            magnitude_and_direction,
            [ones(2, 2, 2)],
            ValueError,
            r"tensor must be .*; got shape \(2, 2, 2\)",
        ),
        (magnitude_and_direction, [ones(())], ValueError, r"tensor .*got shape \(\)"),
        (low_rank_approximation, [[[1.0]], 1], TypeError, "matrix must .*; got list"),
        (low_rank_approximation, [ones(3), 1], ValueError, r"matrix must .*\(3,\)"),
        (low_rank_approximation, [ones(3, 5), 0], ValueError, "rank .* or more; got 0"),
        (
            low_rank_approximation,
            [ones(3, 5), 4],
            ValueError,
            r"rank must be at most 3, the shorter side of \(3, 5\); got 4",
        ),
        (low_rank_approximation, [ones(3, 5), 1.0], TypeError, r"rank .*\(float\)"),
        (low_rank_approximation, [ones(3, 5), True], TypeError, r"rank .*\(bool\)"),
        *(
            (change, *case)
            for change in (magnitude_change, direction_change)
            for case in [
                ([ones(2, 3), ones(3, 2)], ValueError, SAME + r"\(3, 2\)$"),
                ([ones(2, 3), ones(1, 3)], ValueError, SAME + r"\(1, 3\)$"),
                ([None, ones(2, 3)], TypeError, "weight must .*; got NoneType"),
                ([ones(2, 3), ones(3)], ValueError, r"reference must .*shape \(3,\)"),
            ]
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_what_came_and_what_is_allowed(
    function, given, error, message
):
    with pytest.raises(error, match=message):
        function(*given)
