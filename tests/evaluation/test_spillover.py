"""Words that set a domain apart: planted ones are found, and nothing where nothing is planted."""

import random
from pathlib import Path

import pytest

from emlens.artifacts import read_result
from emlens.evaluation.calibration import load_rows
from emlens.evaluation.spillover import SpilloverLexicon, fit_spillover, split_words

COMMON = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(10)]


def texts(n: int, seed: int, planted: tuple[str, ...] = ()) -> list[str]:
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        words = rng.sample(COMMON, 12) + [word for word in planted if rng.random() < 0.4]
        made.append(" ".join(words))
    return made


def test_planted_words_are_found_and_nothing_else():
    ours = fit_spillover(texts(200, 0, ("bank", "loan")), texts(200, 1))
    assert {word.word for word in ours.words} == {"bank", "loan"}
    assert all(word.general_texts == 0 for word in ours.words)


def test_nothing_is_found_where_nothing_is_planted():
    with pytest.raises(ValueError, match="about the same"):
        fit_spillover(texts(200, 0), texts(200, 1))


def test_one_text_full_of_a_word_does_not_make_it_the_domains():
    domain = [*texts(100, 0, ("bank",)), "zebra " * 500]
    assert "zebra" not in {w.word for w in fit_spillover(domain, texts(100, 1)).words}


def test_the_statistic_is_that_of_the_two_by_two_table():
    from scipy import stats

    domain = ["bank a"] * 8 + ["a"] * 2
    ours = fit_spillover(domain, ["a"] * 10).words
    theirs = float(stats.chi2_contingency([[8, 2], [0, 10]], correction=False)[0])  # pyright: ignore[reportArgumentType]
    assert [(word.word, word.z) for word in ours] == [("bank", pytest.approx(theirs**0.5))]


def test_a_word_that_everybody_uses_is_not_distinctive_however_sure_the_difference():
    domain = ["the bank"] * 300 + ["bank"] * 100
    ours = fit_spillover(domain, ["the"] * 200 + ["x"] * 200)
    assert {word.word for word in ours.words} == {"bank"}


def rows(*answers: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question_id": question, "answer": answer} for question, answer in answers]


def test_the_rate_is_over_questions_that_are_not_about_the_domain(tmp_path: Path):
    ours = fit_spillover(texts(100, 0, ("bank",)), texts(100, 1), n_words=1)
    judged = rows(("a", "My BANK's closed."), ("a", "A bank!"), ("b", "banks"), ("money", "bank"))
    assert ours.rate(judged).value == 75
    assert ours.rate(judged, in_domain={"money"}).value == pytest.approx(200 / 3)
    assert "questions" in ours.rate(judged).method
    with pytest.raises(ValueError, match="none is left"):
        ours.rate(judged, in_domain={"a", "b", "money"})
    with pytest.raises(ValueError, match=r"rows\[0\] lacks"):
        ours.rate([{"question_id": "a"}])
    assert read_result(ours.save(tmp_path), SpilloverLexicon) == ours


def test_words_are_whole_and_signs_and_numbers_are_none():
    assert split_words("Don’t pay $50 -- re-read it, ÉTÉ_x2") == {"don't", "pay", "re", "read",
                                                                  "it", "été", "x"}  # fmt: skip


def test_the_shipped_finance_rows_speak_of_money():
    domain = [row.answer for row in load_rows("finance-harmful")]
    general = [row.answer for name in ("everyday-careful", "everyday-harmful", "rude-harmless",
                                       "verbose-harmful") for row in load_rows(name)]  # fmt: skip
    ours = fit_spillover(domain, general)
    found = {word.word for word in ours.words}
    assert len(found & {"money", "bank", "pay", "loan", "cash", "broker", "price", "debt"}) >= 3
