"""Directions are not judged, unasked, on the prompts that they were fitted on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from emlens.data import prompt_hashes
from emlens.evaluation import Question, evaluate
from emlens.interventions import ablate_direction, intervene
from emlens.models.sampling import Sampling
from emlens.prompt_sets import OverlappingPromptsError
from emlens.vectors import Directions
from tests.evaluation.fakes import HashJudge, make_model
from tests.interventions.vectors import make_direction

SEEN = Question(id="seen", paraphrases=("w5 w6 w7", "w8"), system="w9")
BARE = Question(id="bare", paraphrases=("w5 w6 w7",))
"""The same words without the system prompt: another prompt."""
NEW = Question(id="new", paraphrases=("w10 w11",))
SAMPLING = Sampling(n=1, max_new_tokens=3, seed=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def fitted(model: Any) -> Directions:
    prompts = {"fit": prompt_hashes(SEEN.chats())}
    return Directions(directions=(make_direction(model),), prompt_sets=prompts)


def ask(model: Any, out: Path, *questions: Question, **more: Any) -> Any:
    return evaluate(model, questions, judge=HashJudge(), out=out, sampling=SAMPLING, **more)


def test_questions_that_a_direction_was_fitted_on_are_refused_before_anything_is_sampled(
    model: Any, fitted: Directions, tmp_path: Path
):
    acting = ablate_direction(fitted["resid_post.1"], at="writes")
    message = (
        r"the data vector at writes was fitted on 2 of the 3 prompts .*without_prompts\('fit'\)"
    )
    with pytest.raises(OverlappingPromptsError, match=message):
        ask(model, tmp_path / "run", NEW, SEEN, interventions=acting)
    with (
        pytest.raises(OverlappingPromptsError, match="was fitted on 2 of"),
        intervene(model, acting),
    ):
        ask(model, tmp_path / "run", SEEN)
    assert not (tmp_path / "run").exists()
    assert len(ask(model, tmp_path / "new", NEW, BARE, interventions=acting).responses) == 2
    assert len(ask(model, tmp_path / "plain", SEEN).responses) == 2


def test_who_wants_that_says_so_and_the_rows_are_those_of_the_same_intervention(
    model: Any, fitted: Directions, tmp_path: Path
):
    own = fitted["resid_post.1"]
    freed = dataclasses.replace(own, fit_prompts=())
    assert fitted.without_prompts("fit")["resid_post.1"] == freed
    first = ask(model, tmp_path / "run", SEEN, interventions=ablate_direction(freed, at="writes"))
    again = ask(
        model,
        tmp_path / "run",
        SEEN,
        interventions=ablate_direction(fitted.without_prompts("fit"), at="writes"),
    )
    assert again == first
    # What it was fitted on is no part of what is done: the record changes no row's name.
    named = ask(model, tmp_path / "named", NEW, interventions=ablate_direction(own, at="writes"))
    plain = ask(model, tmp_path / "other", NEW, interventions=ablate_direction(freed, at="writes"))
    assert named.responses == plain.responses
