"""Low-rank affine maps against dense matrices, with numpy as the judge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from emlens.numerics.affine import (
    ConflictingTargetsError,
    LowRankAffine,
    ablation,
    compose,
    translation,
)
from emlens.numerics.validation import NonFiniteError, WidthError, ZeroVectorError

D = 7


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_map(rank, seed, width=D):
    return LowRankAffine(
        draw(width, rank, seed=seed), draw(width, rank, seed=seed + 1), draw(width, seed=seed + 2)
    )


def dense(map_):
    """The map as numpy's (I + U V^T, c) for column vectors."""
    U, V, c = (t.double().numpy() for t in (map_.U, map_.V, map_.c))
    return np.eye(len(c)) + U @ V.T, c


def apply_dense(map_, y):
    M, c = dense(map_)
    return y.double().numpy() @ M.T + c


ranks = st.integers(0, 4)
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_map_is_the_dense_affine_map(rank, shifted):
    map_ = draw_map(rank, seed=3)
    if not shifted:
        map_ = LowRankAffine(map_.U, map_.V, torch.zeros(D, dtype=torch.float64))
    y = draw(2, 4, D, seed=9)
    before = y.clone()
    np.testing.assert_allclose(map_.apply(y).numpy(), apply_dense(map_, y), atol=1e-12)
    assert torch.equal(y, before)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_only_the_chosen_vectors_are_mapped(rank):
    map_ = draw_map(rank, seed=3)
    y = draw(3, 5, D)
    where = draw(3, 5, seed=4) > 0
    assert where.any()
    assert not where.all()
    got = map_.apply(y, where)
    expected = np.where(where.numpy()[..., None], apply_dense(map_, y), y.numpy())
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    assert torch.equal(got[~where], y[~where])


@given(ranks, ranks, seeds)
@settings(max_examples=40, deadline=None)
def test_one_map_after_another_is_the_product_of_their_matrices(first, second, seed):
    a, b = draw_map(first, seed), draw_map(second, seed + 10)
    y = draw(3, D, seed=seed + 20)
    expected = apply_dense(b, torch.from_numpy(apply_dense(a, y)))
    np.testing.assert_allclose(a.then(b).apply(y).numpy(), expected, atol=1e-9)


@given(ranks, ranks, ranks, seeds)
@settings(max_examples=40, deadline=None)
def test_composition_is_associative(first, second, third, seed):
    a, b, c = draw_map(first, seed), draw_map(second, seed + 10), draw_map(third, seed + 20)
    y = draw(3, D, seed=seed + 30)
    left, right = a.then(b).then(c).apply(y), a.then(b.then(c)).apply(y)
    assert torch.allclose(left, right, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 12), seeds)
@settings(max_examples=40, deadline=None)
def test_compression_keeps_the_map_and_leaves_no_more_columns_than_its_rank(rank, seed):
    map_ = draw_map(rank, seed)
    small = map_.compress()
    assert small.rank == np.linalg.matrix_rank(dense(map_)[0] - np.eye(D))
    np.testing.assert_allclose(dense(small)[0], dense(map_)[0], atol=1e-10)
    np.testing.assert_allclose((small.V.mT @ small.V).numpy(), np.eye(small.rank), atol=1e-10)


def test_maps_that_undo_each_other_leave_nothing():
    forth = LowRankAffine(draw(D, 1), torch.zeros(D, 1, dtype=torch.float64), draw(D))
    v = ablation(draw(1, D)).V
    double, halve = LowRankAffine(v, v, 0 * v[:, 0]), LowRankAffine(-v / 2, v, 0 * v[:, 0])
    assert compose([double, halve]).rank == 0
    assert compose([forth, translation(-forth.c)]).rank == 0
    assert not compose([forth, translation(-forth.c)]).c.any()


@given(st.integers(1, 5), seeds)
@settings(max_examples=40, deadline=None)
def test_ablation_is_idempotent_and_orthogonal(k, seed):
    vectors = draw(k, D, seed=seed)
    map_ = ablation(vectors)
    M, _ = dense(map_)
    np.testing.assert_allclose(M @ M, M, atol=1e-10)
    np.testing.assert_allclose(M, M.T, atol=1e-10)
    y = draw(4, D, seed=seed + 1)
    out = map_.apply(y)
    # What is left is the residual of numpy's least squares on the vectors.
    coefficients = np.linalg.lstsq(vectors.numpy().T, y.numpy().T, rcond=None)[0]
    np.testing.assert_allclose(out.numpy(), y.numpy() - coefficients.T @ vectors.numpy(), atol=1e-8)
    assert float((out @ vectors.mT).abs().max()) <= 1e-9


@given(st.integers(1, 4), seeds)
@settings(max_examples=40, deadline=None)
def test_an_affine_ablation_moves_the_components_and_nothing_else(k, seed):
    vectors, values = draw(k, D, seed=seed), draw(k, seed=seed + 1)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    y = draw(5, D, seed=seed + 2)
    map_ = ablation(vectors, values)
    out = map_.apply(y)
    assert torch.allclose(out @ units.mT, values.expand(5, k), atol=1e-7)
    change = (out - y).numpy()
    onto = np.linalg.lstsq(units.numpy().T, change.T, rcond=None)[0].T @ units.numpy()
    np.testing.assert_allclose(change, onto, atol=1e-7)
    assert torch.allclose(map_.apply(out), out, atol=1e-8)


