"""One self-contained page from a report's JSON: no network, no script but its own, text as text.

For a single figure use `plot`.

Three walls against what a model or a stranger's file says: every text is escaped where it is put
in; data for scripts is JSON without angle brackets; a content security policy names the two
scripts by their hashes, so that no other runs.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import emlens
from emlens.evaluation.judge_names import name_judge
from emlens.reports.document import ReportError, check_report
from emlens.reports.page import build_page
from emlens.reports.shown_answers import DRAWN, LOWEST, MOST_CHARACTERS, SEED
from emlens.reports.theme import TEMPLATES
from emlens.reports.visible import (
    shorten,
    show_change,
    show_change_from,
    show_number,
    show_p,
    show_points,
    show_share,
    show_text,
    show_token,
)

_FOLDER = Path(emlens.__file__).parent / "assets" / "templates"


def _show_judge(judge: object, name: object = "") -> str:
    return name_judge(str(judge), str(name))


_FILTERS = {
    "judge": _show_judge,
    "number": show_number,
    "p": show_p,
    "share": show_share,
    "change": show_change,
    "change_from": show_change_from,
    "points_from": show_points,
    "token": show_token,
    "shorten": shorten,
}


def render_report(report: Mapping[str, Any]) -> str:
    """The HTML page of a report; the same JSON gives the same page, byte for byte.

    Args:
        report: What `read_report` read or `report.json` holds.

    Raises:
        ReportError: Its schema is another, or a part is not as emlens writes it.
    """
    page = build_page(check_report(report))
    try:
        return _environment().get_template("report.html").render(page=page)
    except (jinja2.TemplateRuntimeError, TypeError, ValueError, LookupError) as error:
        raise ReportError(f"report: a table cannot be filled: {error}") from error


def embed_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no tag or comment can begin or end in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def embed_script(source: str) -> Markup:
    """A script of our own, as it is, if it can stand in a script element."""
    for sign in ("</script", "<!--", "\r"):
        if sign in source.lower():
            raise ValueError(f"a script holds {sign!r} and cannot be put into a page")
    return Markup(source)


def hash_script(source: str) -> str:
    """The source's name in a content security policy."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _make_visible(value: Any) -> Any:
    """What every expression of a template passes through before it is escaped."""
    return show_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _refuse_missing(show: Callable[..., str]) -> Callable[..., str]:
    """A filter that names a field that the report lacks."""

    def show_present(value: Any, *arguments: Any) -> str:
        if isinstance(value, jinja2.Undefined):
            str(value)  # raises with the name
        return show(value, *arguments)

    return show_present


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_make_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotly, script = get_plotlyjs(), (_FOLDER / "report.js").read_text(encoding="utf-8")
    filters = {name: _refuse_missing(show) for name, show in _FILTERS.items()}
    environment.filters.update(filters, embed=embed_json)
    environment.globals.update(
        plotly=embed_script(plotly),
        script=embed_script(script),
        style=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        script_hashes=[hash_script(plotly), hash_script(script)],
        themes=TEMPLATES,
        lowest_shown=LOWEST,
        drawn_shown=DRAWN,
        answers_seed=SEED,
        longest_answer=MOST_CHARACTERS,
    )
    return environment
