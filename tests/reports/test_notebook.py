"""Views in notebooks: offline, texts as texts, and a clear word where circuitsvis is missing."""

import importlib
import json
import re
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.reports.notebook import (
    VizMissingError,
    show_attention,
    show_tokens,
    show_values,
)
from emlens.reports.visible import show_running
from tests.reports.browser import dump_dom
from tests.reports.payloads import PAYLOADS, Outline, flat
from tests.reports.synthetic import Texts, make_example

_OWN_TAGS = ("body", "div", "span", "br")


@pytest.fixture
def circuitsvis() -> Any:
    return pytest.importorskip("circuitsvis", reason="the extra [viz] is not installed")


def props_of(html: str) -> dict[str, Any]:
    (text,) = re.findall(
        r"CircuitsVis\.render\(\s*\"[^\"]+\",\s*CircuitsVis\.\w+,\s*(.*)\s*\)\s*</script>", html
    )
    return json.loads(text)


@pytest.mark.usefixtures("circuitsvis")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_token_ends_the_script_it_is_put_into(payload: str):
    html = show_values(["a", payload], torch.tensor([0.5, 1.0]))._repr_html_()
    assert html.count("</script") == html.count("<script") - html.count('"<script>') == 1
    assert "<!--" not in html
    escaped = escape(show_running(payload), quote=False)
    assert props_of(html) == {"tokens": ["a", escaped], "values": [0.5, 1.0]}


@pytest.mark.usefixtures("circuitsvis")
def test_nothing_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch):
    from circuitsvis.utils import render

    def refuse() -> bool:
        raise AssertionError("asked whether there is a network")

    monkeypatch.setattr(render, "internet_on", refuse)
    html = show_values(["a"], torch.tensor([1.0]))._repr_html_()
    assert "unpkg.com" not in html
    assert re.search(r"<script[^>]* src=", html) is None


@pytest.mark.usefixtures("circuitsvis")
@pytest.mark.parametrize("quantity", ["kl", "kl_back", "entropy_change"])
def test_a_chat_is_coloured_by_the_quantity_asked_for(quantity: Any):
    example = make_example(Texts(), 1)
    props = props_of(show_tokens(example, quantity=quantity).page)
    shown = [unescape(token).replace("⏎\n", "\n") for token in props["tokens"]]
    assert shown == list(example.tokens)
    assert props["values"] == pytest.approx(getattr(example, quantity))


@pytest.mark.usefixtures("circuitsvis")
def test_attention_has_its_tokens_and_heads():
    attention = torch.eye(3).repeat(2, 1, 1)
    html = show_attention(["a", "<b>", "c"], attention, head_names=["L0H0", "<L0H1>"]).page
    props = props_of(html)
    assert props["attention"] == attention.tolist()
    assert props["attentionHeadNames"] == ["L0H0", "<L0H1>"]
    assert "<b>" not in html.rpartition("CircuitsVis.render(")[2]


@pytest.mark.slow
@pytest.mark.usefixtures("circuitsvis")
def test_chromium_shows_the_tokens_and_runs_none(tmp_path: Path):
    view = show_values(list(PAYLOADS), torch.linspace(0, 1, len(PAYLOADS))).page
    page = f"<html><head><meta charset=utf-8><title>t</title></head><body>{view}</body></html>"
    document = dump_dom(page, tmp_path)
    assert "<title>t</title>" in document
    outline = Outline(document)
    assert {tag for tag, _ in outline.tags} <= {"html", "head", "meta", "title", *_OWN_TAGS}
    for payload in PAYLOADS:
        assert flat(show_running(payload)) in flat(outline.text)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"values: got shape \(2,\), expected \(1,\)"):
        show_values(["a"], torch.zeros(2))
    with pytest.raises(ValueError, match="attention: got"):
        show_attention(["a"], torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="head_names: got 2, expected 1"):
        show_attention(["a"], torch.zeros(1, 1, 1), head_names=["x", "y"])


def test_a_missing_circuitsvis_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("circuitsvis")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    with pytest.raises(VizMissingError, match=r"pip install 'emlens-interp\[viz\]'"):
        show_values(["a"], torch.zeros(1))


def test_reports_do_not_need_circuitsvis():
    source = Path(str(importlib.import_module("emlens.reports").__file__)).parent
    users = [p.name for p in source.glob("*.py") if "import_module" in p.read_text("utf-8")]
    assert users == ["notebook.py"]
