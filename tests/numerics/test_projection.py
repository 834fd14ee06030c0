"""Projections and angles against numpy and scipy."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.spatial.distance import cosine

from emlens.numerics.projection import (
    cosine_similarity,
    orthonormal_basis,
    principal_angles,
    project_onto,
    project_out,
    random_cosine_std,
    unit_vectors,
    with_canonical_signs,
)
from emlens.numerics.validation import NonFiniteError, WidthError, ZeroVectorError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_cosine_similarity_is_scipys():
    a, b = normal(4, 7), normal(4, 7, seed=1)
    expected = [1 - cosine(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(cosine_similarity(a, b), expected, rtol=1e-10, atol=1e-12)


def test_cosine_similarity_ignores_scale_and_survives_huge_and_tiny_vectors():
    a = normal(7).float()
    for scale in (1e30, 1e-30):
        assert float(cosine_similarity(a * scale, a)) == pytest.approx(1, abs=1e-6)
        assert float(cosine_similarity(a * scale, -a)) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_unit_vectors_are_numpys_at_any_scale(scale: float):
    a = normal(3, 7)
    expected = a.numpy() / np.linalg.norm(a.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(unit_vectors(scale * a), expected, rtol=1e-12)
    assert unit_vectors(torch.zeros(2)).isnan().all()


def test_a_zero_vector_has_no_cosine():
    assert cosine_similarity(torch.zeros(3), torch.ones(3)).isnan()
    assert cosine_similarity(torch.ones(3), torch.zeros(3)).isnan()


def test_random_cosines_have_the_stated_spread():
    cosines = cosine_similarity(normal(4000, 50), normal(4000, 50, seed=1))
    assert float(cosines.std()) == pytest.approx(random_cosine_std(50), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 6), scale=st.sampled_from([1e-6, 1.0, 1e6]), seed=st.integers(0, 2**20))
def test_projecting_out_is_idempotent_and_orthogonal(k: int, scale: float, seed: int):
    x, vectors = normal(3, 4, 9, seed=seed), scale * normal(k, 9, seed=seed + 1)
    left = project_out(x, vectors)
    np.testing.assert_allclose(project_out(left, vectors), left, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(left @ vectors.T / scale, np.zeros((3, 4, k)), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(left + project_onto(x, vectors), x, rtol=1e-10, atol=1e-10)


def test_projection_onto_oblique_vectors_is_the_least_squares_fit():
    x, vectors = normal(5, 9), normal(3, 9, seed=1)
    vectors[2] += 5 * vectors[0]
    fit = np.linalg.lstsq(vectors.numpy().T, x.numpy().T, rcond=None)[0]
    np.testing.assert_allclose(
        project_onto(x, vectors), (vectors.numpy().T @ fit).T, rtol=1e-10, atol=1e-10
    )


def test_a_repeated_vector_changes_no_projection():
    x, vector = normal(5, 9), normal(9, seed=1)
    once = project_onto(x, vector)
    np.testing.assert_allclose(
        project_onto(x, torch.stack([vector, 3 * vector])), once, rtol=1e-10, atol=1e-10
    )
    assert orthonormal_basis(torch.stack([vector, 3 * vector])).shape == (1, 9)


def test_bfloat16_vectors_have_a_basis():
    basis = orthonormal_basis(normal(2, 9).bfloat16())
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), rtol=0, atol=1e-6)


def test_vectors_without_a_direction_are_refused():
    with pytest.raises(ZeroVectorError, match="all zero"):
        project_onto(normal(2, 4), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="vectors"):
        project_onto(normal(2, 4), torch.full((4,), float("nan"), dtype=torch.float64))


def test_principal_angles_are_scipys():
    a, b = normal(4, 12), normal(2, 12, seed=1)
    expected = np.sort(subspace_angles(a.numpy().T, b.numpy().T))
    np.testing.assert_allclose(principal_angles(a, b), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(principal_angles(b, a), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-9, 1e-3, 0.7, 0.9, math.pi / 2 - 1e-9])
def test_small_and_large_angles_keep_their_digits(angle: float):
    a = torch.zeros(2, 6, dtype=torch.float64)
    b = torch.zeros(2, 6, dtype=torch.float64)
    a[0, 0] = b[0, 0] = 1
    a[1, 1] = 1
    b[1, 1], b[1, 2] = math.cos(angle), math.sin(angle)
    got = principal_angles(a, b)
    np.testing.assert_allclose(got, [0, angle], rtol=1e-6, atol=1e-14)


def test_canonical_signs_make_the_largest_entry_positive():
    rows = torch.tensor([[1.0, -3.0], [2.0, 1.0], [0.0, 0.0]])
    expected = torch.tensor([[-1.0, 3.0], [2.0, 1.0], [0.0, 0.0]])
    assert torch.equal(with_canonical_signs(rows), expected)


def test_widths_are_checked_without_the_type_checker_too():
    for function in (cosine_similarity, project_onto, principal_angles):
        with pytest.raises(WidthError, match=r"width|shape"):
            inspect.unwrap(function)(torch.ones(2, 1), torch.ones(2, 4))
