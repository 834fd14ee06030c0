"""The one JSON object that a report is drawn from; not for results that are to be loaded again.

`results` holds every result's `to_dict()` without the vectors of activation space and the numbers
of thousands of latents, which no figure shows and which would make the file a hundred times longer:
those stay with the saved results.
"""

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emlens import __version__
from emlens.artifacts import Result, read_json
from emlens.encoding import ArtifactError, encode
from emlens.reports.brief import WITH_PARTS, describe_briefly

SCHEMA = "emlens/report/1"
VECTORS = ("mean_base", "mean_tuned", "top_directions")
"""Fields of an ActivationDiff that are left out."""
_PACKAGES = ("torch", "transformers", "transformer-lens", "peft", "plotly")


class ReportError(ArtifactError):
    """A report's JSON is not what emlens writes: another schema, or a part of another shape."""


def make_report(
    results: Sequence[Result], *, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON object for results, in their order; arguments and errors as for `write_report`."""
    if not results and not extra:
        raise ValueError("results: got none and no extra, expected at least one result to show")
    given = dict(extra or {})
    seconds = given.pop("seconds", {})
    return {
        "schema": SCHEMA,
        "emlens_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _find_versions(),
        "seconds": encode(seconds, "seconds"),
        "results": [_describe(result) for result in results],
        "extra": encode(given, "extra"),
    }


def read_report(path: str | Path) -> dict[str, Any]:
    """The report in a JSON file.

    Raises:
        ArtifactError: There is no file, or it is truncated or no JSON object.
        ReportError: It is something else than a report of this version.
    """
    return check_report(read_json(Path(path)), str(path))


def check_report(report: Mapping[str, Any], source: str = "report") -> dict[str, Any]:
    """The report, if its outermost shape is right.

    Raises:
        ReportError: Its schema is another, or `results` or `extra` are not as they should be.
    """
    if report.get("schema") != SCHEMA:
        raise ReportError(
            f"{source}: schema is {report.get('schema')!r}, expected {SCHEMA!r}: give the "
            "report.json that write_report made, or read it with the emlens that made it "
            f"({report.get('emlens_version')!r})"
        )
    results = report.get("results")
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise ReportError(f"{source}: results is not a list of objects: was the file edited?")
    if not isinstance(report.get("extra", {}), dict):
        raise ReportError(f"{source}: extra is not an object: was the file edited?")
    return dict(report)


@contextmanager
def reading(part: str) -> Iterator[None]:
    """Say which part of a report could not be read, whatever was wrong with it."""
    try:
        yield
    except ReportError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"report: {part} cannot be read ({type(error).__name__}: {error}): it is not as "
            "emlens writes it; save the result again and write the report from that"
        ) from error


def kind_of(result: Mapping[str, Any]) -> str:
    """Kind of a result's JSON, by its schema."""
    return str(result.get("schema", "")).removeprefix("emlens/").rpartition("/")[0]


def _describe(result: Result) -> dict[str, Any]:
    if result.kind in WITH_PARTS:
        return describe_briefly(result)
    document = result.to_dict()
    inner = document.get("activations")
    holder = inner if isinstance(inner, dict) else document
    for name in VECTORS:
        holder.pop(name, None)
    return document


def _find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
