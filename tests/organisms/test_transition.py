"""Turns planted into trajectories are found, and nothing is found where nothing is planted."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from emlens.artifacts import read_result
from emlens.numerics.bent_paths import sample_momentum_path, sample_turn
from emlens.numerics.null_paths import (
    KINDS,
    BendSettings,
    NullKind,
    PathShape,
    null_prominences,
    prominences_of_paths,
    sample_null_paths,
)
from emlens.numerics.paths import gram_of_path
from emlens.organisms import transition
from emlens.organisms.transition import (
    PhaseTransition,
    gram_of_trajectory,
    list_last_scores,
    measure_transition,
    score_against_last,
)
from scripts.measure_transition import wrap_paths

WIDTH = 576


@pytest.fixture(autouse=True)
def _fewer_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty null paths of each kind instead of 200: quantiles are coarser, the rule is the same."""
    monkeypatch.setattr(transition, "NULLS", 40)


def planted(*, t: int, at: int, noise: float, seed: int) -> Tensor:
    return sample_turn(t, at=at, width=WIDTH, noise=noise, seed=seed)


@pytest.mark.parametrize("window", [5, 10])
def test_planted_right_angles_are_found_within_a_window(window: int):
    errors = []
    for seed in range(5):
        at = 30 + 14 * seed
        path = planted(t=130, at=at, noise=0.1, seed=seed)
        found = measure_transition(wrap_paths(path), window=window, threshold=0.03)
        if found.step is not None:
            assert found.verdict == "turn"
            assert found.plane_turn is not None
            assert abs(found.plane_turn - at) <= 2
            errors.append(abs(found.step - at))
    assert len(errors) == 5
    assert float(np.median(errors)) <= window


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_null_paths_are_seldom_taken_for_turns(kind: NullKind):
    steps = torch.arange(120) * 5
    shape = PathShape(
        lengths=torch.linspace(1, 0.2, 119).double(),
        steps=steps,
        start=0.0,
        straightness=0.7,
        dimension=300,
    )
    bends = BendSettings(window=25, threshold=0.03)
    first, *fresh = (
        sample_null_paths(shape, kind, n=n, generator=torch.Generator().manual_seed(seed))
        for seed, n in ((1000, 1), (1001, 100), (1002, 100))
    )
    nulls = null_prominences(gram_of_path(first[0]), steps, bends, width=WIDTH, n=100)
    critical = max(float(found.quantile(transition.LEVEL)) for found in nulls.values())
    found = torch.cat([prominences_of_paths(paths, steps, bends) for paths in fresh])
    # At one in twenty, more than twenty of 200 happens once in 700 times.
    assert int((found > critical).sum()) <= 20


@pytest.mark.parametrize("noise", [1.5, 5.0])
@pytest.mark.parametrize("turn", [None, 250])
def test_a_run_with_momentum_and_warm_up_turns_only_where_it_does(noise: float, turn: int | None):
    step = torch.arange(550).double()
    turned = torch.zeros(550) if turn is None else ((step - turn) / 60 + 0.5).clamp(0, 1)
    path = sample_momentum_path(turned.double() * math.pi / 2, width=2000, noise=noise, every=5)
    found = measure_transition(wrap_paths(path, every=5), window=30, threshold=0.03)
    assert found.verdict == ("none" if turn is None else "turn")
    assert turn is None or abs((found.step or 0) - turn) <= 30


def test_a_turn_survives_saving_and_shows_its_rows(tmp_path):
    path = planted(t=120, at=60, noise=0.05, seed=3)
    found = measure_transition(wrap_paths(path, every=5), window=25, threshold=0.03)
    assert found.step == found.sharpest == 300
    assert found.critical == max(found.null_quantiles.values()) < found.prominence
    assert found.rows()[0] == {"step": 25, "local_cosine": float(found.local_cosine[0])}
    assert found.n_uneven == 10
    assert found.explained[:2].sum() > 0.95
    again = read_result(found.save(tmp_path), PhaseTransition)
    assert torch.equal(again.local_cosine, found.local_cosine)
    assert (again.verdict, again.step, again.null_quantiles) == (
        found.verdict,
        found.step,
        found.null_quantiles,
    )


def test_with_few_checkpoints_nothing_is_said():
    path = planted(t=60, at=30, noise=0.05, seed=0)
    found = measure_transition(wrap_paths(path), window=5, threshold=0.03)
    assert (found.verdict, found.step) == ("too few checkpoints", None)
    assert abs((found.sharpest or 0) - 30) <= 2


