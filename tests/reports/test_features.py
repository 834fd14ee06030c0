"""The section on latents: its figures hold the search's numbers, its words and tables too."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlens.features import contrast_features, rank_features
from emlens.reports import ReportError, plot, render_report
from emlens.reports.brief import describe_briefly
from emlens.reports.document import make_report
from emlens.reports.feature_blocks import make_table
from emlens.reports.feature_figures import plot_models, plot_overview, plot_steering, plot_warning
from emlens.reports.sections import sort_results
from emlens.reports.verdict import write_verdicts
from tests.features.comparisons import make_diff
from tests.reports.browser import dump_dom
from tests.reports.payloads import PAYLOADS, Outline, check_text_stays_text
from tests.reports.searches import (
    LATENTS,
    NAMES,
    make_cards,
    make_classification,
    make_feature,
    make_health,
    make_screen,
    make_search,
    make_warning,
)

torch = pytest.importorskip("torch")


def as_json(result: Any) -> dict[str, Any]:
    return json.loads(json.dumps(describe_briefly(result), allow_nan=False))


def page_of(*results: Any) -> str:
    return render_report(json.loads(json.dumps(make_report(list(results)), allow_nan=False)))


def test_change_stands_against_effect_with_what_random_directions_reach():
    document = as_json(make_search())
    figure = plot_overview(document).to_dict()
    added, taken = figure["data"]
    assert list(added["x"]) == pytest.approx([1.5, 2.3, -0.9])
    assert list(added["y"]) == pytest.approx([0.3, 0.02, 0.04])
    assert list(taken["y"]) == pytest.approx([0.3, 0.02, 0.04])
    lines = [shape["y0"] for shape in figure["layout"]["shapes"]]
    assert lines == pytest.approx([0.1, 0.1])
    alone = plot_overview(as_json(make_search(screen=None))).to_dict()
    assert list(alone["data"][0]["x"]) == pytest.approx([1.5, 2.3, -0.9])


def test_steering_is_drawn_in_the_order_of_the_strengths_beside_the_controls():
    screen = as_json(make_search())["screen"]
    figure = plot_steering(screen, 12).to_dict()
    low, high, line = figure["data"][:3]
    assert list(line["x"]) == [-1.0, 1.0, 2.0]
    assert list(line["y"]) == pytest.approx([0.1, 0.2, 0.3])
    assert (low["y"][0], high["y"][0]) == (pytest.approx(-0.1), pytest.approx(0.1))
    assert "16 random" in high["customdata"][0]
    low, high, behaviour, incoherent = figure["data"][3:7]
    # What the sixteen scored at least and at most, from the unsteered model's own score.
    assert list(low["x"]) == list(high["x"]) == list(behaviour["x"]) == [0.0, 1.0, 2.0]
    assert (list(low["y"]), list(high["y"])) == ([30.0, 22.0, 14.0], [30.0, 37.0, 44.0])
    assert high["fill"] == "tonexty"
    assert "16 random: score 14.0 to 44.0, incoherent 10.0 % to 10.0 %" in high["customdata"][2]
    assert list(behaviour["y"]) == [30.0, 40.0, 50.0]
    assert list(incoherent["y"]) == pytest.approx([0.0, 5.0, 10.0])
    # The others were not sampled.
    other: Any = plot_steering(screen, 7)
    assert len(other.data) == 8
    plain = other.data[3]
    assert (list(plain.x), list(plain.y)) == ([-1.0, 1.0, 2.0], pytest.approx([0.1, 0.2, 0.25]))


def test_a_latent_is_drawn_in_both_models_of_every_fine_tune():
    base, tuned = plot_models(as_json(make_search())["features"][0]).to_dict()["data"]
    assert list(base["x"]) == [0.5] * 4
    assert list(tuned["x"]) == pytest.approx([2.1, 2.1, 0.6, 0.6])


def test_a_warning_has_both_bands_and_where_they_are_left():
    figure = plot_warning(as_json(make_warning())).to_dict()
    low, high, mean = figure["data"][:3]
    assert list(mean["y"]) == [0, 1, 2, 3]
    assert (low["y"][0], high["y"][0]) == (-0.5, 0.5)
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [10.0, 20.0]


@pytest.mark.parametrize("result", [make_search(), make_screen(), make_warning()])
def test_what_has_a_figure_draws_itself(result):
    assert plot(result).layout.template.layout.font.size == 12


def test_the_sentence_says_what_was_tested_what_acts_and_what_needs_no_autoencoder():
    sections = sort_results([as_json(make_search())])
    (sentence,) = write_verdicts(sections)
    for part in (
        "bad-finance, bad-health in latents of sae",
        "37 of 410 latents tested differ in bad-finance",
        "added to the base, latent 12 does most: +0.300 nats a token, random directions up to "
        "+0.100 (p = 0.059) and of those sampled latent 12: effect on the score +20.0 "
        "[16.0, 24.0] (p = 0.059), the mean difference 12.0 [8.00, 16.0]",
        "all latents together capture 31.0 % of the squared change, the mean difference alone "
        "42.0 %",
        "in-sample separation",
        "by mean differences alone 0.900",
    ):
        assert part in sentence
    (bare,) = write_verdicts(sort_results([as_json(make_search(screen=None))]))
    assert "nothing was asked of their effect" in bare


def test_the_page_has_cautions_first_tables_cards_and_windows():
    page = page_of(make_search())
    text = Outline(page).text
    at = [text.index(part) for part in ("too little", "How well", "without any", "Fine-tunes")]
    assert at == sorted(at)
    for part in ("bold advice", "everything", "tuned 8.00", "tenth 1 of 10", "Early warning"):
        assert part in text
    assert "induces sampled p" in text
    assert "added to the base: effect on the score 20.0 [16.0, 24.0] at strength 2" in text
    assert "10.0 % incoherent, p = 0.059; taken from the fine-tune: effect" in text
    assert page.count('class="feature"') == 2
    assert 'href="https://example.org/12"' in page
    # The largest code has the deepest shade, a quarter of it one of three.
    assert re.search(r'class="w h10" title="base 2.00, tuned 8.00"> everything', page)
    assert re.search(r'class="w h5" title="base 1.00, tuned 4.00"> the', page)
    (target,) = re.findall(r'href="#(card-\d+)">12<', page)
    assert f'id="{target}"' in page
    assert "attribution: not asked for" in text


def test_a_screen_alone_says_how_well_its_codec_fits():
    text = Outline(page_of(make_screen())).text
    assert text.index("How well") < text.index("added to the base")


def test_a_screen_says_what_was_sampled_and_what_of_it_was_too_incoherent():
    screen = make_screen()
    added, added_chance, added_plainly, taken, *_ = as_json(screen)["trials"]
    assert (added["forced"], added["forced_trials"]) == (3, 9)
    assert (added["sampled"], added["trials"], added["responses"]) == (1, 2, 16)
    # At strength 2 a tenth is incoherent: within the budget of the base, beyond that of the other.
    assert (added["coherent"], added["incoherent"]) == (2, 0)
    assert (taken["coherent"], taken["incoherent"], taken["allowed"]) == (1, 1, 0.07)
    assert (added_chance["sampled"], added_chance["trials"]) == (16, 32)
    assert added_plainly["directions"] == "mean difference"
    assert (added_plainly["forced_trials"], added_plainly["trials"]) == (3, 2)
    text = Outline(page_of(screen)).text
    assert "Responses were sampled to 4 prompts, 0 of them" in text
    assert "never coherent" in text
    said = "which needs no latent, does at its best strength: added to the base +0.250, taken"
    assert said in text
    said = "Sampled under the mean difference, added to the base: effect on the score 12.0 [8.00"
    assert said in text
    bare = make_screen(sampled=(), sampled_plainly=(), sampled_before=(), most_incoherent=())
    assert as_json(bare)["trials"][0]["trials"] is None
    text = Outline(page_of(bare)).text
    assert "No responses were sampled: nothing is known" in text
    assert "never coherent" not in text


def test_what_was_not_tested_is_said_in_words_and_is_null_in_json():
    delta = torch.tensor([3.0, 1.0, 2.0]).double()
    p = torch.tensor([torch.nan, 0.25, 0.5]).double()
    diff = make_diff("a", delta, p_value=p, q_value=p)
    rows = as_json(diff)["rows"]
    assert [row["p_value"] for row in rows] == [None, 0.5, 0.25]
    text = Outline(page_of(diff)).text
    assert text.count("not tested") == 3
    assert "fewer than 12 prompts are not tested" in text
    assert "nan" not in text.lower().split()
    page = page_of(make_search(features=(make_feature(12, 1.0, q_value=None),)))
    table = re.search(r"Activity of latent 12.*?</table>", page, re.DOTALL)
    assert table is not None
    assert table[0].count("not tested") == 4


@pytest.mark.parametrize("make", [make_cards, make_warning])
def test_a_poor_fit_is_said_before_a_card_or_a_warning_is_shown(make):
    poor = make_health(explained_variance=torch.tensor([0.81, 0.41]), underpowered=True)
    text = Outline(page_of(make(health=poor))).text
    said = text.index("the codec explains 0.41 of the variance in emlens:bad-finance")
    assert said < text.index("Latent 12" if make is make_cards else "a lead of 10")
    assert text.index("How well the autoencoder fits") > said
    fine = Outline(page_of(make(health=make_health(worse_on_tuned=False)))).text
    assert "Before any latent is believed" not in fine


def test_a_warning_without_a_codec_says_that_nobody_has_looked():
    assert make_warning(health=None).underpowered is None
    assert "was not looked at" in Outline(page_of(make_warning(health=None))).text
    assert "explained variance 0.81 in the base" in Outline(page_of(make_warning())).text


def test_a_classification_alone_stands_beside_mean_differences_with_its_latents():
    text = Outline(page_of(make_classification())).text
    assert "area 0.950 [0.900, 1.00], p = 0.17 (all 6 relabellings" in text
    assert "By mean differences alone, without any latent: 0.900 [0.800, 1.00], p = 0.33" in text
    assert "Latents used, by what was left out: all: 12." in text


def test_fits_of_several_fine_tunes_share_a_table_that_comes_first():
    fits = [make_health(name) for name in NAMES[:2]]
    page = page_of(make_classification(), *fits)
    assert page.count('aria-label="Fit of the autoencoder"') == 1
    text = Outline(page).text
    assert text.index("emlens:bad-health") < text.index("By mean differences alone")
    # On another text the base did something else.
    other = make_health(NAMES[2], n_tokens=torch.tensor([9, 9]))
    assert page_of(*fits, other).count('aria-label="Fit of the autoencoder"') == 2


def test_stages_beside_the_whole_are_shown_once():
    search = make_search()
    alone, beside = page_of(search), page_of(search, search.screen, search.cards, *search.warnings)
    assert alone.count('class="plot"') == beside.count('class="plot"')
    assert 'id="others"' not in beside


def test_parts_that_stand_alone_are_shown_and_thousands_of_latents_as_rows():
    deltas = torch.randn(3, 90).double()
    diffs = [make_diff(name, own) for name, own in zip("abc", deltas, strict=True)]
    contrast, ranking = contrast_features(diffs[:1], diffs[1:2]), rank_features(diffs, by="delta")
    report = make_report([diffs[0], contrast, ranking, make_health(), make_screen(), make_cards()])
    first = report["results"][0]
    assert "delta" not in first
    assert len(first["rows"]) == 50
    assert len(json.dumps(report["results"][1])) < 60_000
    page = render_report(json.loads(json.dumps(report, allow_nan=False)))
    assert 'id="others"' not in page
    assert page.count('class="wide sortable"') == 5
    largest = int(deltas[0].abs().argmax())
    assert f'data-v="{largest:.1f}"' in page


def test_what_is_no_number_is_sorted_as_text_and_what_is_missing_last():
    rows = [{"latent": 3, "q_value": 0.5, "why": "x"}, {"latent": 4, "q_value": "NaN", "why": "y"}]
    table = make_table("t", [*rows, {"latent": 5, "q_value": None, "why": "z"}], targets={3: "c"})
    assert table.columns == ["latent", "q value", "why"]
    assert table.numbers == [True, True, False]
    values = [[cell.value for cell in row] for row in table.rows]
    assert values == [[3.0, 0.5, None], [4.0, None, None], [5.0, None, None]]
    assert [row[0].target for row in table.rows] == ["c", None, None]


def test_a_click_on_a_heading_sorts_the_table(tmp_path: Path):
    script = """<script>
    const table = document.querySelector(".sortable");
    const place = [...table.tHead.rows[0].cells].findIndex((h) => h.textContent.trim() === "delta");
    const told = document.createElement("pre");
    told.id = "told";
    for (let i = 0; i < 2; i += 1) {
      table.tHead.rows[0].cells[place].querySelector("button").click();
      told.append([...table.tBodies[0].rows].map((r) => r.cells[0].textContent).join(",") + ";");
    }
    document.body.append(told);
    </script></body>"""
    page = page_of(make_search())
    loose = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    document = dump_dom(loose.replace("</body>", script), tmp_path)
    told = re.search(r'<pre id="told">(.*?)</pre>', document)
    assert told is not None
    assert told[1] == "340,12,7;7,12,340;"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_texts_of_a_search_stay_text(payload):
    report = json.loads(json.dumps(make_report([make_search(), make_cards(), make_screen()])))
    check_text_stays_text(report, payload)


def test_an_address_of_another_scheme_is_no_link():
    cards = make_cards()
    hostile = [replace(card, link="javascript:alert(1)") for card in cards.cards]
    page = page_of(make_cards(cards=tuple(hostile)))
    assert 'href="javascript' not in page
    assert "described elsewhere" not in page


def test_a_part_that_is_missing_is_named():
    report = json.loads(json.dumps(make_report([make_search()])))
    del report["results"][0]["features"][0]["models"]
    with pytest.raises(ReportError, match="features cannot be read"):
        render_report(report)


def test_a_search_of_one_fine_tune_without_anything_else_is_a_page():
    search = make_search()
    bare = make_search(
        **{"models": search.models[:1], "health": search.health[:1], "plain": search.plain[:1]},
        **{"classification": None, "screen": None, "cards": None},
        **{"warnings": (), "features": (), "n_pairs": 0, "smallest_p": None},
    )
    text = Outline(page_of(bare)).text
    assert NAMES[0] in text
    assert str(LATENTS[1]) not in text
