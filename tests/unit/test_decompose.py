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

shapes = {
    "rows": st.integers(1, 12),
    "columns": st.integers(1, 12),
    "seed": st.integers(0, 10**6),
}


def matrix(rows, columns, seed=0):
    return normal(rows, columns, seed=seed)


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
    original = matrix(rows, columns, seed)
    magnitude, direction = magnitude_and_direction(original)
    assert magnitude.shape == (rows,)
    assert direction.shape == (rows, columns)
    assert_close(magnitude, np.sqrt((array(original) ** 2).sum(axis=1)))
    assert_close((array(direction) ** 2).sum(axis=1), np.ones(rows))
    assert_close(magnitude.unsqueeze(1) * direction, original)


def test_a_matrix_is_split_by_rows_and_not_by_columns():
    magnitude, direction = magnitude_and_direction(
        torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
    )
    assert magnitude.tolist() == [5, 2, 1]
    assert_close(
        direction, torch.tensor([[0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]]), rtol=1e-6
    )


def test_a_vector_is_split_like_the_row_of_a_matrix():
    vector = normal(6)
    alone, in_a_row = (
        magnitude_and_direction(vector),
        magnitude_and_direction(vector.unsqueeze(0)),
    )
    assert torch.equal(alone.magnitude, in_a_row.magnitude[0])
    assert torch.equal(alone.direction, in_a_row.direction[0])


def test_a_zero_vector_has_magnitude_zero_and_direction_zero():
    magnitude, direction = magnitude_and_direction(torch.zeros(3))
    assert magnitude == 0
    assert direction.tolist() == [0, 0, 0]
    magnitude, direction = magnitude_and_direction(
        torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    )
    assert magnitude.tolist() == [0, 5]
    assert_close(direction, torch.tensor([[0.0, 0.0], [0.6, 0.8]]), rtol=1e-6)


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
    original = matrix(rows, columns, seed)
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


def test_no_random_product_of_the_same_rank_comes_nearer():
    original = matrix(6, 8)
    A, B = low_rank_approximation(original, 2)
    best = (original - A @ B).norm()
    for seed in range(20):
        # The best B for a random A.
        other = normal(6, 2, seed=seed)
        assert (
            original - other @ torch.linalg.lstsq(other, original).solution
        ).norm() > best


def test_a_matrix_of_low_rank_is_reproduced():
    original = normal(7, 2, seed=1) @ normal(2, 5, seed=2)
    A, B = low_rank_approximation(original, 2)
    assert_close(A @ B, original)
    A, B = low_rank_approximation(original, 1)
    assert not torch.allclose(A @ B, original)


