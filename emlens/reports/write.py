"""Writing a report: its JSON, and the page drawn from it.

Not needed to look at one result: that shows itself in a notebook, and `plot` draws it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emlens.artifacts import Result, write_json_atomic, write_text_atomic
from emlens.reports.document import make_report
from emlens.reports.html import render_report


def write_report(
    results: Sequence[Result], path: str | Path, *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write one self-contained HTML file, and beside it the JSON that it is rendered from.

    Where there are several comparisons, a NullBand belongs to the one that stands before it.

    Args:
        results: What to show: AdapterProof, ModelDiff, NullBand, TrainingRun, DirectionRemoval,
            Evaluation, BehaviourDifference, TransitionTrace, PhaseTransition, SolutionComparison,
            Narrowness, PersonaFeatures and what compares, screens or explains latents; others as
            tables. What another of them holds is shown once.
        path: The HTML file; the JSON gets the same name with `.json`.
        extra: What no result holds, as JSON values. `answers`: a list of `{"question": str,
            "answers": {model: str}}`; `chats`: what each comparison was made on, as in "on held-out
            rows", in their order; `title`; `settings`: name -> value; `seconds`: stage -> seconds,
            with a `total` if there is more than their sum, which stands at the top of the JSON.

    Returns:
        The HTML file.

    Raises:
        ValueError: There is nothing to show, or the path does not end in `.html`.
        TypeError: `extra` holds what JSON cannot.
        ReportError: `extra` or a result has parts that cannot be shown; nothing is written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"path: got {str(path)!r}, expected a file that ends in .html")
    report = json.loads(json.dumps(make_report(results, extra=extra), allow_nan=False))
    page = render_report(report)
    write_json_atomic(path.with_suffix(".json"), report)
    return write_text_atomic(path, page)
