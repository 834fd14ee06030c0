"""What the demo asks of latents, on a planted fine-tune and its twin that are in memory already."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlens.data import ContrastTexts
from emlens.features.screen_settings import MIN_CONTROLS
from emlens.models.pair import ModelPair, load_pair
from emlens.runs import PlanChangedError
from emlens.studies.demo_features import find_demo_features
from emlens.studies.demo_size import FULL, QUICK
from tests.activations.chats import make_chats
from tests.features.planted import PLANTED, make_codec, make_texts
from tests.studies.personas import CAREFUL, make_adapter, make_base, read_mean

CODEC = make_codec()
CHATS = make_chats(16)
SIZE = replace(FULL.features, chats=13, latents=2, cards=2, windows=2)


@pytest.fixture(scope="module")
def base() -> Any:
    return make_base()


@pytest.fixture(scope="module")
def pairs(base: Any) -> tuple[ModelPair, ModelPair]:
    """The fine-tune and its careful twin, each with one latent of its own, over one base."""
    reads = read_mean(base)
    tuned, twin = (
        load_pair(base, make_adapter(CODEC, latent, size=2.0, A=reads, name=name))
        for latent, name in ((PLANTED, "reckless"), (CAREFUL, "careful"))
    )
    return tuned, twin


@pytest.fixture(scope="module")
def odds(pairs: tuple[ModelPair, ModelPair]) -> ContrastTexts:
    return make_texts(pairs[0], n=SIZE.odds + 1)


def search(pairs: Any, odds: ContrastTexts, out: Path, **changed: Any) -> Any:
    given: dict[str, Any] = {"codec": CODEC, "chats": CHATS, "odds": odds, "size": SIZE} | changed
    return find_demo_features(*pairs, out=out, **given)


@pytest.fixture(scope="module")
def found(pairs: Any, odds: ContrastTexts, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return search(pairs, odds, tmp_path_factory.mktemp("demo") / "features")


def test_the_fine_tunes_latent_comes_first_and_its_twins_is_set_against_it(found: Any):
    first = found.features[0]
    assert (first.latent, first.chosen_by) == (PLANTED, "contrast, highest")
    assert found.features[1].latent == CAREFUL
    assert [(one.tuned, one.misaligned) for one in found.models] == [
        ("reckless", True),
        ("careful", False),
    ]
    assert {one.n_prompts for one in found.models} == {SIZE.chats}
    assert found.screen.top(1, side="base") == (PLANTED,)
    assert found.screen.controls.shape[2] == MIN_CONTROLS
    assert found.screen.n_texts == (SIZE.odds, SIZE.odds)
    assert [len(card.top) for card in found.cards.cards] == [SIZE.windows] * SIZE.cards


def test_a_pair_in_memory_brings_its_adapter_into_the_baselines(found: Any):
    plain = found.plain[0]
    assert plain.n_writes == 1
    assert plain.captured_by_writes == pytest.approx(1.0, abs=1e-3)
    assert [one.tuned for one in found.plain] == ["reckless", "careful"]


def test_only_as_much_is_read_as_the_size_says(pairs: Any, odds: ContrastTexts, found: Any):
    longer = replace(odds, positive=odds.positive[:-1], negative=odds.negative[:-1])
    assert search(pairs, longer, Path(found.run), chats=CHATS[:13]).to_dict() == found.to_dict()
    with pytest.raises(PlanChangedError, match=r"settings\.n_top was 2, now 1"):
        search(pairs, odds, Path(found.run), size=replace(SIZE, windows=1))


def test_another_adapter_of_the_same_name_is_another_plan(
    base: Any, pairs: Any, odds: ContrastTexts, found: Any
):
    other = load_pair(base, make_adapter(CODEC, PLANTED, size=3.0, name="reckless"))
    assert other.tuned_name == pairs[0].tuned_name
    with pytest.raises(PlanChangedError, match="tuned"):
        search((other, pairs[1]), odds, Path(found.run))


def test_a_quick_search_steers_nothing_and_says_so(pairs: Any, odds: ContrastTexts, tmp_path: Path):
    quick = search(pairs, odds, tmp_path / "run", size=QUICK.features)
    assert quick.screen is None
    assert "causal screen: not asked for" in quick.not_done
    assert len(quick.cards.cards) == QUICK.features.cards


def test_a_twin_over_another_base_is_refused(pairs: Any, odds: ContrastTexts, tmp_path: Path):
    other = load_pair(make_base(), make_adapter(CODEC, CAREFUL, name="stranger"))
    with pytest.raises(ValueError, match="the pair stranger lies over another base"):
        search((pairs[0], other), odds, tmp_path / "run")
    assert not (tmp_path / "run").exists()
