"""The section on narrow and general solutions: figures, shares, and what is claimed of them."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from emlens.organisms.gradients import GradientPreference
from emlens.reports import ReportError, plot, render_report
from emlens.reports.curves import plot_effect, plot_efficiency, plot_preference, plot_stability
from emlens.reports.sections import sort_results
from emlens.reports.solutions import say_narrowness
from emlens.reports.verdict import write_verdicts
from emlens.studies.solution_curves import RandomEffect, SolutionComparison, SolutionCurves
from tests.reports.payloads import PAYLOADS, Outline, check_text_stays_text
from tests.reports.test_turns import as_json, make_report
from tests.studies.test_measure_narrowness import decide, planted

NORMS = (0.5, 1.0, 2.0)


def make_curves(name: str, losses: tuple[float, ...], kl: tuple[float, ...]) -> SolutionCurves:
    increase = torch.tensor([[0.0, 0.1], [0.4, 0.6], [1.0, 1.2]])
    return SolutionCurves(
        name=name,
        norm=1.0,
        base_loss=3.0,
        loss=losses[1],
        norms=NORMS,
        losses=losses,
        epsilons=(0.1, 0.4, 1.0),
        loss_increase=increase if "general" in name else 1.5 * increase,
        kl=kl,
    )


def make_comparison(**changed: Any) -> SolutionComparison:
    made = SolutionComparison(
        base="emlens:smollm2",
        general=make_curves("runs/general", (2.5, 2.0, 1.9), (0.1, 0.4, 0.9)),
        narrow=make_curves("runs/narrow", (2.7, 2.2, 1.8), (0.05, 0.1, 0.2)),
        random=RandomEffect(norms=NORMS, kl=torch.tensor([[0.02, 0.06], [0.05, 0.1], [0.1, 0.5]])),
        preference=GradientPreference(
            steps=torch.tensor([0, 10]),
            names=("general", "narrow"),
            cosines=torch.tensor([[0.4, 0.2], [0.1, 0.05]]),
            norms=torch.tensor([1.0, 0.5]),
        ),
        behaviour=decide(two=planted(0.3)),
    )
    return replace(made, **changed)


def test_efficiency_stability_and_effect_carry_the_numbers_and_the_random_span():
    document = as_json(make_comparison())
    general, trained, narrow, _ = plot_efficiency(document).to_dict()["data"]
    assert (list(general["y"]), list(narrow["y"])) == ([2.5, 2.0, 1.9], [2.7, 2.2, 1.8])
    assert (trained["x"], trained["y"]) == ([1.0], [2.0])
    (base,) = plot_efficiency(document).to_dict()["layout"]["shapes"]
    assert base["y0"] == 3.0
    stable, weak = plot_stability(document).to_dict()["data"]
    assert list(stable["y"]) == pytest.approx([0.05, 0.5, 1.1])
    assert list(weak["y"]) == pytest.approx([0.075, 0.75, 1.65])
    assert stable["error_y"]["array"] == pytest.approx([0.05, 0.1, 0.1])
    low, high, first, second = plot_effect(document).to_dict()["data"]
    assert list(low["y"]) == pytest.approx([0.02, 0.05, 0.1])
    assert list(high["y"]) == pytest.approx([0.06, 0.1, 0.5])
    assert list(first["y"]) == [0.1, 0.4, 0.9]
    assert list(second["y"]) == [0.05, 0.1, 0.2]
    one, other = plot_preference(document["preference"]).to_dict()["data"]
    assert (one["name"], list(other["y"])) == ("general", pytest.approx([0.1, 0.05]))


def test_the_sentence_counts_norms_and_names_what_is_left():
    comparison = make_comparison()
    (sentence,) = write_verdicts(sort_results(make_report(comparison)["results"]))
    assert sentence.startswith(
        "runs/general (general) and runs/narrow (narrow): the general solution has the lower loss "
        "at 2 of 3 norms; perturbed by 0.4 it loses 50.0 % of its gain, the narrow one 75.0 %; it "
        "does more to general text at 3 of 3 norms, more than every random adapter at 3 (the "
        "narrow one at 0)"
    )
    assert "outside of its domain, less the base's: more than the base's: at 1 ×" in sentence
    narrow = say_narrowness(as_json(decide()))
    assert "nothing is left at any scale: at 1 × equivalent (0 points" in narrow
    assert "in its domain, at 1 ×: +50.0 points" in narrow
    assert "because" not in narrow
    broken = say_narrowness(as_json(decide(two=planted(0.0, coherent=10))))
    assert "undecided because outside at scale 2: the coherent share may have fallen" in broken


def test_the_section_shows_shares_differences_and_the_rule():
    page = render_report(make_report(make_comparison()))
    text = Outline(page).text
    assert re.findall(r'<section id="([a-z]+)"', page) == ["narrow", "provenance"]
    assert '<a href="#narrow">' in page
    assert page.count('<div class="plot"') == 5
    table = page[page.index('aria-label="Shares in and out of the domain"') :].split("</table>")[0]
    rows = [re.findall(r">([^<>]+)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[0] for row in rows] == [
        "base, in the domain",
        "base, outside",
        "general, in the domain",
        "general, outside",
        "narrow at 1 ×, in the domain",
        "narrow at 1 ×, outside",
        "narrow at 2 ×, in the domain",
        "narrow at 2 ×, outside",
    ]
    assert rows[0][1:4] == ["448", "0", "0"]
    less = page[page.index('aria-label="Narrow organism less base"') :].split("</table>")[0]
    verdicts = re.findall(r'<td class="name">(equivalent|more|undecided): ', less)
    assert verdicts == ["more", "equivalent", "more", "more"]
    assert "400 responses on either side to at least 6 questions" in text
    effects = page[page.index('aria-label="Loss and effect by norm"') :].split("</table>")[0]
    assert "0.0200 to 0.0600" in effects


def test_what_was_not_measured_is_left_out():
    page = render_report(make_report(make_comparison(preference=None, behaviour=None)))
    assert page.count('<div class="plot"') == 3
    assert "Shares in and out" not in page
    alone = render_report(make_report(decide()))
    assert alone.count('<div class="plot"') == 1
    assert "Loss and effect" not in alone
    assert "nothing is left at any scale" in Outline(alone).text


def test_stages_are_not_shown_beside_the_comparison_that_holds_them():
    found = make_comparison()
    parts = [found.general, found.narrow, found.random, found.preference, found.behaviour]
    sections = sort_results(make_report(*parts, found)["results"])
    assert [s["schema"] for s in sections.solutions] == ["emlens/solution_comparison/1"]
    assert sections.others == ()
    alone = sort_results(make_report(found.general)["results"])
    assert len(alone.others) == 1


def test_each_can_be_plotted_alone():
    found = make_comparison()
    for result in (found, found.preference, found.behaviour):
        assert result is not None
        figure: Any = plot(result)
        assert len(figure.data) >= 2
        assert plot(as_json(result)) == figure


@pytest.mark.parametrize("payload", [PAYLOADS[0], PAYLOADS[-1], "".join(PAYLOADS)])
def test_no_text_of_a_comparison_is_more_than_text(payload: str):
    report = make_report(make_comparison(), decide())
    check_text_stays_text(report, payload)


@pytest.mark.parametrize("lost", ["general", "behaviour", "random"])
def test_a_comparison_of_another_shape_is_named(lost: str):
    report: dict[str, Any] = json.loads(json.dumps(make_report(make_comparison())))
    del report["results"][0][lost]
    with pytest.raises(ReportError, match=r"narrow|verdict"):
        render_report(report)
