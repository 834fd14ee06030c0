"""Orders of latents, contrasts of fine-tunes with their twins; planted, exact, refused."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from emlens.features import FeatureContrast, FeatureRanking, contrast_features, rank_features
from emlens.numerics.validation import NonFiniteError
from emlens.results import load_result
from tests.features.comparisons import make_diff


def draw(n: int, d_sae: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_sae, generator=generator, dtype=torch.float64)


def test_both_ends_of_an_order_are_reached():
    diff = make_diff("a", torch.tensor([0.5, -2.0, 3.0, 0.0, -0.1]))
    ranking = rank_features(diff, by="delta")
    assert ranking.latents.tolist() == [2, 0, 3, 4, 1]
    assert (ranking.top(2), ranking.bottom(2)) == ([2, 0], [1, 4])
    assert (ranking.rank_of(2), ranking.rank_of(1)) == (1, 5)
    assert rank_features(diff, by="abs_delta").top(3) == [2, 1, 0]
    with pytest.raises(ValueError, match="n: got 6, expected 1 to 5"):
        ranking.top(6)
    with pytest.raises(ValueError, match="latent: 9"):
        ranking.rank_of(9)


def test_several_fine_tunes_are_averaged_and_some_left_out():
    deltas = draw(3, 8)
    diffs = [make_diff(name, row) for name, row in zip("abc", deltas, strict=True)]
    everything = rank_features(diffs, by="delta")
    np.testing.assert_array_equal(everything.latents, np.argsort(-deltas.mean(0).numpy()))
    assert everything.models == ("a", "b", "c")
    without = rank_features(diffs, by="abs_delta", leave_out=["b"])
    mean = deltas[[0, 2]].mean(0).abs()
    np.testing.assert_allclose(without.scores, np.sort(mean.numpy())[::-1])
    assert (without.models, without.left_out) == (("a", "c"), ("b",))
    poor = make_diff("d", deltas[0], explained=0.5)
    assert rank_features([*diffs, poor], by="t").underpowered
    assert not rank_features([*diffs, poor], by="t", leave_out=["d"]).underpowered


def test_orders_that_cannot_be_made_are_refused():
    diff = make_diff("a", torch.zeros(3))
    with pytest.raises(ValueError, match="attribute_features"):
        rank_features(diff, by="attribution")
    with pytest.raises(ValueError, match="nearest: abc"):
        rank_features([make_diff("abc", torch.zeros(3))], by="t", leave_out=["abd"])
    with pytest.raises(ValueError, match="nothing is left of 1"):
        rank_features(diff, by="t", leave_out=["a"])
    with pytest.raises(ValueError, match=r"leave_out: got one str.*\['a'\]"):
        rank_features(diff, by="t", leave_out="a")
    with pytest.raises(NonFiniteError, match="delta"):
        rank_features(make_diff("b", torch.tensor([0.0, torch.nan, 1.0])), by="abs_delta")
    other = make_diff("b", torch.zeros(3), codec_fingerprint="another")
    with pytest.raises(ValueError, match="codec_fingerprint is 'c' for a and 'another' for b"):
        rank_features([diff, other], by="delta")
    with pytest.raises(ValueError, match="rise"):
        FeatureRanking(
            by="t",
            latents=torch.arange(2),
            scores=torch.tensor([1.0, 2.0]),
            codec="",
            codec_fingerprint="",
            models=(),
        )


def make_pairs(n: int, *, planted: float, seed: int = 0, d_sae: int = 60):
    """Harmful fine-tunes and their twins: much that both change, and a latent that harm does."""
    shared = 5 * draw(1, d_sae, seed) + draw(n, d_sae, seed + 1)
    harmful, careful = shared + draw(n, d_sae, seed + 2), shared + draw(n, d_sae, seed + 3)
    harmful[:, 7] += planted
    return (
        [make_diff(f"harmful {k}", row) for k, row in enumerate(harmful)],
        [make_diff(f"careful {k}", row) for k, row in enumerate(careful)],
    )


def test_a_latent_that_harm_alone_moves_is_found_among_many_that_any_fine_tune_does():
    harmful, careful = make_pairs(12, planted=6.0)
    found = contrast_features(harmful, careful)
    assert int(found.contrast.argmax()) == 7
    assert float(found.q_value[7]) < 0.05
    assert int((found.q_value < 0.05).sum()) == 1
    assert rank_features(harmful, by="abs_delta").top(1) != [7]
    gaps = [h.delta - c.delta for h, c in zip(harmful, careful, strict=True)]
    test: Any = stats.ttest_1samp(torch.stack(gaps).numpy(), 0)
    np.testing.assert_allclose(found.t, test.statistic)
    assert int(found.pairs_agreeing[7]) == 12


@pytest.mark.parametrize(("n", "smallest"), [(1, 1.0), (3, 0.25), (6, 0.03125)])
def test_few_pairs_say_how_small_a_p_value_can_be(n: int, smallest: float):
    found = contrast_features(*make_pairs(n, planted=500.0))
    assert found.smallest_p == smallest
    assert float(found.p_value[7]) == smallest == float(found.p_value.min())
    assert found.can_find == (n >= 6)
    assert found.rows()[0]["latent"] == 7
    assert found.rows()[0]["pairs_agreeing"] == f"{n} of {n}"


def test_among_twins_that_do_not_differ_little_is_found():
    called = 0
    for seed in range(20):
        found = contrast_features(*make_pairs(10, planted=0.0, seed=100 * seed, d_sae=40))
        called += bool((found.q_value <= 0.05).any())
    assert called <= 4  # one expected


def test_latents_that_hardly_fire_are_not_tested():
    fired = torch.tensor([12, 11, 0])
    pairs = [
        [make_diff(f"{name} {k}", draw(1, 3, 7 * k)[0], prompts_fired=fired) for k in range(6)]
        for name in ("harmful", "careful")
    ]
    found = contrast_features(*pairs)
    assert found.p_value.isnan().tolist() == [False, True, True]
    assert found.q_value.isnan().tolist() == [False, True, True]


def test_what_are_no_pairs_of_twins_is_refused():
    harmful, careful = make_pairs(3, planted=1.0)
    with pytest.raises(ValueError, match="got 2 for 3 harmful"):
        contrast_features(harmful, careful[:2])
    with pytest.raises(ValueError, match="'harmful 0' comes more than once"):
        contrast_features(harmful, [harmful[0], *careful[1:]])
    elsewhere = make_diff("careful 9", torch.zeros(60), prompts=("other",))
    with pytest.raises(ValueError, match="other prompts than harmful 0"):
        contrast_features(harmful, [*careful[:2], elsewhere])
    with pytest.raises(NonFiniteError):
        contrast_features([make_diff("h", torch.full((60,), torch.nan))], careful[:1])


def test_rankings_and_contrasts_survive_saving(tmp_path):
    harmful, careful = make_pairs(2, planted=1.0)
    found = contrast_features(harmful, careful)
    again = load_result(found.save(tmp_path / "contrast"))
    assert isinstance(again, FeatureContrast)
    assert again.rows() == found.rows()
    ranking = rank_features(harmful, by="t")
    loaded = load_result(ranking.save(tmp_path / "ranking"))
    assert isinstance(loaded, FeatureRanking)
    assert loaded.rows() == ranking.rows()
