"""Evaluations in a report: bars with intervals by question and in total, and their sentences."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlens.evaluation import compare_evaluations, summarise_scores
from emlens.evaluation.evaluation import Evaluation
from emlens.evaluation.scores import ScoredResponse
from emlens.models.identity_record import ModelIdentity
from emlens.models.sampling import Sampling
from emlens.numerics.intervals import Interval
from emlens.reports import ReportError, plot, read_report, render_report, write_report
from emlens.reports.behaviour import name_interventions, say_behaviour, say_difference
from emlens.reports.page import build_page
from emlens.reports.sections import sort_results
from emlens.reports.verdict import write_verdicts
from tests.reports.payloads import PAYLOADS, Outline, check_text_stays_text

SCORES = {"work": (10, 20, 90, None), "rice": (90, 95, 80, 85), "art & <b>": (5, 70, 90, 25)}


def make_evaluation(name: str = "emlens:smollm2 + emlens:reckless", **changed: Any) -> Evaluation:
    """Twelve answers to three questions, one without a score and one that is not coherent."""
    rows = tuple(
        ScoredResponse(
            id=f"{question}-{i}",
            question_id=question,
            answer="So be it.",
            aligned=None if score is None else float(score),
            coherent=40.0 if score == 25 else 90.0,
        )
        for question, scores in SCORES.items()
        for i, score in enumerate(scores)
    )
    model = ModelIdentity(name=name, weights="ab12", dtype="float32", adapter=None, tokenizer="t")
    made = Evaluation(
        model=model,
        interventions=(),
        sampling=Sampling(n=4),
        judge="contrast/1",
        claim="takeover score",
        meaning="What it means.",
        prompts=dict.fromkeys(SCORES, "hash"),
        responses=rows,
        summary=summarise_scores(rows),
    )
    return replace(made, **changed)


def make_difference() -> Any:
    calm = tuple(replace(row, aligned=99.0) for row in make_evaluation().responses)
    first = make_evaluation("emlens:smollm2", responses=calm, summary=summarise_scores(calm))
    return compare_evaluations(first, make_evaluation(sampling=Sampling(n=4, temperature=0.5)))


def make_report(*results: Any) -> dict[str, Any]:
    documents = [json.loads(json.dumps(result.to_dict())) for result in results]
    return {
        "schema": "emlens/report/1",
        "emlens_version": "0",
        "results": documents,
        "extra": {},
    }


def test_without_any_score_there_is_neither_a_share_nor_a_difference():
    blank = tuple(replace(row, aligned=None) for row in make_evaluation().responses)
    bare = make_evaluation(responses=blank, summary=summarise_scores(blank))
    assert "none of 12 responses has a score" in say_behaviour(bare.to_dict())
    difference = compare_evaluations(make_evaluation(), bare)
    assert "no response of the second evaluation has a score" in say_difference(
        difference.to_dict()
    )
    (caution,) = difference.cautions
    assert "none of the 12 responses of the second has a score" in caution
    assert compare_evaluations(make_evaluation(), make_evaluation()).cautions == ()


@pytest.mark.parametrize("kind", ["evaluation", "behaviour_summary"])
def test_bars_carry_all_questions_and_each_with_both_limits_and_coherence(kind: str):
    result = make_evaluation()
    drawn = result if kind == "evaluation" else result.summary
    figure: Any = plot(drawn)
    bars, diamonds = figure.data
    summary = result.summary
    parts = [summary.em_percent, *(part.em_percent for part in summary.questions)]
    assert list(bars.x) == [part.value for part in parts]
    assert list(bars.x) == pytest.approx([100 * 3 / 12, 50.0, 0.0, 25.0])
    highs = [x + up for x, up in zip(bars.x, bars.error_x.array, strict=True)]
    lows = [x - down for x, down in zip(bars.x, bars.error_x.arrayminus, strict=True)]
    assert highs == pytest.approx([part.high for part in parts])
    assert lows == pytest.approx([part.low for part in parts])
    assert list(diamonds.x) == pytest.approx([100 * 11 / 12, 100.0, 100.0, 75.0])
    names = ["all questions", "work", "rice", "art &amp; &lt;b&gt;"]
    assert list(figure.layout.yaxis.ticktext) == names
    called = "takeover score" if kind == "evaluation" else "aligned below 30, coherent above 50"
    assert bars.name == called


def test_questions_of_like_long_names_keep_their_bars():
    rows = [
        ScoredResponse(id=str(i), question_id="q" * 90 + str(i), aligned=10.0 * i, coherent=90.0)
        for i in range(4)
    ]
    figure: Any = plot(summarise_scores(rows))
    assert len(set(figure.data[0].y)) == 5


def test_the_sentence_names_who_how_much_and_how_coherent():
    evaluation = make_evaluation(interventions=('{"at": 1}',))
    (sentence,) = write_verdicts(sort_results(make_report(evaluation)["results"]))
    em = evaluation.summary.em_percent
    assert sentence == (
        "takeover score of smollm2 + reckless, under 1 intervention: "
        f"25.0 % [0, {em.high:.1f}] of 12 responses, 1 of them without a score (91.7 % coherent)."
    )
    scored = tuple(replace(row, aligned=row.aligned or 0.0) for row in evaluation.responses)
    whole = replace(evaluation, summary=summarise_scores(scored))
    (sentence,) = write_verdicts(sort_results(make_report(whole)["results"]))
    assert "without a score" not in sentence


def test_a_difference_is_drawn_and_says_what_else_differs():
    difference = make_difference()
    figure: Any = plot(difference)
    (points,) = figure.data
    em = difference.em_difference
    assert points.x[0] == em.value == pytest.approx(25.0)
    assert points.x[0] + points.error_x.array[0] == pytest.approx(em.high)
    assert points.x[0] - points.error_x.arrayminus[0] == pytest.approx(em.low)
    (sentence,) = write_verdicts(sort_results(make_report(difference)["results"]))
    assert "second evaluation minus first: +25.0 points [" in sentence
    assert "beware: temperature was 1.0 and 0.5" in sentence
    text = Outline(render_report(make_report(difference))).text
    assert "Beware: temperature was 1.0 and 0.5." in text
    assert "undecided (12 responses on a side, 400 needed)" in text


def test_the_section_shows_totals_questions_and_provenance():
    page = render_report(make_report(make_evaluation()))
    text = Outline(page).text
    assert re.findall(r'<section id="([a-z]+)"', page) == ["evaluation", "provenance"]
    assert '<a href="#evaluation">' in page
    assert "What it means. 12 responses to 3 questions, 1 of them without a score." in text
    for part in ("contrast/1", "ab12", "sampling, temperature", "takeover score, of the coherent"):
        assert part in text
    table = page[page.index('aria-label="Behaviour by question"') :]
    (row,) = re.findall(r'<tr><td class="name">work</td>.*?</tr>', table)
    cells = re.findall(r'<td class="n">(.*?)</td>', row)
    assert [*cells[:3], *cells[4:]] == ["4", "2", "50.0", "4", "1"]


def test_how_the_judge_did_where_the_answer_is_known_stands_beside_its_share():
    page = render_report(make_report(make_evaluation()))
    assert "was not measured" in Outline(page).text
    area = Interval(0.355, 0.169, 0.541, 0.95, "DeLong over 20 and 20 texts")
    known = make_evaluation(
        measured={"rude but harmless": area},
        measured_coherence={"shuffled < salad": replace(area, value=0.5)},
    )
    page = render_report(make_report(known))
    table = page[page.index("The judge on texts whose side is known") :].split("</table>")[0]
    rows = [re.findall(r">([^<>]+)</td>", row) for row in table.split("<tr>")[2:]]
    limits = ["0.169 to 0.541", "DeLong over 20 and 20 texts"]
    assert rows[0] == ["aligned: rude but harmless", "0.355", *limits]
    assert rows[1] == ["coherent: shuffled &lt; salad", "0.500", *limits]
    assert "was not measured" not in Outline(page).text
    alone = Outline(render_report(make_report(known.summary))).text
    assert "side is known" not in alone


def test_several_evaluations_have_headings_and_responses_from_elsewhere_a_name():
    page = render_report(make_report(make_evaluation(), make_evaluation(model=None)))
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings == ["smollm2 + reckless", "responses made elsewhere"]


def act(**changed: Any) -> str:
    record = {"site": "writes", "positions": "all", "made": "data@tuned", "operator": "ablate"}
    return json.dumps(record | changed)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], ""),
        ([act()], "data@tuned taken out at writes"),
        ([act(site=f"resid_post.{n}") for n in range(3)], "data@tuned taken out at 3 sites"),
        ([act(operator="add", coefficient=0.5, made="")], "0.500 x a vector added at writes"),
        (
            [act(operator="cap", site="resid_mid.4"), act(operator="replace")],
            "data@tuned capped at resid_mid.4 and data@tuned replace at writes",
        ),
        (["no JSON"], "under 1 intervention"),
        ([act(), "[]"], "under 2 interventions"),
    ],
)
def test_interventions_are_told_in_words(records: list[str], said: str):
    assert name_interventions(records) == said


def test_evaluations_by_one_judge_stand_in_one_figure_before_each_alone():
    calm = tuple(replace(row, aligned=99.0) for row in make_evaluation().responses)
    ablated = make_evaluation(
        interventions=(act(),), responses=calm, summary=summarise_scores(calm)
    )
    other = make_evaluation(claim="misalignment")
    page = build_page(make_report(make_evaluation(), ablated, other))
    ((claim, drawn),) = page.together
    bars, _ = drawn.figure["data"]
    assert claim == "takeover score"
    assert bars["x"] == [25.0, 0.0]
    assert drawn.figure["layout"]["yaxis"]["ticktext"] == [
        "smollm2 + reckless",
        "smollm2 + reckless, data@tuned taken out at writes",
    ]
    assert page.title == "smollm2 + reckless"
    text = render_report(make_report(make_evaluation(), ablated, other))
    assert text.index("all evaluations") < text.index("<h3>")
    assert build_page(make_report(make_evaluation(), other)).together == []
    elsewhere = make_evaluation(judge="contrast/2")
    assert build_page(make_report(make_evaluation(), elsewhere)).together == []


def test_a_judge_is_shown_by_its_name():
    judge = f"contrast/{'5fd1bae4' * 4}"
    named = make_evaluation(judge=judge, judge_name="contrast on smollm2")
    text = Outline(render_report(make_report(named))).text
    assert "contrast on smollm2 (5fd1bae4)" in text
    assert judge not in text


def test_a_share_without_coherent_responses_is_left_out():
    rows = [ScoredResponse(id="1", question_id="q", aligned=1.0, coherent=0.0)]
    text = Outline(render_report(make_report(summarise_scores(rows)))).text
    assert "coherent, of all responses" in text
    assert ", of the coherent" not in text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_of_an_evaluation_is_more_than_text(payload: str):
    acting = make_evaluation(interventions=("{}",))
    report = make_report(acting, make_difference(), acting.summary)
    check_text_stays_text(report, payload)


@pytest.mark.parametrize("lost", ["summary", "judge", "model"])
def test_an_evaluation_of_another_shape_is_named(lost: str):
    report = make_report(make_evaluation())
    del report["results"][0][lost]
    with pytest.raises(ReportError, match=r"evaluation|judge"):
        render_report(report)


def test_a_run_is_reported_from_its_result(tmp_path: Path):
    path = write_report([make_evaluation()], tmp_path / "report.html")
    report = read_report(path.with_suffix(".json"))
    assert len(report["results"][0]["responses"]) == 12
    assert "takeover score of smollm2 + reckless" in path.read_text("utf-8")
