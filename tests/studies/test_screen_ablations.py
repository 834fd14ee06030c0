"""Screens on tiny pairs beside folded weights and plain passes, and what is picked from them."""

import dataclasses

import pytest
import torch

from emlens.data import ContrastTexts
from emlens.directions import sample_directions
from emlens.interventions import ablate_direction, fold_into_weights
from emlens.models import load_adapter
from emlens.models.pair import ModelPair, load_pair
from emlens.models.views import lay_views
from emlens.results import load_result
from emlens.studies.effects import measure_odds
from emlens.studies.screen_ablations import (
    AblationScreen,
    ScreenedAblation,
    find_median,
    find_strongest,
    screen_ablations,
)
from emlens.vectors import Direction
from tests.activations.chats import make_chats, token_ids
from tests.interventions.vectors import make_direction
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

TEXTS = ContrastTexts(positive=tuple(make_chats(3, seed=1)), negative=tuple(make_chats(2, seed=2)))
NEUTRAL = make_chats(4, seed=3)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    base = lay_views(make_tiny("llama"), make_tokenizer())
    return load_pair(base, load_adapter(make_peft("llama")))


def log_probabilities(model, chat):
    """Of each response token, by one plain pass: [response, d_vocab] and the tokens."""
    ids, start, stop = token_ids(chat)
    logits = model(torch.tensor([ids]))[0, start - 1 : stop - 1]
    return logits.double().log_softmax(-1), torch.tensor(ids[start:stop])


@torch.no_grad()
def kl_by_hand(model, other):
    parts = []
    for chat in NEUTRAL:
        p, q = (log_probabilities(one, chat)[0] for one in (model, other))
        parts.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(parts).mean())


@torch.no_grad()
def odds_by_hand(model):
    means = []
    for chats in (TEXTS.positive, TEXTS.negative):
        each = []
        for chat in chats:
            log_p, tokens = log_probabilities(model, chat)
            each.append(log_p.gather(1, tokens[:, None]).mean())
        means.append(torch.stack(each).mean())
    return float(means[0] - means[1])


@pytest.fixture(scope="module")
def groups(pair) -> dict[str, tuple[Direction, ...]]:
    own = make_direction(pair.tuned)
    drawn = sample_directions(own, n=2, seed=0)
    return {"own": (own,), "isotropic": tuple(one[own.site] for one in drawn)}


def test_each_ablation_is_that_of_weights_without_the_direction(pair, groups):
    screen = screen_ablations(pair, groups, at="writes", texts=TEXTS, neutral=NEUTRAL)
    assert screen.odds_before == pytest.approx(odds_by_hand(pair.tuned), abs=1e-5)
    directions = [one for some in groups.values() for one in some]
    assert len(screen.ablations) == len(directions) == 3
    for found, direction in zip(screen.ablations, directions, strict=True):
        folded = fold_into_weights(pair.tuned, ablate_direction(direction, at="writes"))
        assert found.kl == pytest.approx(kl_by_hand(pair.tuned, folded), rel=1e-3, abs=1e-7)
        assert found.odds == pytest.approx(odds_by_hand(folded), abs=1e-5)
        assert found.kl > 1e-6


def test_the_pair_is_left_as_it_was(pair, groups):
    ids = torch.tensor([token_ids(NEUTRAL[0])[0]])
    before = pair.tuned(ids), pair.base(ids)
    screen_ablations(pair, groups, at="resid_post", texts=TEXTS, neutral=NEUTRAL)
    assert torch.equal(pair.tuned(ids), before[0])
    assert torch.equal(pair.base(ids), before[1])


def test_no_direction_is_an_error(pair):
    with pytest.raises(ValueError, match="groups: got no direction"):
        screen_ablations(pair, {"own": ()}, at="writes", texts=TEXTS, neutral=NEUTRAL)


def test_odds_need_both_classes(pair):
    alone = ContrastTexts(positive=TEXTS.positive)
    with pytest.raises(ValueError, match="3 positive and 0 negative"):
        measure_odds(pair.tuned, (), alone)


def one(number, odds, kl=1.0, group="random"):
    return ScreenedAblation(group=group, number=number, site="resid_post.1", kl=kl, odds=odds)


def screen_of(*ablations):
    return AblationScreen(model="m", odds_before=0.5, ablations=ablations)


def test_median_and_strongest_are_by_odds():
    found = [one(0, 0.3), one(1, -0.7), one(2, 0.1), one(3, 0.0)]
    assert find_strongest(found).number == 1
    assert find_median(found).number == 3
    assert find_median(found[:3]).number == 2


def test_near_in_kl_is_a_ratio_either_way():
    screen = screen_of(one(0, 0.0, 0.79), one(1, 0.0, 0.81), one(2, 0.0, 1.24), one(3, 0.0, 1.26))
    near = screen.with_kl_near(1.0, group="random")
    assert [found.number for found in near] == [1, 2]
    assert screen.with_kl_near(0.0, group="random") == ()


def test_an_unknown_group_is_named():
    with pytest.raises(KeyError, match="'shuffled'; expected one of random"):
        screen_of(one(0, 0.0)).group("shuffled")


def test_rows_say_how_the_odds_changed():
    rows = screen_of(one(0, 0.2)).rows()
    assert rows[0]["odds_change"] == pytest.approx(-0.3)
    assert rows[0]["group"] == "random"


def test_a_screen_survives_a_file(tmp_path):
    screen = screen_of(one(0, 0.2), dataclasses.replace(one(1, 0.1), group="own"))
    assert load_result(screen.save(tmp_path / "screen")) == screen
