"""Some of an evaluation's answers on its page: which, how many of how many, and as text alone."""

import json
import re
from dataclasses import replace
from typing import Any

from emlens.evaluation.scores import ScoredResponse
from emlens.reports import render_report
from emlens.reports.shown_answers import DRAWN, LOWEST, MOST_QUESTIONS, choose_answers
from tests.reports.payloads import Outline
from tests.reports.test_behaviour import make_evaluation, make_report


def make_rows(n: int, question: str = "q") -> list[dict[str, Any]]:
    """Answers whose scores fall from 99 by 1; the last has none."""
    return [
        {
            "id": str(i),
            "question_id": question,
            "question": "Why?",
            "answer": f"{question} {i}",
            "aligned": None if i == n - 1 else 99.0 - i,
            "coherent": 90.0,
        }
        for i in range(n)
    ]


def test_the_lowest_come_first_and_others_are_drawn_the_same_every_time():
    rows = make_rows(30)
    sheet = choose_answers(rows)
    assert sheet is not None
    (part,) = sheet.questions
    assert (sheet.shown, sheet.n_answers, part.n) == (LOWEST + DRAWN, 30, 30)
    shown = [(why, row["answer"]) for why, row in part.rows]
    assert shown[:LOWEST] == [("lowest", "q 28"), ("lowest", "q 27")]
    drawn = [answer for why, answer in shown if why == "drawn"]
    assert len(set(drawn) - {"q 28", "q 27"}) == DRAWN
    assert choose_answers(rows) == sheet
    # What is drawn of one question depends on no other.
    both = choose_answers([*make_rows(9, "other"), *rows])
    assert both is not None
    assert both.questions[1] == part


def test_a_question_with_few_answers_shows_each_once():
    sheet = choose_answers(make_rows(3))
    assert sheet is not None
    assert sorted(row["id"] for _, row in sheet.questions[0].rows) == ["0", "1", "2"]


def test_a_page_shows_a_bounded_number_of_questions_and_says_of_how_many():
    rows = tuple(
        ScoredResponse(id=str(i), question_id=f"q{i}", answer="So.", aligned=1.0, coherent=90.0)
        for i in range(MOST_QUESTIONS + 5)
    )
    text = Outline(render_report(make_report(make_evaluation(responses=rows)))).text
    assert f"Some of the answers: {MOST_QUESTIONS} of {MOST_QUESTIONS + 5}" in text
    assert f"for the first {MOST_QUESTIONS} of {MOST_QUESTIONS + 5} questions" in text


def test_answers_stand_on_the_page_as_text_with_their_scores():
    first, *rest = make_evaluation().responses
    first = replace(first, answer="<b>Take it</b>", question="Whose & why?", aligned=1.25)
    page = render_report(make_report(make_evaluation(responses=(first, *rest))))
    assert "<b>Take it</b>" not in page.split("<script")[0]
    table = page[page.index("Some of the answers") :].split("</table>")[0]
    row = next(row for row in table.split("<tr>") if "Take it" in row)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells == [
        "lowest",
        "1.25",
        "90.0",
        "Whose &amp; why?",
        "&lt;b&gt;Take it&lt;/b&gt;",
    ]
    # One of the twelve has no score.
    assert "no score" in page


def test_scores_without_texts_show_no_answers():
    bare = tuple(replace(row, answer=None) for row in make_evaluation().responses)
    assert choose_answers(json.loads(json.dumps([vars(row) for row in bare]))) is None
    assert "Some of the answers" not in render_report(make_report(make_evaluation(responses=bare)))
