"""Sign flips against scipy's permutation test, exact enumeration, and rates among nulls."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats

from emlens.numerics.false_discovery import adjust_p_values
from emlens.numerics.pareto_tail import fit_pareto_tail
from emlens.numerics.sign_flips import METHODS, draw_signs, flip_signs, smallest_p
from emlens.numerics.validation import NonFiniteError, WidthError


def methods_of(found) -> list[str]:
    return [METHODS[i] for i in found.method.tolist()]


def enumerate_sums(d: np.ndarray) -> np.ndarray:
    """|sum s d| for every sign vector with the first sign kept."""
    sums = np.array([d[0]])
    for value in d[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return np.abs(sums)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from([-2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 1.7]), min_size=2, max_size=9
    ).filter(any)
)
def test_few_units_give_scipys_exact_permutation_p(values: list[float]):
    d = np.array(values)
    theirs = stats.permutation_test(
        (d, np.zeros_like(d)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=1 << 10,  # more than there are, so all are tried
        vectorized=True,
    )
    ours = flip_signs(torch.tensor(d)[:, None], draw_signs(len(d), seed=0))
    assert methods_of(ours) == ["exact"]
    assert float(ours.p_value) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_t_is_scipys_and_columns_do_not_meet():
    d = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = flip_signs(d, draw_signs(40, seed=0))
    test: Any = stats.ttest_1samp(d.numpy(), 0.0)
    np.testing.assert_allclose(found.t, test.statistic, rtol=1e-12)
    # Normal differences: the two tests ask the same, up to the flips' own noise.
    np.testing.assert_allclose(found.p_value, test.pvalue, atol=0.02)
    alone = [flip_signs(d[:, [k]], draw_signs(40, seed=0)) for k in range(5)]
    assert found.p_value.tolist() == [float(one.p_value) for one in alone]


def test_no_difference_gives_p_one_and_t_zero():
    d = torch.zeros(30, 2)
    d[:, 1] = torch.arange(30) - 14.5
    found = flip_signs(d, draw_signs(30, seed=0))
    assert methods_of(found) == ["no difference", "sampled"]
    assert (float(found.p_value[0]), float(found.t[0])) == (1.0, 0.0)
    assert found.p_value[1] > 0.9


def test_units_that_do_not_differ_change_no_p_value():
    d = torch.tensor([[1.0], [2.0], [4.0], [-0.5], [3.0]])
    padded = torch.cat([d, torch.zeros(200, 1)])
    few = flip_signs(d, draw_signs(5, seed=0))
    many = flip_signs(padded, draw_signs(205, seed=0))
    assert float(few.p_value) == float(many.p_value)
    assert methods_of(many) == ["exact"]


@pytest.mark.parametrize(("n", "method"), [(13, "exact"), (14, "generalised Pareto tail")])
def test_all_of_one_sign_gives_the_smallest_p_there_is(n: int, method: str):
    d = torch.linspace(1, 2, n)[:, None]
    found = flip_signs(d, draw_signs(n, seed=0))
    assert methods_of(found) == [method]
    assert float(found.p_value) == pytest.approx(smallest_p(n), rel=1e-12 if n == 13 else 4)
    assert float(found.p_value) >= smallest_p(n)


@pytest.mark.parametrize("target", [3e-4, 1e-4, 2e-5])
def test_the_tail_is_near_the_exact_p_where_that_can_be_computed(target: float):
    """20 units: half a million sums, of which the observed one is chosen by its rank."""
    generator = np.random.default_rng(3)
    shapes = [generator.normal, generator.exponential, generator.uniform]
    columns, exact = [], []
    for draw, _ in itertools.product(shapes, range(4)):
        d = np.abs(draw(size=20))
        sums = enumerate_sums(d)
        wanted = np.sort(sums)[-max(1, round(target * len(sums)))]
        bits = int(np.flatnonzero(np.isclose(sums, wanted, rtol=0, atol=1e-12))[0])
        # The sums that subtract come last, so that the last value has the highest bit.
        signs = [1, *[1 - 2 * (bits >> k & 1) for k in range(19)]]
        columns.append(d * np.array(signs))
        exact.append(float(np.mean(sums >= abs(columns[-1].sum()) - 1e-9)))
    found = flip_signs(torch.tensor(np.array(columns).T), draw_signs(20, seed=1))
    assert exact == pytest.approx([target] * len(exact), rel=0.2)
    tail = [m == "generalised Pareto tail" for m in methods_of(found)]
    assert sum(tail) >= 10
    errors = np.log10(found.p_value.numpy()[tail] / np.array(exact)[tail])
    assert abs(np.median(errors)) < 0.3
    assert np.abs(errors).max() < {3e-4: 0.5, 1e-4: 0.8, 2e-5: 1.3}[target]


def test_few_flips_fit_no_tail():
    d = torch.linspace(1, 2, 40)[:, None]
    found = flip_signs(d, draw_signs(40, seed=0, flips=2000))
    assert methods_of(found) == ["sampled"]
    assert float(found.p_value) == 1 / 2001


def test_tail_of_a_pareto_sample_is_scipys():
    scale, shape = 2.0, -0.15
    sums = np.sort(stats.genpareto.rvs(shape, scale=scale, size=200_000, random_state=0))
    top = torch.tensor(sums[::-1][:20_001].copy())[:, None]
    tail = fit_pareto_tail(
        top, n=len(sums), largest=torch.tensor([-scale / shape], dtype=torch.float64)
    )
    assert float(tail.shape) == pytest.approx(shape, abs=0.02)
    for quantile in (0.92, 0.99, 0.9999):
        at = stats.genpareto.ppf(quantile, shape, scale=scale)
        found = float(tail.survival(torch.tensor([at], dtype=torch.float64)))
        assert found == pytest.approx(1 - quantile, rel=0.25)


def test_a_tail_gives_no_possible_sum_probability_zero():
    top = torch.linspace(1.0, 0.0, 251, dtype=torch.float64)[:, None]  # uniform: it ends at 1
    largest = torch.tensor([5.0], dtype=torch.float64)
    tail = fit_pareto_tail(top, n=10_000, largest=largest)
    assert float(tail.survival(largest * 0.99)) > 0
    free = fit_pareto_tail(top, n=10_000, largest=torch.tensor([1.0], dtype=torch.float64))
    assert float(free.survival(largest * 0.99)) == 0


def test_nulls_hold_the_false_discovery_rate():
    """100 experiments of 200 latents on 30 prompts; in half of them 20 latents truly differ."""
    generator = torch.Generator().manual_seed(0)
    prompts, latents, experiments = 30, 200, 100
    d = torch.randn(prompts, experiments, latents, generator=generator, dtype=torch.float64)
    d = d.pow(3)  # heavy tails, symmetric
    d[:, 50:, :20] += 3.0
    signs = draw_signs(prompts, seed=1, flips=4000)
    p = flip_signs(d.flatten(1), signs).p_value.unflatten(0, (experiments, latents))
    q = torch.stack([adjust_p_values(row) for row in p])
    false_alarms = (q[:50] <= 0.05).any(1).double().mean()
    assert false_alarms <= 0.12  # .05 expected, 50 experiments
    called = q[50:] <= 0.05
    shares = called[:, 20:].sum(1) / called.sum(1).clamp(min=1)
    assert float(shares.mean()) <= 0.08
    assert float(called[:, :20].double().mean()) > 0.3  # and the planted ones are found
    assert float((p[:50] <= 0.05).double().mean()) == pytest.approx(0.05, abs=0.01)


def test_the_same_seed_gives_the_same_signs_and_both_come_alike():
    signs = draw_signs(50, seed=4)
    assert torch.equal(signs, draw_signs(50, seed=4))
    assert not torch.equal(signs, draw_signs(50, seed=5))
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(float(signs.double().mean())) < 4 / math.sqrt(signs.numel())


def test_what_cannot_be_tested_is_refused():
    signs = draw_signs(3, seed=0)
    with pytest.raises(NonFiniteError, match="differences"):
        flip_signs(torch.tensor([[1.0], [math.nan], [0.0]]), signs)
    with pytest.raises((WidthError, TypeCheckError), match=r"number of units is 4|'signs'"):
        flip_signs(torch.ones(4, 1), signs)
    with pytest.raises(ValueError, match="at least one of each"):
        draw_signs(0, seed=0)
    alone = flip_signs(torch.ones(1, 1), draw_signs(1, seed=0))
    assert float(alone.p_value) == 1.0
    assert bool(alone.t.isnan().all())
