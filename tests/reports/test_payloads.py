"""Whatever a model, a file name or a user says is shown as text, and read as nothing else."""

import copy
import json
import re
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from emlens.reports.document import make_report
from emlens.reports.html import embed_json, embed_script, render_report
from emlens.reports.visible import show_text, show_token
from tests.reports.browser import dump_dom
from tests.reports.payloads import HARMLESS, MARK, PAYLOADS, Outline, flat, poison_report
from tests.reports.synthetic import (
    MODULES,
    Texts,
    make_activations,
    make_diff,
    make_extra,
    make_logits,
    make_null,
    make_proof,
    make_training,
)

# Points at every figure and every token, and writes down what then is shown.
DRIVER = """<script>
(async () => {
  const told = document.createElement("pre");
  told.id = "told";
  for (const plot of document.querySelectorAll(".plot")) {
    Plotly.Fx.hover(plot, { xval: 0, yval: 6 }, "xy");
    await new Promise((resolve) => setTimeout(resolve, 100));
    told.append(plot.querySelector(".hoverlayer").textContent + "\\n");
  }
  for (const token of document.querySelectorAll(".t.c")) {
    token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
    token.click();
    told.append(document.getElementById("tip").textContent + "\\n");
  }
  const box = document.querySelector(".tokens");
  box.focus();
  const press = (key) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const at = () => document.querySelector(".t.on")?.textContent ?? "";
  press("Escape");
  press("ArrowRight"); press("ArrowRight"); press("ArrowRight");
  told.append("keys:" + at());
  press("Home"); press("End"); press("ArrowRight"); press("Escape");
  press("ArrowLeft"); press("ArrowRight"); press("ArrowRight");
  told.append("→" + at() + "|");
  document.body.append(told);
})();
</script></body>"""


@pytest.fixture(scope="module")
def small_report() -> dict[str, Any]:
    """Every kind of text, of a fine-tune of two layers."""
    diff = replace(make_diff(n_chats=2), activations=make_activations(n_layers=2))
    results = [make_proof(n_layers=2), diff, make_null(n_layers=2, n=2), make_training()]
    made = make_report(results, extra=make_extra())
    return json.loads(json.dumps(made))


@pytest.fixture(scope="module")
def harmless_outline(small_report: dict[str, Any]) -> Outline:
    return Outline(render_report(poison_report(small_report, HARMLESS)))


@pytest.fixture(scope="module", params=PAYLOADS)
def poisoned(request: pytest.FixtureRequest, small_report: dict[str, Any]) -> tuple[str, Outline]:
    """A payload, and the page of a report with it in every text."""
    report = copy.deepcopy(small_report)
    return request.param, Outline(render_report(poison_report(report, request.param)))


def test_a_payload_in_every_text_changes_no_tag_of_the_page(
    poisoned: tuple[str, Outline], harmless_outline: Outline
):
    payload, outline = poisoned
    pairs = zip_longest(outline.tags, harmless_outline.tags)
    assert [pair for pair in pairs if pair[0] != pair[1]][:3] == []
    assert flat(show_text(payload)) in flat(outline.text)


def test_a_payload_is_in_no_attribute_that_acts(poisoned: tuple[str, Outline]):
    _, outline = poisoned
    for tag, name, value in outline.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "style", "id", "class", "content"):
            assert MARK not in value, (tag, name, value)


def test_data_for_scripts_is_json_without_angle_brackets(poisoned: tuple[str, Outline]):
    _, outline = poisoned
    data = [text for attrs, text in outline.scripts if attrs.get("type") == "application/json"]
    assert len(data) > 6
    for text in data:
        assert not set("<>&\u2028\u2029") & set(text)
        json.loads(text)


def test_nothing_hidden_reaches_the_page(poisoned: tuple[str, Outline]):
    text = poisoned[1].text
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff]", text
    )


def test_embedded_json_is_read_back_as_it_was():
    for payload in PAYLOADS:
        assert json.loads(embed_json({"text": payload})) == {"text": payload}


@pytest.mark.parametrize("source", ["a</script>b", "a<!--b", "a</SCRIPT >b", "a\rb"])
def test_a_script_that_would_end_early_is_refused(source: str):
    with pytest.raises(ValueError, match="a script holds"):
        embed_script(source)


def make_hostile_report() -> dict[str, Any]:
    """A payload for each chat, token, module, name, question and answer."""
    every = [Texts(name=p, base=p, module=p, chat=p, question=p, piece=p) for p in PAYLOADS]
    proofs = [make_proof(texts, n_layers=2, failing=1) for texts in every]
    diff = make_diff(every[0], n_chats=1)
    logits = [make_logits(texts, n_chats=1) for texts in every]
    parts = ("prompts", "risen_tokens", "fallen_tokens", "examples")
    joined = {name: tuple(x for part in logits for x in getattr(part, name)) for name in parts}
    diff = replace(diff, logits=replace(diff.logits, **joined))
    answers = [row for texts in every for row in make_extra(texts)["answers"]]
    made = make_report([*proofs, diff, make_null()], extra={"answers": answers})
    return json.loads(json.dumps(made))


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return render_report(make_hostile_report())


def without_policy(page: str) -> str:
    """The page with its escapes as the only wall."""
    page, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    return page


@pytest.mark.slow
@pytest.mark.parametrize("walls", ["escapes alone", "policy"])
def test_chromium_runs_no_payload_and_shows_them_all(hostile_page: str, tmp_path: Path, walls: str):
    page = hostile_page
    if walls == "escapes alone":
        page = without_policy(page).replace("</body>", DRIVER)
    document = dump_dom(page, tmp_path)
    outline = Outline(document)
    (title,) = re.findall(r"<title>(.*?)</title>", document, re.DOTALL)[:1]
    assert title.endswith("– emlens")
    tags = {tag for tag, _ in outline.tags}
    assert not tags & {"iframe", "animate", "object", "embed", "base", "b-"}
    assert not [a for a in outline.attributes if a[1].startswith("on")]
    acting = ("href", "xlink:href", "src", "action", "formaction", "data")
    targets = {v.partition(",")[0] for _, name, v in outline.attributes if name in acting}
    # The ramp of a colour bar is a picture that plotly draws itself.
    assert {v for v in targets if not v.startswith("#")} <= {"data:image/png;base64"}
    text = flat(outline.text)
    for payload in PAYLOADS:
        assert flat(show_text(payload)) in text
    plots = len(PAYLOADS) + 4
    assert sum(tag == "div" and "aria-label" in names for tag, names in outline.tags) >= plots
    drawn = re.findall(r'<div class="plot js-plotly-plot"[^>]*>.*?<svg class="main-svg"', document)
    assert len(drawn) == plots
    if walls == "escapes alone":
        told = flat(Outline(document[document.index('<pre id="told"') :]).text)
        for payload in PAYLOADS:
            assert flat(f"model.layers.0.mlp.{show_text(payload)}")[:50] in told
            assert f"{flat(show_token(payload))}KL(base‖tuned)" in told
        assert "keys:put→put|" in told


@pytest.mark.slow
def test_chromium_would_notice_a_payload_that_runs(tmp_path: Path):
    page = f"<html><head><title>t</title></head><body>{PAYLOADS[0]}</body></html>"
    assert "<title>pwned</title>" in dump_dom(page, tmp_path)


def test_a_module_may_be_called_anything():
    names = [m.name for m in make_proof(Texts(module=PAYLOADS[0]), n_layers=1).modules]
    assert len(names) == len(MODULES)
