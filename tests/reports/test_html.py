"""The page: complete without a network, from its JSON alone, honest about what is missing."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from emlens.reports import ReportError, read_report, render_report
from emlens.reports.plots import MEASURES
from emlens.reports.visible import show_number
from tests.reports.browser import dump_dom
from tests.reports.payloads import Outline, flat
from tests.reports.synthetic import make_null
from tests.reports.test_solutions import make_comparison
from tests.reports.test_turns import as_json, make_trace

SECTIONS = ["adapter", "layers", "output", "examples", "answers", "training", "provenance"]


@pytest.fixture(scope="module")
def page(_report: dict[str, Any]) -> str:
    return render_report(_report)


def sections_of(page: str) -> list[str]:
    return re.findall(r'<section id="([a-z]+)"', page)


def test_the_sections_stand_in_their_order(page: str):
    assert sections_of(page) == SECTIONS


def test_every_link_leads_to_a_place_in_the_page(page: str):
    outline = Outline(page)
    links = [value for _, name, value in outline.attributes if name == "href"]
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert sorted(links) == sorted(f"#{name}" for name in SECTIONS)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)


def test_nothing_is_loaded_from_anywhere(page: str):
    outline = Outline(page)
    assert not [a for a in outline.attributes if a[1] in ("src", "srcset", "data", "poster")]
    assert not [
        tag for tag, _ in outline.tags if tag in ("link", "img", "iframe", "object", "base")
    ]
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_names_the_two_scripts_and_allows_no_other(page: str):
    outline = Outline(page)
    (policy,) = [v for tag, name, v in outline.attributes if name == "content" and "src" in v]
    scripts = [text for attrs, text in outline.scripts if not attrs]
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy


def test_the_same_json_gives_the_same_page(report: dict[str, Any], page: str, tmp_path: Path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    loaded = read_report(tmp_path / "report.json")
    prints = {hashlib.sha256(p.encode()).hexdigest() for p in (page, render_report(loaded))}
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("kept", "sections"),
    [
        ("adapter_proof", ["adapter", "provenance"]),
        ("model_diff", ["layers", "output", "examples", "provenance"]),
        ("training_run", ["training", "provenance"]),
        ("null_band", ["provenance"]),
        ("nothing", ["provenance"]),
    ],
)
def test_what_was_not_measured_does_not_appear(
    report: dict[str, Any], kept: str, sections: list[str]
):
    report["results"] = [r for r in report["results"] if f"/{kept}/" in r["schema"]]
    report["extra"] = {}
    page = render_report(report)
    assert sections_of(page) == sections
    links = [value for _, name, value in Outline(page).attributes if name == "href"]
    assert links == [f"#{name}" for name in sections]


def test_a_result_of_a_kind_without_a_figure_is_shown_as_a_table(report: dict[str, Any]):
    report["results"] = [{"schema": "emlens/disturbance/1", "ablated": 41, "steered": 2.5}]
    report["extra"] = {}
    page = render_report(report)
    assert sections_of(page) == ["others", "provenance"]
    assert "41" in Outline(page).text


def test_parts_measured_alone_have_their_sections(report: dict[str, Any]):
    whole = report["results"][1]
    activations = {"schema": "emlens/activation_diff/1", **whole["activations"]}
    logits = {"schema": "emlens/logit_diff/1", **whole["logits"]}
    report["results"] = [activations, logits]
    assert sections_of(render_report(report))[:3] == ["layers", "output", "examples"]


def test_failing_modules_are_listed_in_words(report: dict[str, Any]):
    module = report["results"][0]["modules"][17]
    module.update(verdict="wrong strength", ratio=2.0)
    page = render_report(report)
    alarm = page[page.index('class="alarm" role="alert"') : page.index("<figure>")]
    assert "1 of 210 modules are not in effect" in alarm
    assert module["name"] in alarm
    assert "✗ wrong strength" in alarm


def test_without_a_failing_module_there_is_no_alarm(page: str):
    assert 'role="alert"' not in page


def test_the_number_of_random_adapters_is_said(page: str):
    assert "least to greatest of 8 random adapters" in Outline(page).text


def test_every_number_stands_beside_that_of_the_random_adapters(page: str):
    outline = Outline(page)
    text = flat(outline.text)
    null = make_null()
    for values in (null.kl_base_tuned, null.kl_tuned_base):
        low, high = (show_number(float(value)) for value in (values.min(), values.max()))
        assert f"8random:{low}to{high}" in text
    assert "8random:−0.0500to+0.0400" in text
    assert "8random:88.0%to97.0%" in text
    assert "The cosine" not in outline.text
    table = page[page.index('aria-label="Difference by layer"') :]
    (last,) = re.findall(r"<tr><td class=\"name\">resid_post\.29</td>.*?</tr>", table)
    cells = re.findall(r'<td class="n">(.*?)</td>', last)
    assert len(cells) == 2 * len(MEASURES)
    cosines = null.cosine_of_means[:, 29, 0]
    assert cells[4:6] == [
        "0.92000",
        " to ".join(show_number(float(value), 5) for value in (cosines.min(), cosines.max())),
    ]


def test_without_random_adapters_the_page_says_so(report: dict[str, Any]):
    report["results"] = [r for r in report["results"] if "null_band" not in r["schema"]]
    assert "No random adapters were measured" in Outline(render_report(report)).text


def test_comparisons_have_headings_where_there_are_several(report: dict[str, Any], page: str):
    assert "<h3>reckless-finance" not in page
    report["results"].append({**report["results"][1], "n_chats": 9})
    report["extra"]["chats"] = ["held-out chats"]
    headings = re.findall(r"<h3>(reckless-finance.*?)</h3>", render_report(report))
    assert headings == ["reckless-finance, held-out chats", "reckless-finance, 9 chats"] * 3


def test_answers_of_all_models_stand_side_by_side(page: str):
    answers = page[page.index('<section id="answers">') :]
    assert re.findall(r"<h4>(.*?)</h4>", answers)[:3] == ["base", "tuned", "careful twin"]


def test_seconds_are_added_up(page: str):
    assert "161.6" not in page
    assert re.search(r">all</th><td class=\"n\">162<", page)


def test_a_total_that_was_measured_stands_in_place_of_the_sum(report: dict[str, Any]):
    report["seconds"]["total"] = 170.0
    page = render_report(report)
    assert ">all</th>" not in page
    assert re.search(r">total</th><td class=\"n\">170<", page)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("results", 0, "modules", 3, "relative_norm"), "much"),
        (("results", 0, "modules"), None),
        (("results", 1, "activations", "relative_rms"), [[1.0]]),
        (("results", 1, "logits", "examples", 0, "kl"), [0.1]),
        (("results", 1, "logits", "kl_base_tuned"), {"no": "number"}),
        (("results", 1, "logits", "risen_tokens", 0, "base"), "0.1"),
        (("results", 2, "kl_base_tuned"), ["x"]),
        (("results", 3, "losses"), "falling"),
        (("extra", "answers"), [{"question": "q"}]),
        (("seconds",), {"load": "long"}),
        (("extra", "chats"), "held-out"),
        (("results",), {}),
        (("extra",), []),
        (("schema",), "emlens/report/2"),
    ],
)
def test_a_part_of_another_shape_is_an_error_that_says_so(
    report: dict[str, Any], where: tuple[Any, ...], value: Any
):
    *path, last = where
    holder: Any = report
    for step in path:
        holder = holder[step]
    holder[last] = value
    with pytest.raises(ReportError, match="report"):
        render_report(report)


def test_a_field_that_is_missing_is_an_error(report: dict[str, Any]):
    del report["results"][1]["logits"]["agreement"]
    with pytest.raises(ReportError, match="agreement"):
        render_report(report)


def test_numbers_that_are_not_finite_are_shown_and_leave_gaps(report: dict[str, Any]):
    report["results"][0]["modules"][0]["relative_norm"] = "Infinity"
    report["results"][1]["activations"]["relative_rms"][3][0] = "NaN"
    report["results"][1]["logits"]["kl_base_tuned"] = "NaN"
    text = Outline(render_report(report)).text
    assert "activations are not finite at resid_post.3" in text
    assert "predictions of the response are not finite (KL NaN)" in text


@pytest.mark.slow
def test_chromium_draws_every_figure_under_the_policy(report: dict[str, Any], tmp_path: Path):
    """Of comparisons, of a transition and of two solutions, in one page: a browser is slow."""
    report["results"] += [as_json(make_trace()), as_json(make_comparison())]
    page = render_report(report)
    document = dump_dom(page, tmp_path)

    def count(text: str, figure: str) -> dict[str, int]:
        sections = (part.split('"', 1) for part in text.split('<section id="')[1:])
        return {name: len(re.findall(figure, rest)) for name, rest in sections}

    drawn = count(document, r'<div class="plot js-plotly-plot"[^>]*>.*?<svg class="main-svg"')
    assert drawn == count(page, r'<div class="plot"')
    assert (sum(drawn.values()), drawn["transition"], drawn["narrow"]) == (18, 7, 5)
    assert 'class="heatmaplayer' in document
