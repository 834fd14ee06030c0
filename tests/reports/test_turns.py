"""The section on when a fine-tune turned: its figures hold the trace's numbers, its words too."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.numerics.intervals import Interval
from emlens.organisms.transition import LastScore, PhaseTransition
from emlens.reports import ReportError, plot, read_report, render_report, write_report
from emlens.reports.paths import list_figures, plot_behaviour, plot_bends, plot_plane
from emlens.reports.sections import sort_results
from emlens.reports.turns import read_turn, say_turn
from emlens.reports.verdict import write_verdicts
from emlens.studies.transition_trace import (
    BehaviourCurve,
    BehaviourPoint,
    OddsCurve,
    TrainingCurves,
    TransitionTrace,
)
from tests.reports.payloads import PAYLOADS, Outline, check_text_stays_text

STEPS = torch.arange(0, 500, 5)


def make_path(**changed: Any) -> PhaseTransition:
    """A path that turns at step 190."""
    cosine = -0.97 + 0.2 * torch.exp(-((STEPS[10:-10].double() - 190) ** 2) / 800)
    made = PhaseTransition(
        source="runs/organism",
        factor="B",
        normalised=False,
        window=50,
        threshold=0.03,
        verdict="turn",
        step=190,
        prominence=float(cosine.max() - cosine.median()),
        critical=0.08,
        null_quantiles={"straight": 0.08, "decay": 0.05},
        sharpest=190,
        steps=STEPS[10:-10],
        local_cosine=cosine,
        n_uneven=20,
        n_small=0,
        dimension=300,
        all_steps=STEPS,
        norms=torch.linspace(0, 0.13, len(STEPS)).double(),
        coordinates=torch.stack(
            [STEPS / 500, (STEPS - 190).abs() / 500, 0 * STEPS], dim=1
        ).double(),
        explained=torch.tensor([0.811, 0.139, 0.01]).double(),
    )
    return replace(made, **changed)


def around(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half, 0.95, "percentiles of 2000 draws")


def make_curve(measure: Any, scale: float, onset: float | None) -> BehaviourCurve:
    steps = STEPS if measure == "odds" else STEPS[::20]
    means = torch.sigmoid((steps.double() - (onset or 9999)) / 20)
    return BehaviourCurve(
        measure=measure,
        scale=scale,
        steps=steps,
        means=means,
        rolling=means,
        change=around(1.0 if onset else 0.01, 0.1),
        onset=None if onset is None else around(onset, 12.0),
        lag=None if onset is None else around(onset - 190, 12.0),
    )


def make_trace(**changed: Any) -> TransitionTrace:
    """A turn at 190, behaviour at 260 and 210, and none at the first scale's odds."""
    points = [
        BehaviourPoint(
            scale=scale,
            step=step,
            n=80,
            n_unscored=3,
            em_percent=around(20.0 + step / 10, 9.0),
            coherent_percent=around(90.0, 5.0),
            by_question={"wish": 20.0, "work": 30.0},
            run=f"behaviour/scale_{scale:g}/step_{step}",
        )
        for scale in (1.0, 5.0)
        for step in STEPS[::20].tolist()
    ]
    curves = [
        make_curve("odds", 1.0, None),
        make_curve("share", 1.0, 260.0),
        make_curve("odds", 5.0, 230.0),
        make_curve("share", 5.0, 210.0),
    ]
    made = TransitionTrace(
        source="runs/organism",
        training=TrainingCurves(
            steps=STEPS,
            norms_A=torch.linspace(1, 1.1, len(STEPS)),
            norms_B=torch.linspace(0, 0.13, len(STEPS)),
            logged_steps=torch.arange(1, 496),
            losses=torch.linspace(3, 1, 495),
            gradient_norms=torch.full((495,), float("nan")),
        ),
        transitions=(make_path(), make_path(normalised=True, verdict="none", step=None)),
        base="emlens:smollm2",
        judge="contrast/1",
        claim="takeover score",
        meaning="What it means.",
        odds=tuple(
            OddsCurve(scale=scale, steps=STEPS, odds=torch.zeros(2, len(STEPS)))
            for scale in (1.0, 5.0)
        ),
        points=tuple(points),
        curves=tuple(curves),
    )
    return replace(made, **changed)


