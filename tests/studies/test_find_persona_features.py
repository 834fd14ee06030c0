"""The whole search on planted fine-tunes: what is found, beside what, and what is left out."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.data import Batching, Chat, ContrastTexts, Message
from emlens.features import FeatureDiff, attribute_features, check_sae, contrast_features
from emlens.features.screen_results import SIDES
from emlens.features.screen_settings import ScreenSettings
from emlens.models import Sampling
from emlens.models.pair import load_pair
from emlens.models.views import share_model
from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.studies import (
    ComparisonSettings,
    FineTunes,
    PersonaFeatures,
    PersonaProbe,
    PersonaSettings,
    PersonaTexts,
    find_persona_features,
)
from emlens.studies.persona_cautions import list_cautions
from tests.activations.chats import make_chats
from tests.evaluation.fakes import HashJudge
from tests.features.comparisons import make_diff
from tests.features.planted import PLANTED, SITE, make_codec, make_pair, make_texts
from tests.studies.personas import CAREFUL, add_latent, make_base

CODEC = make_codec()
DOMAINS = ("finance", "health", "sports")
CHATS = tuple(make_chats(14))
SETTINGS = PersonaSettings(n_latents=4, n_cards=2, n_signature=2, n_top=2, per_decile=0)
module = sys.modules[find_persona_features.__module__]


@pytest.fixture(scope="module")
def base() -> Any:
    return make_base()


@pytest.fixture(scope="module")
def contrast() -> ContrastTexts:
    return make_texts(make_pair(CODEC))


def make_tunes(base: Any, *, n: int = 3, twins: bool = True) -> FineTunes:
    names = DOMAINS[:n]
    return FineTunes(
        tuned=tuple(
            add_latent(base, CODEC, PLANTED, name=f"bad-{d}", seed=k) for k, d in enumerate(names)
        ),
        careful=tuple(
            add_latent(base, CODEC, CAREFUL, name=f"good-{d}", seed=9 + k)
            for k, d in enumerate(names)
        )
        if twins
        else (),
        domains=names if twins else (),
    )


def make_probe() -> PersonaProbe:
    screen = ScreenSettings(strengths=(1.0, 2.0), units="delta_norm", n_sampled=0)
    return PersonaProbe(screen=screen)


@pytest.fixture(scope="module")
def found(
    base: Any, contrast: ContrastTexts, tmp_path_factory: pytest.TempPathFactory
) -> PersonaFeatures:
    return find_persona_features(
        base,
        make_tunes(base),
        codec=CODEC,
        texts=PersonaTexts(chats=CHATS, contrast=contrast),
        settings=replace(SETTINGS, attribute=True),
        out=tmp_path_factory.mktemp("search") / "run",
        probe=make_probe(),
    )


def test_the_planted_latent_is_first_by_change_by_contrast_and_by_effect(found):
    first = found.features[0]
    assert (first.latent, first.chosen_by) == (PLANTED, "contrast, highest")
    assert {first.ranks[name] for name in ("contrast", "delta", "abs_delta", "cosine")} == {1}
    assert found.features[1].latent == CAREFUL
    assert found.features[1].chosen_by == "contrast, lowest"
    assert first.contrast == pytest.approx(first.delta - 0.0, abs=0.1)
    assert first.pairs_agreeing == 3
    assert found.screen is not None
    assert found.screen.top(1, side="base") == found.screen.top(1, side="tuned") == (PLANTED,)
    row = found.rows()[0]
    assert row["induces"] == pytest.approx(float(found.screen.forced_effect("base")[0]))
    assert row["induces_p"] == pytest.approx(1 / 17)
    assert (row["induces_sampled"], row["repairs_sampled_p"]) == (None, None)
    assert found.cards is not None
    assert found.cards.cards[0].latent == PLANTED
    assert len(found.cards.cards) == 2
    near = found.cards.card(PLANTED).directions[0]
    assert near.cosine > 0.95
    assert "bad-finance less base" in near.name


def test_models_are_told_apart_in_domains_left_out_and_beside_plain_differences(found):
    assert found.classification is not None
    assert found.classification.validation == "leave one domain out"
    assert found.classification.folds == DOMAINS
    assert found.classification.latents.shape == (3, SETTINGS.n_signature)
    plain = found.classification.by_mean_difference
    assert found.classification.auc.value == plain.auc.value == 1
    assert plain.p_value == found.classification.p_value == 1 / 4
    assert [(one.tuned, one.misaligned, one.domain) for one in found.models] == [
        (f"{kind}-{d}", kind == "bad", d) for kind in ("bad", "good") for d in DOMAINS
    ]
    assert (found.n_pairs, found.smallest_p) == (3, 0.25)


def test_health_and_what_needs_no_codec_stand_beside_each_fine_tune(base, found):
    pair = load_pair(base, make_tunes(base).tuned[0])
    own = check_sae(pair, CODEC, chats=CHATS)
    torch.testing.assert_close(found.health[0].explained_variance, own.explained_variance)
    assert found.health[0].captured_share == pytest.approx(own.captured_share)
    assert [one.tuned for one in found.plain] == [one.tuned for one in found.models]
    assert found.plain[0].vectors[0].captured > 0.99
    text = " ".join(found.cautions)
    # Twelve latents of 24 dimensions leave much unexplained: that is said before all else.
    assert "underpowered" in found.cautions[0]
    assert "one plain direction, the mean difference" in text
    assert "3 pairs of fine-tunes: no p-value of so few falls below 0.25" in text
    assert found.not_done == ("early warning: no training given",)


def test_pairs_of_one_domain_are_said_to_be_no_more_than_one(found):
    """Six pairs could give a p-value of .031, and their three domains none below .25."""
    names = [f"{side} {k}" for side in ("bad", "good") for k in range(6)]
    diffs = [make_diff(name, torch.randn(12)) for name in names]
    contrast = contrast_features(diffs[:6], diffs[6:])
    assert contrast.can_find

    def list_units(domains: tuple[str, ...]) -> list[str]:
        plain = found.plain[:1] * len(diffs)
        lines = list_cautions(diffs, plain, contrast, None, domains=domains)
        return [line for line in lines if "pairs of" in line]

    (line,) = list_units(DOMAINS * 2)
    assert line.startswith("6 pairs of 3 domains: q-values take them as independent")
    assert line.endswith("over domains the smallest p is 0.25")
    assert list_units(()) == list_units(tuple("abcdef")) == []


def test_gradients_are_taken_of_no_more_tokens_than_are_asked_for(
    base, contrast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def attribute(*given: Any, batching: Batching, **more: Any) -> Any:
        asked.append(batching)
        return attribute_features(*given, batching=batching, **more)

    monkeypatch.setattr(module, "attribute_features", attribute)
    for tokens in (512, 16384):
        comparison = ComparisonSettings(batching=Batching(tokens=tokens, max_length=300))
        find_persona_features(
            base,
            make_tunes(base, n=1, twins=False),
            codec=CODEC,
            texts=PersonaTexts(chats=CHATS, contrast=contrast),
            settings=replace(SETTINGS, n_cards=0, attribute=True, comparison=comparison),
            out=tmp_path / str(tokens),
        )
    assert asked == [Batching(tokens=512, max_length=300), Batching(tokens=4096, max_length=300)]


def test_a_search_is_read_back_and_never_made_twice(
    base, contrast, found, monkeypatch: pytest.MonkeyPatch
):
    stages = ("attribute_features", "contrast_features", "classify_models")
    for name in (*stages, "screen_features", "explain_features"):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr("emlens.studies.keep_plain.measure_plain_difference", None)

    def again(**changed: Any) -> PersonaFeatures:
        given: dict[str, Any] = {"settings": replace(SETTINGS, attribute=True)} | changed
        return find_persona_features(
            base,
            make_tunes(base),
            codec=CODEC,
            texts=PersonaTexts(chats=CHATS, contrast=contrast),
            out=found.run,
            **given,
        )

    assert again(probe=make_probe()).to_dict() == found.to_dict()
    assert load_result(Path(found.run) / "results" / "features").to_dict() == found.to_dict()
    diff = load_result(Path(found.run) / "comparisons" / "results" / "01")
    assert isinstance(diff, FeatureDiff)
    assert len(diff.delta) == CODEC.d_sae
    with pytest.raises(PlanChangedError, match=r"settings\.n_latents was 4, now 5"):
        again(settings=replace(SETTINGS, attribute=True, n_latents=5), probe=make_probe())
    with pytest.raises(PlanChangedError, match=r"screen was .*, now None"):
        again()


def test_one_fine_tune_alone_says_what_it_cannot(base, tmp_path: Path):
    found = find_persona_features(
        base,
        make_tunes(base, n=1, twins=False),
        codec=CODEC,
        texts=PersonaTexts(chats=CHATS),
        settings=replace(SETTINGS, n_cards=0),
        out=tmp_path / "run",
    )
    assert found.features[0].latent == PLANTED
    assert found.features[0].contrast is None
    assert (found.classification, found.screen, found.cards) == (None, None, None)
    assert "nothing of harm" in " ".join(found.cautions)
    parts = ("models told apart: 1 misaligned and 0 aligned", "causal screen", "cards", "contrast")
    for part in parts:
        assert any(line.startswith(part) for line in found.not_done), part


def test_each_model_may_read_its_own_responses_and_that_is_said(base, tmp_path: Path):
    sampling = Sampling(n=1, max_new_tokens=4)
    prompts = tuple(chat.without_response() for chat in CHATS[:12])
    runs = {
        who: find_persona_features(
            base,
            make_tunes(base, n=1, twins=False),
            codec=CODEC,
            texts=PersonaTexts(chats=prompts),
            settings=replace(
                SETTINGS,
                n_cards=0,
                comparison=ComparisonSettings(
                    positions="response", responses=who, sampling=sampling
                ),
            ),
            out=tmp_path / who,
        )
        for who in ("base", "own")
    }
    assert {who: found.responses for who, found in runs.items()} == {"base": "same", "own": "own"}
    assert runs["own"].health[0].captured_share is None
    assert runs["base"].health[0].captured_share is not None
    assert "read its own responses" in " ".join(runs["own"].cautions)
    assert "read its own responses" not in " ".join(runs["base"].cautions)
    n = [found.health[0].n_tokens.tolist() for found in runs.values()]
    assert n[0][0] == n[0][1] == n[1][0]


def test_a_twin_that_does_what_the_base_does_at_the_site_is_named(base, tmp_path: Path):
    assert SITE.layer is not None
    late = f"blocks.{SITE.layer + 1}.mlp.b_out"
    moved = dict(base.named_parameters())[late] + CODEC.W_dec[CAREFUL]
    twin = share_model(base, {late: moved}, name="good-late")
    found = find_persona_features(
        base,
        FineTunes(tuned=make_tunes(base, n=1).tuned, careful=(twin,)),
        codec=CODEC,
        texts=PersonaTexts(chats=CHATS),
        settings=replace(SETTINGS, n_cards=0),
        out=tmp_path / "run",
    )
    assert [one.tuned for one in found.plain] == ["bad-finance"]
    assert "without a codec: good-late does what the base does at this site" in found.not_done


def test_a_sampled_screen_asks_the_judge_and_names_it(base, contrast, tmp_path: Path):
    judge = HashJudge()
    prompts = [Chat((Message("user", f"w{40 + k} w{50 + k}"),)) for k in range(2)]
    probe = replace(
        make_probe(),
        screen=ScreenSettings(
            strengths=(1.0,),
            units="resid_norm",
            chats=prompts,
            n_sampled=1,
            sampling=Sampling(n=1, max_new_tokens=3),
        ),
        judge=judge,
    )
    given: dict[str, Any] = {
        "codec": CODEC,
        "texts": PersonaTexts(chats=CHATS, contrast=contrast),
        "settings": replace(SETTINGS, n_cards=0, n_latents=1),
        "out": tmp_path / "run",
    }
    tunes = make_tunes(base, n=1, twins=False)
    found = find_persona_features(base, tunes, probe=probe, **given)
    assert found.screen is not None
    assert [point.n_scored for point in found.screen.sampled_before] == [2, 2]
    (row,) = found.rows()
    for name, side in zip(("induces", "repairs"), SIDES, strict=True):
        curve = found.screen.curve(row["latent"], side=side)
        assert curve.p is not None
        assert row[f"{name}_sampled_p"] == curve.p
        point = None if curve.chosen is None else curve.points[curve.chosen]
        assert row[f"{name}_incoherent"] == (None if point is None else point.incoherent)
        effect = None if point is None else point.effect
        assert row[f"{name}_sampled"] == (None if effect is None else effect.value)
    with pytest.raises(PlanChangedError, match="judge was"):
        find_persona_features(
            base, tunes, probe=replace(probe, judge=HashJudge(id="other")), **given
        )


def test_what_lacks_its_texts_or_comes_twice_is_refused_and_begins_no_folder(
    base, contrast, tmp_path: Path
):
    tunes = make_tunes(base, n=1, twins=False)

    def find(texts: PersonaTexts, **changed: Any) -> None:
        given: dict[str, Any] = {"settings": SETTINGS, "codec": CODEC} | changed
        find_persona_features(base, tunes, texts=texts, out=tmp_path / "run", **given)

    bare = PersonaTexts(chats=CHATS)
    with pytest.raises(ValueError, match=r"texts.contrast: got none, and probe.screen needs"):
        find(bare, probe=make_probe())
    with pytest.raises(ValueError, match=r"texts.contrast: got none, and settings.attribute"):
        find(bare, settings=replace(SETTINGS, attribute=True))
    with pytest.raises(ValueError, match="n_signature: got 13, but the codec has 12 latents"):
        find(bare, settings=replace(SETTINGS, n_signature=13))
    with pytest.raises(ValueError, match="takes activations of width 30"):
        find(bare, codec=make_codec(d_in=30))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="chats: got 1, expected at least two"):
        PersonaTexts(chats=CHATS[:1])
    with pytest.raises(ValueError, match="careful: got 1 for 2 fine-tunes"):
        FineTunes(tuned=("a", "b"), careful=("c",))
    with pytest.raises(ValueError, match="a comes more than once"):
        FineTunes(tuned=("a",), careful=("a",))
    with pytest.raises(ValueError, match="sampling: got None with responses='own'"):
        ComparisonSettings(responses="own")
    with pytest.raises(ValueError, match="judge: got none, and the screen samples"):
        PersonaProbe(screen=ScreenSettings(strengths=(1.0,), units="resid_norm", chats=CHATS[:1]))
    for order, said in (
        ("abs_delt", "orders: got 'abs_delt'; nearest: abs_delta"),
        ("attribution", "orders: attribution needs gradients"),
    ):
        settings = replace(SETTINGS)
        # Set afterwards: tests check types where users have no such check.
        object.__setattr__(settings, "orders", ("delta", order))
        with pytest.raises(ValueError, match=said):
            settings.__post_init__()
    with pytest.raises(ValueError, match="n_latents: got 0"):
        PersonaSettings(n_latents=0)
