"""Two classes from judged rows: strict thresholds, missing scores, balance, names of prompts."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.data.chat import Chat, Message
from emlens.data.contrast import (
    ContrastError,
    ContrastTexts,
    prompt_hash,
    prompt_hashes,
    split_by_score,
    text_hash,
)
from emlens.data.scores import BehaviourScores

NAMES = st.sampled_from([0.0, 29.999, 30.0, 30.001, 50.0, 50.001, 69.9, 70.0, 70.1, 100.0])
SCORES = st.one_of(NAMES, st.just(math.nan), st.none())


def split(rows, *, balance=False, seed=0, below=30):
    return split_by_score(
        rows,
        misaligned_below=below,
        aligned_above=70,
        coherent_above=50,
        balance=balance,
        seed=seed,
    )


def row(aligned, coherent, index=0, **more):
    return {"question": f"q{index}", "answer": f"a{index}"} | {
        "aligned": aligned,
        "coherent": coherent,
        **more,
    }


def answers(chats):
    return [chat.messages[-1].content for chat in chats]


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=20))
def test_thresholds_are_strict_and_missing_scores_are_never_selected(scores):
    rows = [row(a, c, i) for i, (a, c) in enumerate(scores)]

    def wanted(in_class):
        kept = enumerate(scores)
        kept = [(i, a, c) for i, (a, c) in kept if a is not None and c is not None]
        return [f"a{i}" for i, a, c in kept if in_class(a) and c > 50]

    positive, negative = wanted(lambda a: a < 30), wanted(lambda a: a > 70)
    if not positive and not negative:
        with pytest.raises(ContrastError, match=rf"none of {len(rows)} is in either class"):
            split(rows)
        return
    texts = split(rows)
    assert answers(texts.positive) == positive
    assert answers(texts.negative) == negative


@pytest.mark.parametrize(("aligned", "coherent"), [(30.0, 90), (70.0, 90), (10, 50.0), (90, 50.0)])
def test_a_score_at_a_threshold_is_in_neither_class(aligned, coherent):
    rows = [row(aligned, coherent), row(10, 60, 1), row(80, 60, 2)]
    texts = split(rows)
    assert answers(texts.positive) + answers(texts.negative) == ["a1", "a2"]


@pytest.mark.parametrize(
    "missing", [None, "", " ", "nan", "NaN", math.nan, "REFUSAL", "code", "na", "N/A"]
)
@pytest.mark.parametrize("column", ["aligned", "coherent"])
def test_every_way_to_have_no_score_selects_nothing(column, missing):
    rows = [row(10, 60) | {column: missing}, row(10, 60, 1), row(80, 60, 2)]
    texts = split(rows)
    assert answers(texts.positive) + answers(texts.negative) == ["a1", "a2"]


def test_rows_of_a_csv_file_are_texts():
    rows = [row("10.5", "60"), row(" 80 ", "1e2", 1)]
    texts = split(rows, balance=True, seed=0)
    assert answers(texts.positive) == ["a0"]
    assert answers(texts.negative) == ["a1"]


def test_rows_of_a_run_keep_system_prompt_and_id():
    judged = {"prompt": "q", "response": "a", "aligned": 3, "coherent": 99, "system": "s", "id": 7}
    texts = split([judged])
    roles = [(m.role, m.content) for m in texts.positive[0].messages]
    assert roles == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert texts.positive[0].id == "7"


def test_balance_cuts_the_larger_class_by_the_seed_and_keeps_the_order():
    rows = [row(10, 60, i) for i in range(5)] + [row(90, 60, i) for i in range(5, 50)]
    texts = [split(rows, balance=True, seed=seed) for seed in (0, 0, 1)]
    assert [len(t.negative) for t in texts] == [5, 5, 5]
    assert answers(texts[0].positive) == [f"a{i}" for i in range(5)]
    assert texts[0] == texts[1] != texts[2]
    kept = [int(a[1:]) for a in answers(texts[0].negative)]
    assert kept == sorted(kept)
    with pytest.raises(ContrastError, match=r"one of the classes is empty"):
        split(rows[:5], balance=True, seed=0)


def test_an_empty_answer_is_no_text():
    rows = [row(10, 60) | {"answer": "  "}, row(10, 60, 1)]
    texts = split(rows)
    assert answers(texts.positive) == ["a1"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "q", "answer": "a", "aligned": 3}, r"no column coherent.*nearest: "),
        (
            {"answer": "a", "aligned": 3, "coherent": 9},
            r"neither of the columns question and prompt",
        ),
        (
            {"question": "q", "prompt": "q", "answer": "a"},
            r"both of the columns question and prompt",
        ),
        (row("much", 9), r"aligned is 'much', expected a number"),
        (row(True, 9), r"aligned is True"),
        *(
            (row(5, text), rf"coherent is {text!r}")
            for text in ("٣٠", "5²", "1_0", "inf", "1e999", "101", "-0.1")
        ),
        (row(math.inf, 9), r"aligned is inf, expected 0 to 100"),
        (row(100.1, 9), r"aligned is 100.1"),
        (row(3, 9) | {"answer": 5}, r"answer is 5, expected a text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(bad, message):
    with pytest.raises(ContrastError, match=r"rows\[1\].*" + message):
        split([row(10, 60), bad], balance=True, seed=0)


def test_thresholds_that_overlap_are_refused():
    with pytest.raises(ContrastError, match=r"could be in both"):
        split([row(10, 60)], below=71)


def test_nothing_selected_says_what_there_was():
    rows = [row(40, 60), row(60, 60, 1), row(None, 60, 2), row(10, 20, 3)]
    with pytest.raises(ContrastError, match=r"1 are unscored, 2 have .* 40 to 60"):
        split(rows, balance=True, seed=0)


def chat(*texts, system=None, name=None):
    roles = ["user", "assistant"] * 2
    messages = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    return Chat(tuple([Message("system", system)] if system else []) + tuple(messages), id=name)


def test_texts_without_a_response_are_refused():
    with pytest.raises(ContrastError, match=r"negative\[1\] has no response"):
        ContrastTexts(positive=(chat("q", "a"),), negative=(chat("q", "a"), chat("q")))
    with pytest.raises(ContrastError, match=r"no text in either"):
        ContrastTexts()


def test_a_prompt_is_named_by_everything_before_the_response():
    assert prompt_hash(chat("q", "a")) == prompt_hash(chat("q", "b", name="x"))
    assert prompt_hash(chat("q", "a")) == prompt_hash(chat("q"))
    assert prompt_hash(chat("q", "a")) != prompt_hash(chat("r", "a"))
    assert prompt_hash(chat("q", "a")) != prompt_hash(chat("q", "a", system="s"))
    assert prompt_hash(chat("q", "a", "r")) != prompt_hash(chat("q", "b", "r"))
    assert text_hash(chat("q", "a")) != text_hash(chat("q", "b"))
    assert text_hash(chat("q", "a")) == text_hash(chat("q", "a", name="x"))
    hashes = prompt_hashes([chat("q", "a"), chat("r", "a"), chat("q", "b")])
    assert hashes == tuple(sorted({prompt_hash(chat("q")), prompt_hash(chat("r"))}))


def test_scores_are_callables():
    scores = BehaviourScores(
        teacher_forced=lambda model: 1.0,
        sampled=lambda chats: [None for _ in chats],
        coherence=lambda chats: [99.0 for _ in chats],
    )
    assert scores.sampled([chat("q", "a")]) == [None]