def test_the_norm_of_an_ablated_vector_does_not_matter():
    v = draw(1, D)
    for scale in (1e-170, 1e-3, -1e8):
        np.testing.assert_allclose(dense(ablation(scale * v))[0], dense(ablation(v))[0], atol=1e-14)


def test_parallel_vectors_take_one_value_only():
    v = draw(1, D)
    twice = torch.cat([v, 3 * v])
    assert ablation(twice).rank == 1
    ablation(twice, torch.tensor([2.0, 2.0], dtype=torch.float64))
    with pytest.raises(ConflictingTargetsError, match="parallel"):
        ablation(twice, torch.tensor([2.0, 2.5], dtype=torch.float64))


def test_one_vector_in_two_precisions_takes_one_value_only():
    v = draw(1, D)
    rounded = torch.cat([v, v.float().double()])
    assert not torch.equal(rounded[0], rounded[1])
    ablation(rounded, torch.tensor([2.0, 2.0], dtype=torch.float64))
    with pytest.raises(ConflictingTargetsError, match="parallel"):
        ablation(rounded, torch.tensor([2.0, 2.5], dtype=torch.float64))


@given(ranks, seeds)
@settings(max_examples=30, deadline=None)
def test_folded_weights_give_the_mapped_outputs(rank, seed):
    map_ = draw_map(rank, seed)
    W, b, x = draw(4, D, seed=seed + 5), draw(D, seed=seed + 6), draw(3, 4, seed=seed + 7)
    W_folded, b_folded = map_.fold_into(W, b)
    assert torch.allclose(x @ W_folded + b_folded, map_.apply(x @ W + b), atol=1e-9)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_hardly_anything_of_the_direction_is_left_even_of_vectors_along_it(dtype, limit):
    v = draw(1, 300)
    map_ = ablation(v)
    y = (draw(50, 300, seed=1) + 40 * v).to(dtype)  # cosine above .999
    out = map_.apply(y).double()
    unit = v[0] / v[0].norm()
    assert bool(((out @ unit).abs() <= limit * out.norm(dim=1)).all())


def test_half_precision_is_rounded_once():
    map_ = draw_map(2, seed=1)
    y = draw(20, D).to(torch.bfloat16)
    expected = torch.from_numpy(apply_dense(map_, y)).to(torch.bfloat16)
    # Two roundings of numbers that differ by float32 noise may fall on neighbours, rarely.
    assert (map_.apply(y) == expected).double().mean() > 0.95


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("shifted", [False, True])
def test_half_precision_is_mapped_apart_and_has_its_gradient(rank, shifted):
    map_ = draw_map(rank, 5)
    map_ = map_ if shifted else LowRankAffine(map_.U, map_.V, torch.zeros_like(map_.c))
    y = draw(20, D).to(torch.bfloat16)
    before = y.clone()
    plain = map_.apply(y)
    assert torch.equal(y, before)
    leaf = y.clone().requires_grad_()
    mapped = map_.apply(leaf)
    assert torch.equal(mapped, plain)
    mapped.backward(torch.ones_like(mapped))
    expected = dense(map_)[0].sum(0)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.double().numpy(), [expected] * 20, rtol=2e-2, atol=2e-2)


def test_a_vector_of_a_map_has_its_gradient_through_half_precision():
    v = draw(D).requires_grad_()
    y = draw(20, D).to(torch.bfloat16)
    moved = translation(v).apply(y)
    assert torch.equal(moved, translation(v.detach()).apply(y))
    moved.backward(torch.ones_like(moved))
    assert v.grad is not None
    np.testing.assert_allclose(v.grad.numpy(), np.full(D, 20.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: draw_map(1, 0).apply(draw(3, D + 1)), WidthError, "width of the map"),
        (lambda: draw_map(1, 0).then(draw_map(1, 0, width=D + 1)), WidthError, "other map"),
        (lambda: draw_map(1, 0).fold_into(draw(3, D + 1), draw(D + 1)), WidthError, "W's last"),
        (lambda: translation(torch.full((D,), torch.nan)), NonFiniteError, "NaN"),
        (lambda: ablation(torch.zeros(1, D)), ZeroVectorError, "no direction"),
        (lambda: compose([]), ValueError, "got none"),
    ],
)
def test_what_does_not_fit_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("shapes", [((D, 2), (D, 3), (D,)), ((D, 2), (D, 2), (1,))])
def test_factors_that_do_not_fit_together_are_no_map(shapes):
    # Unlike a function, a dataclass cannot be reached behind the check of its annotations.
    with pytest.raises((WidthError, TypeCheckError), match=r"U has shape|'[Vc]'"):
        LowRankAffine(*(draw(*shape) for shape in shapes))
