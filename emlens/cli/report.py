"""`emlens report`: one page about the results of one or several runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.options import CommonFlags, takes_flags
from emlens.cli.output import header, print_json, print_line

EXAMPLE = "\b\nExample:\n  emlens report runs/demo runs/diff --out both.html"


@dataclass(frozen=True, kw_only=True)
class ReportFlags(CommonFlags):
    """Flags of `report`."""

    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or saved results.")
    ]
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page, an .html file.")]


@takes_flags
def report(flags: ReportFlags) -> None:
    """Write one HTML file, and its JSON beside it, from results that are already there."""
    from emlens.reports import write_report

    parts = [part for path in flags.runs for part in _load(path)]
    if not parts:
        raise typer.BadParameter(f"no finished results in {', '.join(map(str, flags.runs))}")
    extra = collect_extra(parts)
    page = write_report([p.result for p in parts if not p.is_extra], flags.out, extra=extra)
    if flags.json:
        files = {"report": str(page), "json": str(page.with_suffix(".json"))}
        print_json({**header("report_files"), "n_results": len(parts), **files})
    else:
        print_line(f"{len(parts)} results: {page}")


@dataclass(frozen=True)
class Part:
    """One saved result, and the run that it comes from."""

    run: str
    result: Any

    @property
    def is_extra(self) -> bool:
        """Whether a report shows it in a place of its own instead of as a result."""
        return self.result.kind == "stage_times"


def _load(path: Path) -> list[Part]:
    from emlens.artifacts import JSON_NAME
    from emlens.results import load_result
    from emlens.runs import RunFolder

    if path.is_file() or (path / JSON_NAME).is_file():
        return [Part(path.name, load_result(path))]
    run = RunFolder.open(path)
    names = run.result_names()
    return [Part(path.name, load_result(run.result_folder(name))) for name in names]


def collect_extra(parts: Sequence[Part]) -> dict[str, Any]:
    """Times of runs, as a report takes them.

    Of several runs they bear the run's name, and the totals are left out: the page adds up.

    Args:
        parts: saved results.
    """
    extra: dict[str, Any] = {}
    several = len({part.run for part in parts}) > 1
    for part in parts:
        if part.result.kind == "stage_times":
            times = part.result.seconds
            if several:
                times = {f"{part.run} {stage}": times[stage] for stage in times if stage != "total"}
            extra.setdefault("seconds", {}).update(times)
    return extra
