"""Texts that try to be more than text, and ways to put one into every text field of a report."""

import copy
import re
from html.parser import HTMLParser
from itertools import zip_longest
from typing import Any

from emlens.reports import render_report
from emlens.reports.visible import show_text

MARK = "document.title='pwned'"
PAYLOADS = (
    f'</script><img src=x onerror="{MARK}">',
    f'"><img src=x onerror="{MARK}">',
    f"' onmouseover='{MARK}' autofocus onfocus='{MARK}' x='",
    "{{7*7}}{% raw %}{# gone #}${7*7}",
    f"<!--<script>{MARK}</script>",
    f"--><script>{MARK}</script><!--",
    f"\u2028{MARK}//\u2029",
    f"\u202e{MARK}\u202c\u200b\ufeff",
    f'<a href="javascript:{MARK}">click</a>',
    f"javascript:{MARK}",
    f"<svg onload={MARK}><animate onbegin={MARK}>",
    f"<img/src=x/onerror={MARK}>",
    f"`${{{MARK}}}`",
    f"\x00<\x00script>{MARK}<\x00/script>\x07\x1b[31m\x85",
    f"</style></title></textarea></details></noscript><script>{MARK}</script>",
    f'</div><iframe srcdoc="&lt;script&gt;parent.{MARK}&lt;/script&gt;"></iframe>',
    f"&lt;img src=x onerror={MARK}&gt;&#60;script&#62;",
    "\\u003cb\\u003e%{x}%{customdata[0]}<b>$\\alpha$</b>",
)
HARMLESS = "harmless"
_KEPT_KEYS = ("schema", "first_differing_site")
_NUMBERS = ("NaN", "Infinity", "-Infinity")


def poison(value: Any, payload: str) -> Any:
    """The JSON with the payload after every text and behind every name that a user chooses."""
    if isinstance(value, str):
        return value if value in _NUMBERS else value + payload
    if isinstance(value, list):
        return [poison(item, payload) for item in value]
    if isinstance(value, dict):
        return {k: v if k in _KEPT_KEYS else poison(v, payload) for k, v in value.items()}
    return value


def poison_report(report: dict[str, Any], payload: str) -> dict[str, Any]:
    """A whole report poisoned, with the names in `extra`, `seconds` and `versions` too."""
    hostile = poison(report, payload)
    extra = hostile["extra"]
    hostile["seconds"] = {name + payload: value for name, value in report["seconds"].items()}
    extra["settings"] = {name + payload: value for name, value in extra["settings"].items()}
    extra[payload] = "value"
    for row in extra["answers"]:
        row["answers"] = {name + payload: text for name, text in row["answers"].items()}
    hostile["versions"] = {name + payload: text for name, text in hostile["versions"].items()}
    return hostile


def flat(text: str) -> str:
    """The text without white space, which pages wrap as they like."""
    return re.sub(r"\s+", "", text)


class Outline(HTMLParser):
    """What a parser that is not ours finds in a page: tags, texts, scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self._open: list[str] = []
        self._script: dict[str, str] | None = None
        self.feed(page)
        self.close()

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open.append(tag)
        if tag == "script":
            self._script = {name: value or "" for name, value in attrs}
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open.append(f"/{tag}")
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        elif self._open[-1:] != ["style"]:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", (data[:60],)))


def check_text_stays_text(report: dict[str, Any], payload: str) -> None:
    """A payload in every text of the results changes no tag of the page, and is shown."""
    pages = []
    for text in (payload, HARMLESS):
        hostile = copy.deepcopy(report)
        hostile["results"] = [poison(result, text) for result in hostile["results"]]
        pages.append(Outline(render_report(hostile)))
    pairs = zip_longest(pages[0].tags, pages[1].tags)
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    assert flat(show_text(payload)) in flat(pages[0].text)
