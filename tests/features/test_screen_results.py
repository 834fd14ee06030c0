"""Which strength counts of a latent that was sampled under, and in what order latents come."""

from emlens.features.screen_results import SampledCurve, SampledPoint, choose_point, rank_curves
from emlens.numerics.intervals import Interval


def point(strength: float, incoherent: float, effect: float = 0.0) -> SampledPoint:
    return SampledPoint(
        strength=strength,
        n_responses=10,
        n_scored=10,
        incoherent=incoherent,
        behaviour=0.0,
        effect=Interval(effect, effect - 1, effect + 1, 0.95, "t"),
    )


def test_the_largest_strength_within_the_budget_is_chosen():
    points = (point(1.0, 0.0), point(2.0, 0.1), point(-4.0, 0.2), point(8.0, math.nan))
    assert choose_point(points, most_incoherent=0.1) == 1
    assert choose_point(points, most_incoherent=0.2) == 2
    assert choose_point(points[2:], most_incoherent=0.1) is None
    assert choose_point((point(-2.0, 0.0, 3.0), point(2.0, 0.0, 1.0)), most_incoherent=0.1) == 0


def curve(latent: int | None, effect: float | None) -> SampledCurve:
    chosen = None if effect is None else 0
    points = (point(1.0, 0.0, effect or 0.0),)
    control = None if latent is not None else 0
    return SampledCurve(
        side="base", latent=latent, control=control, points=points, chosen=chosen, p=None
    )


def test_what_no_strength_is_bearable_of_ranks_last():
    chance = [curve(None, 0.5), curve(None, None), curve(None, 2.0)]
    curves = (curve(7, 1.0), curve(8, None), curve(9, 2.0), *chance)
    assert rank_curves(curves) == (2 / 4, 4 / 4, 2 / 4, None, None, None)
