"""Low-rank products against numpy and scipy on the product itself."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from emlens.numerics.lowrank import (
    frobenius_norm_product,
    inner_product,
    svd_product,
    write_overlap,
)
from emlens.numerics.validation import NonFiniteError, WidthError


def factors(d_out: int, rank: int, d_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return B, torch.randn(rank, d_in, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(
    d_out=st.integers(1, 12), rank=st.integers(1, 12), d_in=st.integers(1, 12), seed=st.integers(0)
)
def test_the_decomposition_is_that_of_the_product(d_out: int, rank: int, d_in: int, seed: int):
    B, A = factors(d_out, rank, d_in, seed % 2**31)
    svd = svd_product(B, A)
    k = min(d_out, rank, d_in)
    assert svd.S.shape == (k,)
    np.testing.assert_allclose(svd.S, np.linalg.svd((B @ A).numpy())[1][:k], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(svd.U * svd.S @ svd.Vh, B @ A, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(svd.U.T @ svd.U, np.eye(k), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(svd.Vh @ svd.Vh.T, np.eye(k), rtol=1e-10, atol=1e-10)


def test_signs_do_not_depend_on_how_the_product_is_split():
    B, A = factors(20, 3, 15)
    turn = torch.linalg.qr(factors(3, 3, 3, 9)[0]).Q
    first, second = svd_product(B, A), svd_product(-B @ turn, -turn.T @ A)
    np.testing.assert_allclose(first.U, second.U, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(first.Vh, second.Vh, rtol=1e-10, atol=1e-10)
    largest = first.U.gather(0, first.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_rank_deficient_factors_keep_their_true_rank():
    B, A = factors(20, 4, 15)
    B[:, 3] = 2 * B[:, 0] - B[:, 1]
    svd = svd_product(B, A)
    assert svd.numerical_rank() == np.linalg.matrix_rank((B @ A).numpy()) == 3
    np.testing.assert_allclose(svd.U * svd.S @ svd.Vh, B @ A, rtol=1e-10, atol=1e-10)


def test_a_zero_product_has_rank_zero_norm_zero_and_no_write_space():
    B, A = factors(6, 2, 5)
    zero = torch.zeros_like(B)
    assert svd_product(zero, A).numerical_rank() == 0
    assert frobenius_norm_product(zero, A) == 0
    assert write_overlap(zero, A, B, A).shape == (0,)


def test_norm_and_inner_product_are_those_of_the_products():
    B1, A1 = factors(20, 3, 15)
    B2, A2 = factors(20, 5, 15, 1)
    assert frobenius_norm_product(B1, A1) == pytest.approx(
        np.linalg.norm((B1 @ A1).numpy()), rel=1e-12
    )
    expected = np.vdot((B1 @ A1).numpy(), (B2 @ A2).numpy())
    assert inner_product(B1, A1, B2, A2) == pytest.approx(expected, rel=1e-10)


def test_the_norm_of_a_cancelling_product_keeps_its_digits():
    column, row = torch.ones(4, 1), torch.ones(1, 4)
    B = torch.cat([column, -column], 1).double()
    A = torch.cat([row, row]).double()
    A[1] *= 1 + 1e-9
    assert frobenius_norm_product(B, A) == pytest.approx(4e-9, rel=1e-5)


def test_bfloat16_factors_are_computed_in_float64():
    B, A = (factor.bfloat16() for factor in factors(30, 4, 20))
    exact = np.linalg.svd((B.double() @ A.double()).numpy())[1][:4]
    np.testing.assert_allclose(svd_product(B, A).S, exact, rtol=1e-10)


def test_write_overlap_is_scipys_angle_between_the_column_spaces():
    B1, A1 = factors(20, 3, 15)
    B2, A2 = factors(20, 5, 15, 1)
    angles = subspace_angles((B1 @ A1).numpy()[:, :3], (B2 @ A2).numpy()[:, :5])
    got = write_overlap(B1, A1, B2, A2)
    np.testing.assert_allclose(got, np.sort(np.cos(angles))[::-1], rtol=1e-10, atol=1e-10)


def test_write_overlap_finds_one_shared_direction_and_random_ones_at_their_baseline():
    B1, A1 = factors(1000, 2, 30)
    B2, A2 = factors(1000, 2, 30, 1)
    random = write_overlap(B1, A1, B2, A2)
    assert float(random.square().mean()) < 5 * 2 / 1000
    B2[:, 0] = B1[:, 0]
    shared = write_overlap(B1, A1, B2, A2)
    assert float(shared[0]) == pytest.approx(1, abs=1e-12)
    assert float(shared[1]) < 0.2


def test_factors_that_do_not_fit_are_refused_by_name():
    B, A = factors(6, 2, 5)
    with pytest.raises(WidthError, match="columns of B is 2 but rows of A is 5"):
        inspect.unwrap(svd_product)(B, A.T)
    with pytest.raises(WidthError, match="rows of B2 is 4"):
        inspect.unwrap(inner_product)(B, A, B[:4], A)
    with pytest.raises(WidthError, match="columns of A2 is 3"):
        inspect.unwrap(inner_product)(B, A, B, A[:, :3])
    with pytest.raises(WidthError, match="rows of B2 is 4"):
        inspect.unwrap(write_overlap)(B, A, B[:4], A)
    with pytest.raises(WidthError, match="matrix"):
        inspect.unwrap(svd_product)(B[:, 0], A)
    with pytest.raises(NonFiniteError, match="B holds NaN"):
        svd_product(B * float("nan"), A)