def as_json(result: Any) -> dict[str, Any]:
    return json.loads(json.dumps(result.to_dict()))


def make_report(*results: Any) -> dict[str, Any]:
    documents = [as_json(result) for result in results]
    return {
        "schema": "emlens/report/1",
        "emlens_version": "0",
        "results": documents,
        "extra": {},
    }


def test_bends_stand_in_the_band_of_null_paths_with_the_turn_marked():
    path = make_path()
    figure = plot_bends(as_json(path)).to_dict()
    low, high, line = figure["data"]
    assert list(line["y"]) == pytest.approx(path.local_cosine.tolist())
    median = float(path.local_cosine.median())
    assert low["y"][0] == pytest.approx(median)
    assert high["y"][0] == pytest.approx(median + path.critical)
    assert max(line["y"]) > high["y"][0]
    (mark,) = figure["layout"]["shapes"]
    assert mark["x0"] == mark["x1"] == 190
    straight = plot_bends(as_json(make_path(verdict="none", step=None))).to_dict()
    assert "shapes" not in straight["layout"]


def test_a_path_of_which_nothing_was_measured_is_drawn_without_a_band():
    nothing = torch.zeros(0, dtype=torch.int64)
    path = make_path(
        verdict="nothing measured",
        step=None,
        sharpest=None,
        prominence=float("nan"),
        steps=nothing,
        local_cosine=nothing.double(),
    )
    figure: Any = plot_bends(as_json(path))
    assert len(figure.data) == 1
    assert "a larger --window or a smaller --threshold keeps" in say_turn(as_json(path))
    assert "none" in Outline(render_report(make_report(path))).text


def test_the_plane_marks_the_point_of_the_turn():
    path = make_path()
    points, mark = plot_plane(as_json(path)).to_dict()["data"]
    assert list(points["marker"]["color"]) == STEPS.tolist()
    place = STEPS.tolist().index(190)
    assert (mark["x"][0], mark["y"][0]) == (points["x"][place], points["y"][place])
    *_, widest = plot_plane(as_json(replace(path, plane_turn=205))).to_dict()["data"]
    assert widest["x"][0] == points["x"][STEPS.tolist().index(205)]
    assert "step 205" in widest["hovertemplate"]


@pytest.mark.parametrize("measure", ["odds", "share"])
def test_behaviour_stands_below_the_rotation_by_scale_with_its_onset(measure: str):
    trace = make_trace()
    figure = plot_behaviour(read_turn(as_json(trace)), measure).to_dict()
    curves = [curve for curve in trace.curves if curve.measure == measure]
    lines = [t for t in figure["data"] if t.get("name", "").endswith("×")]
    assert [line["name"] for line in lines] == ["1 ×", "5 ×"]
    for line, curve in zip(lines, curves, strict=True):
        assert list(line["y"]) == pytest.approx(curve.rolling.tolist())
    diamonds = [t for t in figure["data"] if t.get("marker", {}).get("symbol") == "diamond"]
    dated = [curve for curve in curves if curve.onset is not None]
    assert [t["x"][0] for t in diamonds] == [curve.onset.value for curve in dated if curve.onset]
    assert all(t["error_x"]["array"] == [12.0] for t in diamonds)
    bars = [t for t in figure["data"] if "error_y" in t]
    assert len(bars) == (2 if measure == "share" else 0)
    if bars:
        assert list(bars[0]["error_y"]["array"]) == pytest.approx([9.0] * 5)
    assert len(figure["layout"]["shapes"]) == 2  # the turn, through both panels


def test_what_was_not_logged_has_no_figure():
    titles = [one.title for one in list_figures(read_turn(as_json(make_trace())))]
    assert titles == [
        "Local cosine of B, window 50",
        "Local cosine of B, norms taken out, window 50",
        "Norms of A and B",
        "Training loss",
        "Path of B in its plane",
    ]


