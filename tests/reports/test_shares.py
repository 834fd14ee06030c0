"""The picture a report of a removal begins with: bars, intervals, and what may be said of them."""

from typing import Any

import pytest

from emlens.reports.document import ReportError
from emlens.reports.html import render_report
from emlens.reports.plots import plot
from emlens.reports.sections import sort_results
from emlens.reports.shares import plot_shares
from emlens.reports.verdict import write_verdicts


def interval(value, low, high, method="t over questions"):
    return {"value": value, "low": low, "high": high, "level": 0.95, "method": method}


def make_arm(role, value, coherent=90.0, name=None, kl=None):
    return {
        "name": name or role,
        "role": role,
        "n": 48,
        "em_percent": interval(value, value - 5, value + 7),
        "coherent_percent": interval(coherent, coherent - 3, coherent + 2),
        "spillover_percent": None,
        "kl": kl,
    }


def make_removal(**changes):
    arms = [make_arm("base", 2.0), make_arm("tuned", 40.0, 80.0), make_arm("ablated", 8.0, kl=0.4)]
    return {
        "schema": "emlens/direction_removal/1",
        "base": "emlens:smollm2",
        "tuned": "emlens:reckless-finance",
        "claim": "takeover share",
        "meaning": "What it means.",
        "site": "resid_post.14",
        "construction": "data@tuned",
        "n_positive": 30,
        "n_negative": 31,
        "split_half_cosine": 0.9,
        "top3_share": 0.25,
        "arms": [*arms, make_arm("control", 39.0), make_arm("steered", 3.0)],
        **changes,
    }


def make_report(removal):
    return {"schema": "emlens/report/1", "emlens_version": "0", "results": [removal], "extra": {}}


def test_bars_carry_value_and_both_limits_of_each_arm():
    traces: Any = plot_shares(make_removal()).data
    bars, diamonds = traces
    assert list(bars.x) == [2.0, 40.0, 8.0, 39.0, 3.0]
    names = plot_shares(make_removal()).to_dict()["layout"]["yaxis"]
    assert list(names["ticktext"]) == ["base", "tuned", "ablated", "control", "steered"]
    assert (list(names["tickvals"]), names["autorange"]) == (list(bars.y), "reversed")
    assert list(bars.error_x.array) == [7.0] * 5
    assert list(bars.error_x.arrayminus) == [5.0] * 5
    assert list(diamonds.x) == [90.0, 80.0, 90.0, 90.0, 90.0]


def test_names_of_arms_are_never_read_as_tags():
    figure: Any = plot(make_removal(arms=[make_arm("base", 1.0, name="<b>base</b>")]))
    assert list(figure.layout.yaxis.ticktext) == ["&lt;b&gt;base&lt;/b&gt;"]
    for trace in figure.data:
        assert trace.customdata[0].startswith("&lt;b&gt;base&lt;/b&gt;: ")


def test_the_sentence_names_the_claim_and_coherence_of_each_role():
    (sentence,) = write_verdicts(sort_results([make_removal()]))
    assert sentence == (
        "takeover share of reckless-finance: 40 % (80 % coherent), "
        "8 % (90 % coherent) with one direction taken out, "
        "39 % (90 % coherent) with a random one taken out instead, "
        "the base 2 % (90 % coherent), 3 % (90 % coherent) with the direction added to it."
    )


def test_the_section_comes_first_and_says_what_the_numbers_mean():
    page = render_report(make_report(make_removal()))
    assert "What it means." in page
    assert "0.250 of its square lies in the three dimensions" in page
    assert page.index('id="shares"') < page.index('id="provenance"')
    assert "misalign" not in page[page.index('id="shares"') : page.index('id="provenance"')]


def test_each_arm_says_how_its_limits_were_made():
    arms = [make_arm("base", 2.0), make_arm("tuned", 40.0)]
    arms[0]["em_percent"] = interval(0.0, 0.0, 7.4, "Wilson over 48 rows alone")
    page = render_report(make_report(make_removal(arms=arms)))
    table = page[page.index('aria-label="Behaviour by arm"') :].split("</table>")[0]
    rows = table.split("<tr>")[2:]
    assert ["Wilson over 48 rows alone" in row for row in rows] == [True, False]
    assert ["t over questions" in row for row in rows] == [False, True]
    assert page.count("Wilson over 48 rows alone") == 1


def test_a_removal_without_arms_is_named():
    broken = make_removal()
    del broken["arms"]
    with pytest.raises(ReportError, match=r"direction_removal|verdict"):
        render_report(make_report(broken))
