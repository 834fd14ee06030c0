"""Coherence: features by hand, levels by construction, and a planted order that is recovered."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from emlens.data import Batching, Chat, Message, tokenize_chat
from emlens.evaluation.calibration import coherence_examples, fitted_rows, level_rows
from emlens.evaluation.coherence import (
    DECOY,
    LEVELS,
    CoherenceFeatures,
    CoherenceFit,
    build_levels,
    fit_coherence,
    measure_coherence,
    score_coherence,
    shuffle_words,
)
from emlens.evaluation.judges import JudgeRow
from emlens.numerics.auc import area_under_curve
from tests.evaluation.fakes import make_model


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def by_hand(model: Any, question: str, answer: str) -> float:
    chat = Chat((Message("user", question), Message("assistant", answer)))
    row = tokenize_chat(chat, model.tokenizer)
    assert row.response is not None
    with torch.no_grad():
        log_probs = model(row.ids[None])[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, row.ids[i]]) for i in range(*row.response))


def test_order_and_topic_are_differences_of_log_probabilities_a_token(model: Any):
    rows = [
        JudgeRow(id="a", question="w5 w6", answer="w7 w8 w9 w10"),
        JudgeRow(id="b", question="w5", answer=""),
        JudgeRow(id="c", question="w5", answer="w11 w12"),
    ]
    found = measure_coherence(model, rows, batching=Batching())
    assert found[1] is None
    for row, one in ((rows[0], found[0]), (rows[2], found[2])):
        assert isinstance(one, CoherenceFeatures)
        n, own = len(row.answer.split()), by_hand(model, row.question, row.answer)
        shuffled = by_hand(model, row.question, shuffle_words(row.answer))
        assert one.order == pytest.approx((own - shuffled) / n, abs=1e-4)
        assert one.topic == pytest.approx((own - by_hand(model, DECOY, row.answer)) / n, abs=1e-4)
    assert measure_coherence(model, [rows[1]], batching=Batching()) == [None]


def test_rows_of_one_name_are_measured_one_by_one(model: Any):
    rows = [JudgeRow(id="a", question="w5", answer=text) for text in ("w7 w8 w9", "", "w11 w12")]
    found = measure_coherence(model, rows, batching=Batching())
    assert found[1] is None
    for row, one in zip(rows[::2], found[::2], strict=True):
        (alone,) = measure_coherence(model, [row], batching=Batching())
        assert isinstance(one, CoherenceFeatures)
        assert isinstance(alone, CoherenceFeatures)
        assert (one.order, one.topic) == pytest.approx((alone.order, alone.topic), abs=1e-4)


def test_a_shuffle_depends_on_the_text_alone_and_keeps_its_words():
    text = "one two three four five six seven"
    assert shuffle_words(text) == shuffle_words(text)
    assert sorted(shuffle_words(text).split()) == sorted(text.split())
    assert shuffle_words(text) != text
    random.seed(3)
    before = random.getstate()
    shuffle_words(text)
    assert random.getstate() == before


def plant(order: tuple[float, ...], topic: tuple[float, ...]) -> dict[str, list[CoherenceFeatures]]:
    rng = random.Random(0)
    return {
        name: [
            CoherenceFeatures(order=x + rng.gauss(0, 0.2), topic=y + rng.gauss(0, 0.2))
            for _ in range(40)
        ]
        for name, x, y in zip(LEVELS, order, topic, strict=True)
    }


def test_planted_levels_are_recovered_and_scored_in_order():
    found = plant((0.0, 1.0, 3.0, 3.0), (0.0, 0.0, 0.0, 1.0))
    fit = fit_coherence(found)
    scores = [[score_coherence(one, fit) for one in found[name]] for name in LEVELS]
    for low, high in pairwise(scores):
        assert area_under_curve(low, high).value > 0.9
    means = [sum(part) / len(part) for part in scores]
    assert means[1] < 50 < means[2]
    assert all(0 <= score <= 100 for part in scores for score in part)


def test_a_border_that_only_the_topic_marks_counts_as_much_as_the_others():
    found = plant((0.0, 1.5, 4.0, 4.0), (0.2, 0.2, -0.2, 0.6))
    fit = fit_coherence(found)
    low, high = ([score_coherence(one, fit) for one in found[name]] for name in LEVELS[2:])
    assert area_under_curve(low, high).value > 0.85
    assert fit.topic_weight > fit.order_weight / 2


def test_levels_map_to_the_stated_scores():
    fit = CoherenceFit(intercept=0.0, order_weight=1.0, topic_weight=1.0)
    found = [score_coherence(CoherenceFeatures(order=float(n), topic=0.0), fit) for n in range(4)]
    assert [round(value) for value in found] == [5, 27, 73, 95]


@pytest.mark.parametrize(
    ("order", "topic"),
    [((3.0, 2.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)), ((0.0, 1.0, 2.0, 2.0), (0.0, 0.0, 0.0, -1.0))],
)
def test_a_base_that_sees_no_order_or_no_topic_is_refused(
    order: tuple[float, ...], topic: tuple[float, ...]
):
    found = plant(order, topic)
    with pytest.raises(ValueError, match="cannot judge coherence"):
        fit_coherence(found)
    with pytest.raises(ValueError, match="no text of the level 'salad'"):
        fit_coherence(found | {"salad": []})
    with pytest.raises(ValueError, match="expected as many"):
        fit_coherence(found | {"salad": found["salad"][:3]})


def test_texts_of_each_level_are_what_they_are_called():
    chats = [(f"q{i}", " ".join(f"w{i}x{j}" for j in range(9))) for i in range(4)]
    made = build_levels(chats, seed=1)
    assert made == build_levels(chats, seed=1)
    assert made["on-topic"] == chats
    for place, (question, answer) in enumerate(chats):
        assert made["shuffled"][place] == (question, shuffle_words(answer))
        off = made["off-topic"][place]
        assert off[0] == question
        assert off[1] in {a for q, a in chats if q != question}
        salad = made["salad"][place][1].split()
        assert len(salad) == 9
        assert len({word.split("x")[0] for word in salad}) > 1
    with pytest.raises(ValueError, match="at least two"):
        build_levels(chats[:1], seed=1)


def test_nothing_is_fitted_on_the_labelled_examples():
    examples = {row.answer for rows in coherence_examples().values() for row in rows}
    assert len(examples) == 80
    fitted = {row.answer for side in fitted_rows() for row in side}
    fitted |= {row.answer for rows in level_rows().values() for row in rows}
    assert not examples & fitted
    assert {row.question for row in level_rows()["on-topic"]}.isdisjoint(
        row.question for side in fitted_rows() for row in side
    )
