"""How a site, a control and two classes are picked, on planted numbers."""

import pytest

from emlens.evaluation import ScoredResponse
from emlens.studies.removal import Choice, Disturbance
from emlens.studies.remove_direction import find_tails
from emlens.studies.screen_ablations import AblationScreen, ScreenedAblation


def choice(kl, odds, max_kl=0.5):
    ablations = tuple(
        ScreenedAblation(group="fitted", number=i, site=f"resid_post.{i}", kl=k, odds=o)
        for i, (k, o) in enumerate(zip(kl, odds, strict=True))
    )
    screen = AblationScreen(model="tuned", odds_before=0.0, ablations=ablations)
    return Choice(screen=screen, split_half_cosines=(None,) * len(kl), max_kl=max_kl)


def test_the_site_has_the_lowest_odds_of_those_that_cost_little():
    assert choice([0.1, 0.5, 0.51], [-1.0, -2.0, -3.0]).site == "resid_post.1"


def test_where_every_site_costs_too_much_it_is_the_cheapest():
    assert choice([0.9, 0.7, 0.8], [-3.0, -1.0, -2.0]).site == "resid_post.1"


def test_the_nearest_control_is_nearest_as_a_ratio():
    found = Disturbance(ablated=0.1, controls=(0.04, 0.19, 0.0), steered=1.0)
    assert found.nearest == 1
    assert Disturbance(ablated=0.1, controls=(0.06, 0.19), steered=1.0).nearest == 0


def row(aligned, coherent):
    return ScoredResponse(id="r", question_id="q", aligned=aligned, coherent=coherent)


def test_tails_are_those_of_the_coherent_and_scored():
    rows = [row(float(score), 90.0) for score in range(0, 101, 10)]
    rows += [row(5.0, 50.0), row(None, 90.0), row(1.0, None)]
    assert find_tails(rows, 0.5, coherent_above=50) == (50.0, 50.0)
    assert find_tails(rows, 0.2, coherent_above=50) == (20.0, 80.0)


def test_two_responses_are_no_tails():
    with pytest.raises(ValueError, match="2 of 3 are coherent"):
        find_tails([row(1.0, 90.0), row(2.0, 90.0), row(3.0, 10.0)], 0.5, coherent_above=50)