def test_the_singular_values_are_shared_evenly_between_the_factors():
    A, B = low_rank_approximation(matrix(6, 8), 3)
    values = np.linalg.svd(array(matrix(6, 8)), compute_uv=False)[:3]
    assert_close(A.T @ A, torch.from_numpy(np.diag(values)), rtol=1e-11)
    assert_close(B @ B.T, torch.from_numpy(np.diag(values)), rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_keep_the_dtype_and_are_computed_in_float32(dtype):
    original = normal(6, 8, dtype=dtype)
    A, B = low_rank_approximation(original, 6)
    assert A.dtype == B.dtype == dtype
    torch.testing.assert_close(
        (A.float() @ B.float()), original.float(), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("shape", [(4, 2000), (2000, 4)])
def test_a_thin_matrix_takes_no_square_of_its_longer_side(shape):
    original = normal(*shape)
    with torch.profiler.profile(profile_memory=True) as profile:
        low_rank_approximation(original, 2)
    assert (
        0
        < max(event.cpu_memory_usage for event in profile.key_averages())
        < 20 * original.nbytes
    )


def test_whole_numbers_are_approximated_as_what_they_stand_for():
    A, B = low_rank_approximation(torch.tensor([[1, 2], [3, 6]]), 1)
    assert_close(A @ B, torch.tensor([[1.0, 2.0], [3.0, 6.0]]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_transpose_of_a_weight_update_gives_factors_in_loras_shapes(dtype):
    update = normal(5, 7, dtype=dtype)
    A, B = low_rank_approximation(update.T, 5)
    assert A.shape == (7, 5)
    assert B.shape == (5, 5)
    assert_close((A @ B).T, update, rtol=1e-12 if dtype == torch.float64 else 1e-5)


# --- ΔM and ΔD -------------------------------------------------------------------------------------


def test_the_changes_are_those_of_equations_3_and_4():
    before, after = matrix(5, 7, seed=1), matrix(5, 7, seed=2)
    w0, w = array(before), array(after)
    n0, n = np.linalg.norm(w0, axis=1), np.linalg.norm(w, axis=1)
    assert_close(magnitude_change(after, before), np.abs(n - n0).mean())
    assert_close(
        direction_change(after, before), (1 - (w * w0).sum(axis=1) / (n * n0)).mean()
    )


def test_nothing_has_changed_between_a_weight_and_itself():
    weight = matrix(5, 7)
    assert magnitude_change(weight, weight) == 0
    assert abs(direction_change(weight, weight)) < 1e-15


def test_scaling_changes_the_magnitude_only_and_turning_the_direction_only():
    weight = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    assert_close(magnitude_change(3 * weight, weight), (10 + 2) / 2)
    assert abs(direction_change(3 * weight, weight)) < 1e-15
    turned = weight @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert magnitude_change(turned, weight) < 1e-15
    assert_close(direction_change(turned, weight), 1.0)
    assert_close(direction_change(-weight, weight), 2.0)


def test_rows_that_grow_and_rows_that_shrink_do_not_cancel():
    weight = torch.eye(2)
    assert magnitude_change(torch.diag(torch.tensor([1.5, 0.5])), weight) == 0.5


def test_a_zero_row_counts_as_a_right_angle():
    weight = torch.eye(2)
    lost = torch.diag(torch.tensor([1.0, 0.0]))
    assert direction_change(lost, weight) == 0.5
    assert direction_change(weight, lost) == 0.5
    assert magnitude_change(lost, weight) == 0.5


@given(**shapes)
def test_both_changes_lie_in_their_ranges(rows, columns, seed):
    first, second = matrix(rows, columns, seed), matrix(rows, columns, seed + 1)
    assert magnitude_change(first, second) >= 0
    assert -1e-12 <= direction_change(first, second) <= 2 + 1e-12


# --- What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: magnitude_and_direction([1.0, 2.0]),
            TypeError,
            "tensor must be a tensor; got list",
        ),
        (
            lambda: magnitude_and_direction(None),
            TypeError,
            "tensor must be a tensor; got NoneType",
        ),
        (
            lambda: magnitude_and_direction(torch.ones(2, 2, 2)),
            ValueError,
            r"tensor must be .*; got shape \(2, 2, 2\)",
        ),
        (
            lambda: magnitude_and_direction(torch.tensor(3.0)),
            ValueError,
            r"tensor must be .*; got shape \(\)",
        ),
        (
            lambda: low_rank_approximation([[1.0]], 1),
            TypeError,
            "matrix must be a tensor; got list",
        ),
        (
            lambda: low_rank_approximation(torch.ones(3), 1),
            ValueError,
            r"matrix must be a matrix .*\(3,\)",
        ),
        (
            lambda: low_rank_approximation(torch.ones(3, 5), 0),
            ValueError,
            "rank must be .* 1 or more; got 0",
        ),
        (
            lambda: low_rank_approximation(torch.ones(3, 5), 4),
            ValueError,
            r"rank must be at most 3, the shorter side of \(3, 5\); got 4",
        ),
        (
            lambda: low_rank_approximation(torch.ones(3, 5), 1.0),
            TypeError,
            r"rank must be a whole number, 1 or more; got 1\.0 \(float\)",
        ),
        (
            lambda: low_rank_approximation(torch.ones(3, 5), True),
            TypeError,
            r"rank must be .*\(bool\)",
        ),
        *(
            case
            for change in (magnitude_change, direction_change)
            for case in [
                (
                    lambda change=change: change(torch.ones(2, 3), torch.ones(3, 2)),
                    ValueError,
                    r"weight and reference must have the same shape; got \(2, 3\) and \(3, 2\)",
                ),
                (
                    lambda change=change: change(torch.ones(2, 3), torch.ones(1, 3)),
                    ValueError,
                    r"must have the same shape; got \(2, 3\) and \(1, 3\)",
                ),
                (
                    lambda change=change: change(None, torch.ones(2, 3)),
                    TypeError,
                    "weight must be a tensor; got NoneType",
                ),
                (
                    lambda change=change: change(torch.ones(2, 3), torch.ones(3)),
                    ValueError,
                    r"reference must be a matrix .*; got shape \(3,\)",
                ),
            ]
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_what_came_and_what_is_allowed(
    call, error, message
):
    with pytest.raises(error, match=message):
        call()
