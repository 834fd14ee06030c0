"""Bends, planes and noise of paths, against vectors written out and scikit-learn."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from sklearn.decomposition import PCA
from torch import Tensor

from emlens.numerics.bent_paths import sample_bent_path, sample_momentum_path, sample_turn
from emlens.numerics.null_paths import (
    KINDS,
    BendSettings,
    NullKind,
    PathShape,
    measure_bends,
    null_prominences,
    prominences_of_paths,
    sample_null_paths,
    shape_of_path,
)
from emlens.numerics.paths import (
    find_plane_turn,
    gram_of_path,
    local_cosine,
    noise_dimension,
    normalise_gram,
    path_coordinates,
    step_cosines,
    step_lengths,
)
from emlens.numerics.validation import NonFiniteError, WidthError


def walk(t: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(t, d, generator=generator, dtype=torch.float64).cumsum(0)


@settings(max_examples=25, deadline=None)
@given(t=st.integers(8, 30), d=st.integers(2, 9), window=st.integers(1, 3), seed=st.integers(0))
def test_the_cosine_is_that_of_the_differences_written_out(t: int, d: int, window: int, seed: int):
    points = walk(t, d, seed % 2**31)
    found = local_cosine(gram_of_path(points), torch.arange(t), window=window, threshold=0.0)
    path = points.numpy()
    expected = [
        np.dot(path[i - window] - path[i], path[i + window] - path[i])
        / np.linalg.norm(path[i - window] - path[i])
        / np.linalg.norm(path[i + window] - path[i])
        for i in range(window, t - window)
    ]
    np.testing.assert_allclose(found.cosine, expected, rtol=1e-8, atol=1e-8)
    assert found.index.tolist() == list(range(window, t - window))
    assert found.n_uneven == 2 * window


def test_straight_is_minus_one_a_right_angle_zero_and_a_reversal_one():
    steps = torch.arange(7)
    straight = torch.outer(steps.double(), torch.tensor([3.0, 4.0], dtype=torch.float64))
    found = local_cosine(gram_of_path(straight), steps, window=2, threshold=0.0)
    np.testing.assert_allclose(found.cosine, -1, atol=1e-12)
    for angle, value in ((math.pi / 2, 0.0), (math.pi, 1.0)):
        bent = sample_turn(9, width=5, at=4, noise=0.0, angle=angle)
        found = local_cosine(gram_of_path(bent), torch.arange(9), window=3, threshold=0.0)
        assert found.cosine.max() == pytest.approx(value, abs=1e-10)
        assert float(found.cosine[found.index == 4]) == pytest.approx(value, abs=1e-10)


def test_a_planted_path_has_its_angles_and_its_noise():
    angles = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    smooth = sample_bent_path(angles, width=40, noise=0.0, seed=1)
    expected = (angles[:, None] - angles).cos()
    np.testing.assert_allclose(step_cosines(gram_of_path(smooth)), expected, atol=1e-12)
    np.testing.assert_allclose(step_lengths(gram_of_path(smooth)), 1, rtol=1e-12)
    rough = sample_bent_path(angles, width=40_000, noise=0.5, seed=1)
    np.testing.assert_allclose(step_lengths(gram_of_path(rough)), math.sqrt(1.25), rtol=0.02)
    turn = sample_turn(8, at=3, width=40, noise=0.1, angle=0.7, seed=2)
    steps = torch.tensor([0.0] * 3 + [0.7] * 4, dtype=torch.float64)
    assert torch.equal(turn, sample_bent_path(steps, width=40, noise=0.1, seed=2))


def test_a_point_needs_both_neighbours_and_enough_movement():
    steps = torch.tensor([0, 5, 10, 15, 17, 20, 25])
    path = torch.outer(steps.double(), torch.ones(3, dtype=torch.float64))
    found = local_cosine(gram_of_path(path), steps, window=5, threshold=0.0)
    assert [int(steps[i]) for i in found.index] == [5, 10, 15, 20]
    assert found.n_uneven == 3
    # Five steps move a fifth of the last norm.
    gram = gram_of_path(path)
    assert len(local_cosine(gram, steps, window=5, threshold=0.1999).cosine) == 4
    none = local_cosine(gram, steps, window=5, threshold=0.2001)
    assert (len(none.cosine), none.n_small, none.n_uneven) == (0, 4, 3)
    assert math.isnan(none.prominence)


def test_growth_alone_is_a_point_once_norms_are_taken_out():
    path = torch.outer(torch.linspace(0, 2, 20, dtype=torch.float64) ** 2, torch.ones(4).double())
    found = measure_bends(
        gram_of_path(path),
        torch.arange(20),
        BendSettings(window=2, threshold=0.03, normalised=True),
    )
    assert len(found.cosine) == 0
    np.testing.assert_allclose(normalise_gram(gram_of_path(path))[1:, 1:], 1, rtol=1e-12)


def test_normalised_bends_name_places_on_the_whole_path():
    path = sample_turn(41, width=30, at=20, noise=0.0) + 0.0
    found = measure_bends(
        gram_of_path(path), torch.arange(41), BendSettings(window=5, threshold=0.0, normalised=True)
    )
    unit = path[1:] / torch.linalg.vector_norm(path[1:], dim=1, keepdim=True)
    alone = local_cosine(gram_of_path(unit), torch.arange(40), window=5, threshold=0.0)
    np.testing.assert_allclose(found.cosine, alone.cosine, rtol=1e-6, atol=1e-6)
    assert (found.index - 1).tolist() == alone.index.tolist()
    assert found.n_uneven == alone.n_uneven + 1


def test_parts_of_a_path_add_up():
    path = walk(12, 20)
    whole = gram_of_path(path)
    np.testing.assert_allclose(
        gram_of_path(path[:, :7]) + gram_of_path(path[:, 7:]), whole, rtol=1e-12
    )
    lengths = np.linalg.norm(np.diff(path.numpy(), axis=0), axis=1)
    np.testing.assert_allclose(step_lengths(whole), lengths, rtol=1e-10)
    assert torch.equal(step_cosines(whole).diagonal().round(decimals=8), torch.ones(11).double())


def test_coordinates_are_those_of_scikit_learn():
    path = walk(15, 8)
    points, shares = path_coordinates(gram_of_path(path), n=3)
    fitted = PCA(n_components=3).fit(path.numpy())
    np.testing.assert_allclose(points.abs(), np.abs(fitted.transform(path.numpy())), rtol=1e-7)
    np.testing.assert_allclose(shares, fitted.explained_variance_ratio_, rtol=1e-9)
    assert (points[-1] >= 0).all()


@pytest.mark.parametrize("at", [20, 60, 110])
def test_the_corner_of_a_planted_turn_is_the_farthest_from_the_line_between_the_ends(at: int):
    path = sample_turn(130, at=at, width=300, noise=0.1, seed=at)
    found = find_plane_turn(gram_of_path(path))
    assert found is not None
    assert abs(found - at) <= 2
    # As it lies in space, and however large it is.
    turned = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(1)))[0]
    moved = 7 * path @ turned.double() + 3
    assert find_plane_turn(gram_of_path(moved)) == found


def test_a_path_that_ends_where_it_began_is_farthest_out_half_way():
    angles = 2 * math.pi * torch.arange(21).double() / 20
    circle = torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    circle[-1] = circle[0]
    assert find_plane_turn(gram_of_path(circle)) == 10


def test_a_straight_or_a_still_path_leaves_no_line():
    line = torch.linspace(1, 3, 40)[:, None].double() ** 2 * torch.arange(1, 8).double()
    assert find_plane_turn(gram_of_path(line)) is None
    assert find_plane_turn(torch.ones(4, 4).double()) is None


def test_coordinates_of_a_still_path_are_zero():
    points, shares = path_coordinates(torch.ones(4, 4).double(), n=6)
    assert points.shape == (4, 6)
    assert float(points.abs().max()) < 1e-6
    assert float(shares.max()) <= 1.0


@pytest.mark.parametrize("dimension", [3, 10, 40])
def test_the_dimension_of_noise_is_found_beside_trend_and_turn(dimension: int):
    generator = torch.Generator().manual_seed(1)
    noise = torch.zeros(150, 500, dtype=torch.float64)
    noise[:, :dimension] = torch.randn(150, dimension, generator=generator, dtype=torch.float64)
    path = sample_turn(151, width=500, at=70, noise=0.0, seed=2) * 5
    path[1:] += noise.cumsum(0)
    assert noise_dimension(gram_of_path(path), largest=500) == pytest.approx(dimension, rel=0.25)


@pytest.mark.parametrize("turn", [None, 200])
def test_momentum_warm_up_and_a_falling_rate_leave_the_dimension_of_noise(turn: int | None):
    step = torch.arange(550).double()
    turned = torch.zeros(550) if turn is None else ((step - turn) / 60 + 0.5).clamp(0, 1)
    path = sample_momentum_path(turned.double() * math.pi / 2, width=1000, noise=0.7, every=5)
    assert len(path) == 111
    assert noise_dimension(gram_of_path(path), largest=5000) == pytest.approx(1000, rel=0.15)


def test_uneven_steps_of_a_straight_path_are_no_noise():
    generator = torch.Generator().manual_seed(0)
    lengths = 1 + torch.rand(120, generator=generator, dtype=torch.float64)
    shape = PathShape(
        lengths=lengths, steps=torch.arange(121), start=0.0, straightness=0.99, dimension=400
    )
    path = sample_null_paths(shape, "straight", n=1, generator=generator)[0]
    assert noise_dimension(gram_of_path(path), largest=5000) == pytest.approx(400, rel=0.2)


def test_a_few_sharp_turns_do_not_rule_the_dimension_of_noise():
    place = torch.arange(150)
    angles = math.pi / 2 * ((place >= 40) & (place < 70) | (place >= 110)).double()
    path = sample_bent_path(angles, width=1000, noise=0.05, seed=0)
    assert noise_dimension(gram_of_path(path), largest=1000) == pytest.approx(1000, rel=0.2)


def test_a_momentum_path_is_a_running_mean_of_its_gradients():
    angles = torch.zeros(30, dtype=torch.float64)
    path = sample_momentum_path(angles, width=4, noise=0.0, every=1, warmup=10)
    trend = torch.linalg.vector_norm(path.diff(dim=0), dim=1)
    rates = np.minimum(np.arange(1, 31) / 10, (30 - np.arange(30)) / 20)
    # scipy's filter is the recursion of the mean.
    means = lfilter([0.1], [1.0, -0.9], np.ones(30))
    np.testing.assert_allclose(trend, rates * means, rtol=1e-10)
    sparse = sample_momentum_path(angles, width=4, noise=0.0, every=5, warmup=10)
    assert torch.equal(sparse, path[::5])


def test_null_paths_with_momentum_have_noise_alike_at_neighbouring_steps():
    steps = torch.arange(0, 605, 5)
    shape = PathShape(
        lengths=torch.ones(120).double(), steps=steps, start=0.0, straightness=0.0, dimension=3000
    )
    generator = torch.Generator().manual_seed(0)
    path = sample_null_paths(shape, "momentum", n=1, generator=generator)[0]
    found = step_cosines(gram_of_path(path))
    drawn = np.random.default_rng(0).standard_normal((3000, 600))
    sums = np.asarray(lfilter([0.1], [1.0, -0.9], drawn)).reshape(3000, 120, 5).sum(2)
    expected = np.corrcoef(sums.T)
    for lag in (1, 2, 4):
        alike = float(np.diagonal(expected, lag).mean())
        assert float(found.diagonal(lag).mean()) == pytest.approx(alike, abs=0.02)
    # The first two are less alike than any two later on: the mean begins at nothing.
    assert float(found[0, 1]) == pytest.approx(expected[0, 1], abs=0.05)


def test_without_noise_the_dimension_is_the_largest():
    straight = torch.outer(torch.arange(30.0).double(), torch.ones(4).double())
    assert noise_dimension(gram_of_path(straight), largest=77) == 77
    assert noise_dimension(gram_of_path(walk(60, 4000)), largest=4000) == pytest.approx(
        4000, rel=0.3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_null_paths_keep_lengths_and_straightness(kind: str):
    lengths = torch.linspace(1, 3, 120, dtype=torch.float64)
    steps = torch.arange(121) * 20
    shape = PathShape(lengths=lengths, steps=steps, start=2.0, straightness=0.5, dimension=300)
    path = sample_null_paths(shape, kind, n=1, generator=torch.Generator().manual_seed(0))[0]  # pyright: ignore[reportArgumentType]
    gram = gram_of_path(path)
    assert float(gram[0, 0].sqrt()) == pytest.approx(2.0)
    expected = lengths * (torch.linspace(1, 0, 121).double()[:-1] if kind == "decay" else 1)
    np.testing.assert_allclose(step_lengths(gram), expected, rtol=1e-6)
    kept = {"growth": 1.0, "random_walk": 0.0}.get(kind, 0.5)
    assert float(step_cosines(gram).diagonal(1).median()) == pytest.approx(kept, abs=0.05)


@pytest.mark.parametrize("dimension", [2, 7, 400])
def test_null_directions_have_the_cosines_of_isotropic_noise(dimension: int):
    shape = PathShape(
        lengths=torch.ones(100).double(),
        steps=torch.arange(101),
        start=0.0,
        straightness=0.0,
        dimension=dimension,
    )
    path = sample_null_paths(shape, "random_walk", n=1, generator=torch.Generator().manual_seed(3))[
        0
    ]
    cosines = step_cosines(gram_of_path(path))
    off = cosines[~torch.eye(100, dtype=torch.bool)]
    assert float(off.square().mean()) == pytest.approx(1 / dimension, rel=0.15)
    assert float(off.mean()) == pytest.approx(0, abs=3 / math.sqrt(100 * dimension))


def test_the_shape_of_a_path_is_what_was_planted():
    generator = torch.Generator().manual_seed(0)
    shape = PathShape(
        lengths=torch.linspace(2, 1, 150).double(),
        steps=torch.arange(151),
        start=1.0,
        straightness=0.4,
        dimension=90,
    )
    path = sample_null_paths(shape, "straight", n=1, generator=generator)[0]
    found = shape_of_path(gram_of_path(path), shape.steps, width=5000)
    np.testing.assert_allclose(found.lengths, shape.lengths, rtol=1e-9)
    assert found.start == pytest.approx(1.0)
    assert found.straightness == pytest.approx(0.4, abs=0.04)
    assert found.dimension == pytest.approx(90, rel=0.25)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_many_paths_at_once_have_the_prominences_of_each(kind: NullKind, normalised: bool):
    lengths = torch.linspace(1, 0.01, 60).double()
    steps = torch.arange(61)
    shape = PathShape(lengths=lengths, steps=steps, start=0.0, straightness=0.6, dimension=9)
    generator = torch.Generator().manual_seed(5)
    paths = sample_null_paths(shape, kind, n=4, generator=generator)
    for threshold in (0.0, 0.1, 5.0):
        bends = BendSettings(window=4, threshold=threshold, normalised=normalised)
        found = prominences_of_paths(paths, steps, bends)
        each = [measure_bends(gram_of_path(path), steps, bends) for path in paths]
        expected = [one.prominence if len(one.cosine) else 0.0 for one in each]
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert found.tolist() == [0.0] * 4
    assert len({round(float(x), 9) for x in paths[:, -1, 0]}) == (1 if kind == "growth" else 4)


def test_null_prominences_repeat_with_their_seed_and_bound_each_kind():
    path = sample_turn(120, width=576, at=60, noise=0.1)
    gram, steps = gram_of_path(path), torch.arange(120)
    settings = BendSettings(window=5, threshold=0.03)
    first, again = (
        null_prominences(gram, steps, settings, width=576, n=20, seed=4) for _ in range(2)
    )
    assert set(first) == set(KINDS)
    for kind in KINDS:
        assert torch.equal(first[kind], again[kind])
        assert float(first[kind].max()) < 0.6
    assert float(first["growth"].max()) < 1e-6
    own = local_cosine(gram, steps, window=5, threshold=0.03)
    assert own.prominence > 0.9


def test_bad_paths_are_refused():
    gram, steps = gram_of_path(walk(6, 3)), torch.arange(6)
    with pytest.raises(ValueError, match="window: got 0"):
        local_cosine(gram, steps, window=0, threshold=0.0)
    with pytest.raises(ValueError, match="threshold: got -1"):
        local_cosine(gram, steps, window=1, threshold=-1.0)
    with pytest.raises(ValueError, match="ascending"):
        local_cosine(gram, steps.flip(0), window=1, threshold=0.0)
    with pytest.raises(WidthError, match="5 steps"):
        inspect.unwrap(local_cosine)(gram, steps[:5], window=1, threshold=0.0)
    with pytest.raises(NonFiniteError, match="vectors"):
        gram_of_path(torch.full((3, 2), math.nan))
