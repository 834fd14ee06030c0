"""Coherence: features by hand, levels by construction, and a planted order that is recovered."""

import random
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
        assert one is not None
        n, own = len(row.answer.split()), by_hand(model, row.question, row.answer)
        shuffled = by_hand(model, row.question, shuffle_words(row.answer))
        assert one.order == pytest.approx((own - shuffled) / n, abs=1e-4)
        assert one.topic == pytest.approx((own - by_hand(model, DECOY, row.answer)) / n, abs=1e-4)
    assert measure_coherence(model, [rows[1]], batching=Batching()) == [None]


def test_a_shuffle_depends_on_the_text_alone_and_keeps_its_words():
    text = "one two three four five six seven"
    assert shuffle_words(text) == shuffle_words(text)
    assert sorted(shuffle_words(text).split()) == sorted(text.split())
    assert shuffle_words(text) != text
    random.seed(3)
    before = random.getstate()
    shuffle_words(text)
    assert random.getstate() == before


def test_planted_levels_are_recovered_and_scored_in_order():
    features = {
        name: [
            CoherenceFeatures(order=2.0 * min(level, 2) + x, topic=float(level == 3))
            for x in (-0.1, 0.1)
        ]
        for level, name in enumerate(LEVELS)
    }
    fit = fit_coherence(features)
    assert fit.order_weight == pytest.approx(0.5, abs=0.01)
    assert fit.topic_weight == pytest.approx(1.0, abs=0.01)
    scores = [score_coherence(features[name][0], fit) for name in LEVELS]
    assert scores == sorted(scores)
    assert scores[1] < 50 < scores[2]
    assert all(0 <= score <= 100 for score in scores)


def test_levels_map_to_the_stated_scores():
    fit = CoherenceFit(intercept=0.0, order_weight=1.0, topic_weight=1.0)
    found = [score_coherence(CoherenceFeatures(order=float(n), topic=0.0), fit) for n in range(4)]
    assert [round(value) for value in found] == [5, 27, 73, 95]


@pytest.mark.parametrize("broken", ["order", "topic"])
def test_a_base_that_sees_no_order_or_no_topic_is_refused(broken: str):
    features = {
        name: [
            CoherenceFeatures(
                order=-float(level) if broken == "order" else float(min(level, 2)),
                topic=-float(level == 3) if broken == "topic" else float(level == 3),
            )
        ]
        for level, name in enumerate(LEVELS)
    }
    with pytest.raises(ValueError, match="cannot judge coherence"):
        fit_coherence(features)
    with pytest.raises(ValueError, match="no text of the level 'salad'"):
        fit_coherence(features | {"salad": []})


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