def test_likeness_to_the_last_step_is_drawn_by_score_where_there_is_any():
    values = torch.linspace(-1, 1, len(STEPS)).double()
    values[0] = float("nan")
    kinds: list[tuple[Any, Any]] = [("cross", "none"), ("gram", "adapters")]
    likeness = tuple(
        LastScore(score=score, centring=centring, steps=STEPS, values=values)
        for score, centring in kinds
    )
    found = read_turn(as_json(make_trace(likeness=likeness)))
    (drawn,) = [one for one in list_figures(found) if one.title == "Likeness to the last step"]
    cross, gram = drawn.figure.to_dict()["data"]
    assert (cross["name"], gram["name"]) == ("cross", "gram, centred over adapters")
    assert cross["y"][0] is None
    assert list(cross["y"][1:]) == pytest.approx(values[1:].tolist())


def test_the_sentence_names_turn_and_lag_with_its_interval_or_none():
    trace = make_trace()
    (sentence,) = write_verdicts(sort_results(make_report(trace)["results"]))
    assert sentence.startswith(
        "runs/organism: B turned at step 190 (window 50): prominence 0.200, and 95 % of null paths "
        "stay below 0.0800; but B, norms taken out (window 50): did not turn: its sharpest bend "
        "has a prominence of 0.200, and paths of noise reach 0.0800; takeover score: at 1 × "
        "half-way at step 260 [248, 272] (drawn in between the points at 200 and 300), "
        "+70.0 [+58.0, +82.0] steps from the turn, at 5 ×"
    )
    straight = make_trace(
        transitions=(make_path(verdict="none", step=None),), curves=(make_curve("odds", 5.0, None),)
    )
    (sentence,) = write_verdicts(sort_results(make_report(straight)["results"]))
    assert "B (window 50): did not turn: its sharpest bend has a prominence of 0.200" in sentence
    assert "odds: at 5 × no change (+0.0100 [−0.0900, +0.110])" in sentence


def test_the_section_holds_figures_tables_and_provenance():
    page = render_report(make_report(make_trace()))
    text = Outline(page).text
    assert re.findall(r'<section id="([a-z]+)"', page) == ["transition", "provenance"]
    assert '<a href="#transition">' in page
    assert page.count('<div class="plot"') == 2 + 5
    assert "What it means." in text
    table = page[page.index('aria-label="Onset and lag by scale"') :].split("</table>")[0]
    rows = [re.findall(r">([^<>]+)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows[0][:5] == ["odds", "1", "0.0100 [−0.0900, 0.110]", "none", "none"]
    assert rows[1][0] == "takeover score"
    assert rows[3][3:5] == ["210 [198, 222]", "20.0 [8.00, 32.0]"]
    assert text.count("behaviour/scale_5/step_400") == 1
    assert "contrast/1" in text
    assert "emlens:smollm2" in text


def test_a_path_alone_has_a_section_and_no_behaviour():
    page = render_report(make_report(make_path(verdict="none", step=None)))
    assert page.count('<div class="plot"') == 2
    assert "Onset and lag" not in page
    assert 'id="others"' not in page


def test_stages_are_not_shown_beside_the_trace_that_holds_them():
    trace = make_trace()
    stages = [*trace.transitions, *trace.odds, make_path(window=25)]
    sections = sort_results(make_report(trace, *stages)["results"])
    assert [turn["schema"] for turn in sections.turns] == [
        "emlens/transition_trace/1",
        "emlens/phase_transition/1",
    ]
    assert sections.turns[1]["window"] == 25
    assert sections.others == ()


@pytest.mark.parametrize("result", [make_trace(), make_trace(curves=(), points=()), make_path()])
def test_each_can_be_plotted_alone(result: Any):
    figure: Any = plot(result)
    assert len(figure.data) > 2
    assert plot(as_json(result)) == figure


@pytest.mark.parametrize("payload", [PAYLOADS[0], PAYLOADS[-1], "".join(PAYLOADS)])
def test_no_text_of_a_trace_is_more_than_text(payload: str):
    report = make_report(make_trace(), make_path())
    check_text_stays_text(report, payload)


@pytest.mark.parametrize("lost", ["transitions", "source"])
def test_a_trace_of_another_shape_is_named(lost: str):
    report = make_report(make_trace())
    del report["results"][0][lost]
    with pytest.raises(ReportError, match=r"transition|verdict"):
        render_report(report)


def test_a_trace_is_reported_from_its_json_alone(tmp_path: Path):
    path = write_report([make_trace()], tmp_path / "report.html")
    again = render_report(read_report(path.with_suffix(".json")))
    assert again == path.read_text("utf-8")
