"""Screens of tiny pairs with a planted latent, resumed and refused, beside passes done by hand."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from emlens.codecs import CodecError
from emlens.data import BehaviourScores, Chat, ContrastTexts, Message
from emlens.features import sampled_screen
from emlens.features.forced_screen import ForcedStage
from emlens.features.screen import screen_features
from emlens.features.screen_results import (
    FeatureScreen,
    SampledCurve,
    SampledPoint,
    choose_point,
    rank_curves,
)
from emlens.features.screen_settings import ScreenSettings
from emlens.interventions import Add, Intervention
from emlens.models import Sampling
from emlens.models.pair import ModelPair
from emlens.numerics.intervals import Interval
from emlens.numerics.validation import NonFiniteError
from emlens.results import load_result
from emlens.runs import PlanChangedError, RunFolder
from emlens.studies.effects import measure_odds
from tests.features.planted import PLANTED, SITE, favoured_words, make_codec, make_pair, make_texts

screen_module = sys.modules[screen_features.__module__]
CODEC = make_codec()
LATENTS = (0, 3, PLANTED, 8, 11)
PROMPTS = [Chat((Message("user", f"w{40 + k} w{50 + k} w{60 + k}"),)) for k in range(4)]
SETTINGS = ScreenSettings(
    strengths=(0.5, 1.0, 4.0),
    units="delta_norm",
    chats=PROMPTS,
    sampling=Sampling(n=2, temperature=0.4, max_new_tokens=6),
    sampled_strengths=(1.0, 4.0),
    n_sampled=2,
    n_controls=16,
)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return make_pair(CODEC)


@pytest.fixture(scope="module", autouse=True)
def remembered() -> Iterator[None]:
    """The same responses are made once for all tests."""
    made: dict[Any, Any] = {}
    generate = sampled_screen.generate_responses

    def answer(model: Any, chats: Any, *, interventions: Any, **more: Any) -> Any:
        vectors = [one.operator.vector.numpy().tobytes() for one in interventions]
        key = (id(model), tuple(chats), tuple(vectors))
        if key not in made:
            made[key] = generate(model, chats, interventions=interventions, **more)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_screen, "generate_responses", answer)
        yield


def make_scores(pair: ModelPair) -> BehaviourScores:
    """The behaviour is the share of favoured words, and everything is coherent."""
    more = set(favoured_words(pair, 40)[0])

    def count(chats: Any) -> list[float | None]:
        said = [chat.response.content.split() for chat in chats]
        return [100 * sum(w in more for w in words) / max(len(words), 1) for words in said]

    return BehaviourScores(
        teacher_forced=lambda _: 1 / 0, sampled=count, coherence=lambda chats: [100.0] * len(chats)
    )


def run(pair: ModelPair, settings: ScreenSettings = SETTINGS, **more: Any) -> FeatureScreen:
    given = {"latents": LATENTS, "texts": make_texts(pair), "scores": make_scores(pair)}
    return screen_features(pair, CODEC, settings=settings, **(given | more))


@pytest.fixture(scope="module")
def screen(pair: ModelPair) -> FeatureScreen:
    return run(pair)


def test_a_screen_says_how_well_its_codec_fits(pair, screen, tmp_path):
    assert screen.health.underpowered  # 12 orthonormal vectors of 24
    assert 0 < float(screen.health.explained_variance.max()) < 0.6
    assert screen.health.positions == "response"
    # Every vector with both signs leaves nothing unsaid.
    both = torch.cat([make_codec(d_sae=24).W_dec, -make_codec(d_sae=24).W_dec])
    whole = make_codec(d_sae=48, W_dec=both, W_enc=both.mT.clone())
    settings = replace(SETTINGS, strengths=(1.0,), sampled_strengths=None, n_sampled=0)

    def look() -> FeatureScreen:
        given = {"latents": (3,), "texts": make_texts(pair), "scores": make_scores(pair)}
        return screen_features(pair, whole, settings=settings, out=tmp_path / "run", **given)

    found = look()
    assert not found.health.underpowered
    assert float(found.health.explained_variance.min()) == pytest.approx(1, abs=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen_module, "check_sae", lambda *_, **__: 1 / 0)
        assert look().to_dict() == found.to_dict()


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_the_planted_latent_comes_first_and_random_directions_do_not(screen, side):
    assert screen.top(1, side=side) == (PLANTED,)
    place = LATENTS.index(PLANTED)
    assert float(screen.forced_p(side)[place]) == pytest.approx(1 / 17)
    effects = screen.forced_effect(side)
    assert float(effects[place]) > 1.5 * float(screen.control_curves(side).max())
    others = [k for k in range(len(LATENTS)) if k != place]
    assert float(screen.forced_p(side)[others].median()) > 0.1
    found = screen.curve(PLANTED, side=side)
    assert found.p == pytest.approx(1 / 17)
    assert found.effect > 5
    chance = [c.effect for c in screen.sampled if c.side == side and c.latent is None]
    assert len(chance) == 16
    assert found.effect > max(chance)


@pytest.mark.parametrize(
    ("plain", "weak", "strong", "chosen"),
    [(0, 0, 1, 0), (0, 0, 0, 1), (2, 2, 3, 0), (3, 3, 3, 1), (0, 2, 2, None)],
)
def test_a_strength_counts_that_costs_little_coherence(pair, plain, weak, strong, chosen):
    calls = iter([plain, plain] + [weak, strong] * 38)

    def judge(chats: Any) -> list[float]:
        lost = next(calls)
        return [50.0] * lost + [50.1] * (len(chats) - lost)

    settings = replace(SETTINGS, max_incoherent=0.1, extra_incoherent=0.1)
    found = run(pair, settings, scores=replace(make_scores(pair), coherence=judge))
    curve = found.curve(PLANTED, side="tuned")
    assert [point.incoherent for point in curve.points] == [weak / 8, strong / 8]
    assert curve.chosen == chosen
    assert found.most_incoherent == pytest.approx((max(0.1, plain / 8 + 0.1),) * 2)
    if chosen is None:
        assert curve.p == 1.0


@torch.no_grad()
def mean_activations(model: Any, texts: ContrastTexts) -> tuple[torch.Tensor, list[float]]:
    """Of the response tokens of all texts, and their norms, one text at a time."""
    found = []
    for chat in (*texts.positive, *texts.negative):
        prompt = model.tokenizer(f"<user> {chat.messages[0].content} <end> <user> ").input_ids
        answer = model.tokenizer(chat.messages[1].content).input_ids
        _, cache = model.run_with_cache(torch.tensor([[*prompt, *answer]]))
        found.append(cache[SITE.hook_name][0, len(prompt) :])
    rows = torch.cat(found).double()
    return rows.mean(0), rows.norm(dim=1).tolist()


def test_units_are_the_norms_of_the_difference_and_of_the_base(pair, screen):
    texts = make_texts(pair)
    base, norms = mean_activations(pair.base, texts)
    tuned, _ = mean_activations(pair.tuned, texts)
    assert screen.unit_norm == pytest.approx(float((tuned - base).norm()), rel=1e-5)
    assert screen.unit_norm == pytest.approx(2.0, rel=1e-4)
    other = run(pair, replace(SETTINGS, units="resid_norm", n_sampled=0))
    median = float(torch.tensor(norms).median())
    assert other.unit_norm == pytest.approx(median, rel=0.02)


@pytest.mark.parametrize(("side", "sign"), [("base", 1), ("tuned", -1)])
def test_a_curve_is_the_change_of_odds_under_the_added_latent(pair, screen, side, sign):
    model, texts = getattr(pair, side), make_texts(pair)
    before = measure_odds(model, (), texts)
    for place, strength in enumerate((0.5, 1.0)):
        vector = sign * strength * screen.unit_norm * CODEC.W_dec[3]
        after = measure_odds(model, [Intervention(SITE, Add(vector))], texts)
        expected = sign * (after - before)
        found = float(screen.forced_curves(side)[LATENTS.index(3), place])
        assert found == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3


def test_behaviour_is_that_of_responses_made_under_the_latent(pair, screen, monkeypatch):
    acting = []

    def watch(model: Any, chats: Any, *, interventions: Any, **more: Any) -> Any:
        acting.append((model, interventions))
        return made(model, chats, interventions=interventions, **more)

    made = sampled_screen.generate_responses
    monkeypatch.setattr(sampled_screen, "generate_responses", watch)
    assert run(pair).to_dict() == screen.to_dict()
    plain = [model for model, interventions in acting if not interventions]
    assert plain == [pair.base, pair.tuned]
    steered = [(m, i.operator.vector) for m, (i,) in (a for a in acting if a[1])]
    assert len(steered) == 2 * 19 * 2
    expected = screen.unit_norm * CODEC.W_dec[PLANTED].double()
    for model, sign in ((pair.base, 1), (pair.tuned, -1)):
        found = [v for m, v in steered if m is model]
        torch.testing.assert_close(found[0], sign * expected, rtol=1e-5, atol=1e-6)
        lengths = torch.stack(found).norm(dim=1) / screen.unit_norm
        assert torch.allclose(lengths, torch.tensor([1.0, 4.0] * 19, dtype=torch.float64))


def test_controls_go_on_by_what_latents_go_on_by(pair):
    found = run(pair, replace(SETTINGS, n_controls=20))
    for side in ("base", "tuned"):
        effects = found.control_curves(side).amax(1)
        best = [c.control for c in found.sampled if c.side == side and c.latent is None]
        assert best == effects.argsort(descending=True).tolist()[:16]
        assert best != list(range(16))
    # Two of five latents went on, and sixteen of twenty controls; of forty it would be as many.
    assert found.favours_latents
    assert not replace(found, controls=torch.cat([found.controls] * 2, 2)).favours_latents


@pytest.mark.parametrize(
    ("n_latents", "n_sampled", "n_controls"),
    [(20, 1, 320), (20, 20, 16), (200, 20, 160), (3, 2, 24), (3, 20, 16), (50, 0, 16)],
)
def test_the_share_of_controls_that_goes_on_is_that_of_the_latents(
    n_latents, n_sampled, n_controls
):
    settings = replace(SETTINGS, n_controls=None, n_sampled=n_sampled)
    assert settings.count_controls(n_latents) == n_controls
    assert replace(settings, n_controls=99).count_controls(n_latents) == 99


def test_latents_that_are_only_random_directions_beat_the_controls_as_often_as_p_says(screen):
    """Both stages agree, so that the best of the first are good at the second, too."""
    generator = torch.Generator().manual_seed(0)
    n, n_best = 20, 2
    settings = replace(SETTINGS, n_controls=None, n_sampled=n_best)
    like, unlike = [], []
    for _ in range(300):
        effects = torch.randn(n + settings.count_controls(n), generator=generator).double()
        noise = torch.randn(len(effects), generator=generator).double()
        judged = (0.9 * effects + 0.4 * noise).tolist()
        forced = replace(
            screen,
            latents=torch.arange(n),
            strengths=torch.ones(1).double(),
            before=torch.zeros(2, 2).double(),
            steered=as_odds(effects[:n]),
            controls=as_odds(effects[n:]),
            mean_difference=None,
        )
        chosen = [curve(k, judged[k]) for k in forced.top(n_best, side="base")]
        for found, numbers in (
            (like, forced.top_controls(16, side="base")),
            (unlike, range(16)),
        ):
            chance = [curve(None, judged[n + k]) for k in numbers]
            found += [p for p in rank_curves((*chosen, *chance)) if p is not None]
    smallest = 1 / 17 + 1e-9
    assert sum(p <= smallest for p in like) / 600 == pytest.approx(1 / 17, abs=0.03)
    assert sum(like) / 600 == pytest.approx(9 / 17, abs=0.06)
    # Held against controls that nothing chose, chance alone is a finding every other time.
    assert sum(p <= smallest for p in unlike) / 600 > 0.3


def as_odds(effects: torch.Tensor) -> torch.Tensor:
    """Log-probabilities whose log-odds rise by so much: on the base, at one strength."""
    rows = torch.stack([effects, torch.zeros_like(effects)])
    return torch.stack([rows, -rows])[..., None]


def test_a_latent_that_was_lowered_is_tried_by_negative_strengths(pair, screen):
    forward = run(pair, replace(SETTINGS, strengths=(1.0,), sampled_strengths=None, n_sampled=0))
    back = run(pair, replace(SETTINGS, strengths=(-1.0,), sampled_strengths=None, n_sampled=0))
    place = LATENTS.index(PLANTED)
    for side in ("base", "tuned"):
        assert float(forward.forced_effect(side)[place]) > 0.05
        assert float(back.forced_effect(side)[place]) < -0.05
    assert forward.sampled == ()
    assert forward.rows()[0]["sampled"] is False


class Dies(RuntimeError):
    pass


def test_a_screen_that_was_killed_goes_on_where_it_was(pair, screen, tmp_path, monkeypatch):
    asked, scored = [], []
    scores = make_scores(pair)

    def judge(chats: Any) -> Any:
        asked.append(len(chats))
        if len(asked) == 20:
            raise Dies
        return scores.sampled(chats)

    force = ForcedStage._score
    monkeypatch.setattr(
        ForcedStage, "_score", lambda self, v: scored.append(len(v)) or force(self, v)
    )
    settings = replace(SETTINGS, batching=replace(SETTINGS.batching, tokens=999))
    with pytest.raises(Dies):
        run(pair, scores=replace(scores, sampled=judge), out=tmp_path / "run")
    assert sum(scored) == 2 * (1 + (5 + 16 + 1) * 3)
    found = run(pair, settings, scores=replace(scores, sampled=judge), out=tmp_path / "run")
    assert sum(scored) == 2 * (1 + (5 + 16 + 1) * 3)
    assert len(asked) == 1 + 2 * (1 + 19 * 2)
    assert found.to_dict() == screen.to_dict()
    again = run(pair, scores=replace(scores, sampled=judge), out=tmp_path / "run")
    assert again.to_dict() == screen.to_dict()
    assert len(asked) == 1 + 2 * (1 + 19 * 2)
    kept = RunFolder.open(tmp_path / "run").read_result("screen", FeatureScreen)
    assert kept.to_dict() == screen.to_dict()
    with pytest.raises(PlanChangedError, match=r"settings.seed was 0, now 1"):
        run(pair, replace(SETTINGS, seed=1), out=tmp_path / "run")
    with pytest.raises(PlanChangedError, match="latents"):
        run(pair, latents=(1, 2), out=tmp_path / "run")


def test_a_screen_survives_a_file(screen, tmp_path):
    found = load_result(screen.save(tmp_path / "screen"))
    assert isinstance(found, FeatureScreen)
    assert found.sampled == screen.sampled
    assert torch.equal(found.steered, screen.steered)
    row = next(r for r in found.rows() if r["latent"] == PLANTED and r["side"] == "tuned")
    assert row["strength"] == 4.0
    assert row["p"] == pytest.approx(1 / 17)
    assert row["effect_low"] < row["effect"] < row["effect_high"]


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


def test_wrong_input_is_named(pair):
    texts = make_texts(pair)
    with pytest.raises(CodecError, match=r"has 12, numbered from 0, and got \[12\]"):
        run(pair, latents=(1, 12))
    with pytest.raises(CodecError, match=r"latents: \[3\] come more than once"):
        run(pair, latents=(3, 1, 3))
    with pytest.raises(CodecError, match="latents: got none"):
        run(pair, latents=())
    with pytest.raises(ValueError, match="4 positive and 0 negative"):
        run(pair, texts=ContrastTexts(positive=texts.positive))
    with pytest.raises(ValueError, match="one delta_norm is 0"):
        run(ModelPair(base=pair.base, tuned=pair.base, adapter=None, proof=None))
    with pytest.raises(CodecError, match=r"width 20, but resid_post.1 of the model"):
        screen_features(
            pair,
            make_codec(20),
            latents=(1,),
            texts=texts,
            scores=make_scores(pair),
            settings=SETTINGS,
        )
    silent = make_codec(W_dec=torch.zeros(12, 24))
    with pytest.raises(CodecError, match=r"latents: \[1\] have a decoder vector of zero"):
        screen_features(
            pair, silent, latents=(1,), texts=texts, scores=make_scores(pair), settings=SETTINGS
        )
    with pytest.raises(NonFiniteError, match=r"strengths: under vectors of up to .* steer less"):
        run(pair, replace(SETTINGS, strengths=(1e39,), sampled_strengths=None, n_sampled=0))
    short = replace(make_scores(pair), coherence=lambda _: [1.0])
    with pytest.raises(ValueError, match="coherence gave 1 values for 8 responses"):
        run(pair, scores=short)