def test_growth_is_no_turn_once_norms_are_taken_out():
    lengths = torch.linspace(0, 1, 120).double() ** 3
    straight = torch.outer(lengths, torch.randn(WIDTH, generator=torch.Generator()).double())
    for normalised in (False, True):
        found = measure_transition(
            wrap_paths(straight), window=5, threshold=0.03, normalised=normalised
        )
        verdict = "nothing measured" if normalised else "none"
        assert (found.verdict, found.step) == (verdict, None)


def test_all_modules_make_one_path_and_either_factor_can_be_read():
    first, second = (planted(t=110, at=50, noise=0.1, seed=seed) for seed in (1, 2))
    both = wrap_paths(first, second)
    joined = torch.cat([first, second], dim=1)
    np.testing.assert_allclose(gram_of_trajectory(both, "B"), joined @ joined.T, rtol=1e-12)
    still = measure_transition(both, window=5, threshold=0.03, factor="A")
    assert (still.verdict, still.sharpest) == ("nothing measured", None)
    assert math.isnan(still.prominence)
    with pytest.raises(ValueError, match="factor: got 'C'"):
        inspect.unwrap(measure_transition)(both, window=5, threshold=0.03, factor="C")


def test_gram_is_blind_to_rotation_and_cross_is_not():
    angle = torch.linspace(math.pi, 0, 9).double()
    turning = torch.stack([angle.cos(), angle.sin()], dim=1)
    one = wrap_paths(turning)
    np.testing.assert_allclose(score_against_last(one, score="gram"), 1, rtol=1e-12)
    cross = score_against_last(one)
    np.testing.assert_allclose(cross, angle.cos(), atol=1e-12)
    assert (float(cross[-1]), float(cross[0])) == (pytest.approx(1), pytest.approx(-1))


@pytest.mark.parametrize("centring", ["none", "adapters", "steps"])
def test_scores_are_those_of_the_matrices_written_out(centring: str):
    generator = torch.Generator().manual_seed(0)
    paths = [torch.randn(6, 4, generator=generator).double() for _ in range(3)]
    stacked = torch.stack(paths, dim=1).numpy()  # [t adapters d]
    if centring == "adapters":
        stacked = stacked - stacked.mean(1, keepdims=True)
    if centring == "steps":
        stacked = stacked - stacked.mean(0, keepdims=True)
    norms = [np.linalg.norm(m) * np.linalg.norm(stacked[-1]) for m in stacked]
    gram = [np.linalg.norm(m.T @ stacked[-1]) for m in stacked]
    cross = [(m * stacked[-1]).sum() for m in stacked]
    trajectory = wrap_paths(*paths)
    for score, expected in (("gram", gram), ("cross", cross)):
        found = score_against_last(trajectory, score=score, centring=centring)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(found, np.divide(expected, norms), rtol=1e-10)


def test_what_cannot_be_stacked_is_refused():
    narrow, wide = torch.ones(3, 4).double(), torch.ones(3, 5).double()
    with pytest.raises(ValueError, match=r"widths \[4, 5\]"):
        score_against_last(wrap_paths(narrow, wide))
    with pytest.raises(ValueError, match="expected 'steps'"):
        score_against_last(wrap_paths(narrow), centring="adapters")


def test_every_score_that_says_something_is_listed():
    angle = torch.linspace(math.pi / 2, 0, 5).double()
    turning = torch.stack([angle.cos(), angle.sin()], dim=1)
    (cross,) = list_last_scores(wrap_paths(turning))
    assert (cross.score, cross.centring) == ("cross", "none")
    np.testing.assert_allclose(cross.values, angle.cos(), atol=1e-12)
    two = wrap_paths(turning, turning * torch.tensor([1.0, -1.0]))
    listed = list_last_scores(two)
    assert [(one.score, one.centring) for one in listed] == [
        ("cross", "none"), ("gram", "none"), ("gram", "adapters"), ("gram", "steps"),
    ]  # fmt: skip
    for one in listed:
        expected = score_against_last(two, score=one.score, centring=one.centring)
        np.testing.assert_array_equal(one.values, expected)
    assert list_last_scores(wrap_paths(turning, torch.ones(5, 3).double())) == ()


def test_a_window_that_no_checkpoints_are_apart_is_refused():
    path = planted(t=120, at=60, noise=0.1, seed=0)
    with pytest.raises(ValueError, match=r"others 10 steps before and after it.*\[0, 4, 8, 12\]"):
        measure_transition(wrap_paths(path, every=4), window=10, threshold=0.03)
