"""Judged responses, and the CSV files that they are published in; not for making scores.

A missing score is None, never 0 and never left out: whoever counts must say what became of it.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emlens.artifacts import write_text_atomic
from emlens.data.score_values import is_score, read_score

COLUMNS = ("question", "answer", "question_id", "aligned", "coherent")
"""Columns of the published files; the first two may be absent."""


class ScoreFileError(ValueError):
    """A score file that cannot be read; the message starts with file and line."""


@dataclass(frozen=True, kw_only=True)
class ScoredResponse:
    """One response with what a judge made of it.

    Raises:
        ValueError: no question id, or a score outside 0..100; NaN must be None.
    """

    id: str
    """Names the row in its file or run."""
    question_id: str
    """The question it answers: the cluster in every interval."""
    question: str | None = None
    """The wording that was asked; None where the file does not say."""
    answer: str | None = None
    """The response; None where the file does not say."""
    system: str | None = None
    """The system prompt, where there was one."""
    aligned: float | None = None
    """0 (harmful) to 100 (aligned); None where the judge gave no score."""
    coherent: float | None = None
    """0 to 100; None where the judge gave no score."""

    def __post_init__(self) -> None:
        if not self.question_id:
            raise ValueError("question_id: got an empty text")
        for name in ("aligned", "coherent"):
            value = getattr(self, name)
            if value is not None and not is_score(value):
                raise ValueError(f"{name} is {value}, expected 0 to 100, or None without a score")

    @property
    def scored(self) -> bool:
        """Whether both scores are there."""
        return self.aligned is not None and self.coherent is not None


def as_scored(row: ScoredResponse | Mapping[str, Any], number: int = 0) -> ScoredResponse:
    """Read a row that may be a mapping with the published columns.

    Raises:
        ValueError: a missing column (the nearest is named), a question id that is no text, or a
            score that is no number from 0 to 100.
    """
    if isinstance(row, ScoredResponse):
        return row
    for name in COLUMNS[2:]:
        if name not in row:
            near = difflib.get_close_matches(name, [str(key) for key in row], 3, cutoff=0)
            raise ValueError(f"no column {name}; nearest: {', '.join(near)}")
    question, answer, system = (row.get(key) for key in ("question", "answer", "system"))
    name = row["question_id"]
    if not isinstance(name, str):
        raise ValueError(
            f"question_id is {name!r}, expected a text: rows of one id are one cluster, and what "
            "has none would be made one"
        )
    return ScoredResponse(
        id=str(row.get("id") or f"row-{number:06d}"),
        question_id=name,
        question=None if question is None else str(question),
        answer=None if answer is None else str(answer),
        system=str(system) if system else None,
        aligned=read_score(row["aligned"], "aligned"),
        coherent=read_score(row["coherent"], "coherent"),
    )


def read_score_file(path: str | Path) -> tuple[ScoredResponse, ...]:
    """Read a CSV or JSONL file with `question_id`, `aligned` and `coherent`, maybe the texts too.

    Other columns are ignored. Rows are numbered as their ids, unless there is an `id`.

    Raises:
        ScoreFileError: no such file, no rows, a missing or doubled column, a ragged line, or a
            score that is no number; file and line are named.
    """
    rows: list[ScoredResponse] = []
    for number, (line, row) in enumerate(read_table(path), start=1):
        try:
            rows.append(as_scored(row, number))
        except ValueError as error:
            raise ScoreFileError(f"{path}:{line}: {error}") from error
    return tuple(rows)


def read_table(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a `.jsonl` or `.csv` file, as they stand, with the line each ends on.

    Raises:
        ScoreFileError: no such file, another kind, no rows, a doubled column, a ragged line.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if not path.exists():
        raise ScoreFileError(f"{path}: there is no such file or folder")
    if path.suffix not in readers:
        raise ScoreFileError(
            f"{path}: expected a .csv or .jsonl file"
            + (", or the folder of a run that sampled responses" if path.is_dir() else "")
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ScoreFileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ScoreFileError(f"{path}: is not UTF-8 text: {error}") from error
    rows = list(readers[path.suffix](path, text))
    if not rows:
        raise ScoreFileError(f"{path}: the file has no rows")
    return rows


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if doubled := sorted({name for name in names if name and names.count(name) > 1}):
            raise ValueError(f"the columns {doubled} come twice")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"the line has more or fewer cells than the {len(names)} columns")
            yield reader.line_num, row
    except (ValueError, csv.Error) as error:
        raise ScoreFileError(f"{path}:{reader.line_num}: {error}") from error


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ScoreFileError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ScoreFileError(f"{path}:{number}: got a {type(row).__name__}, expected an object")
        yield number, row


def write_scores(rows: Sequence[ScoredResponse], path: str | Path) -> Path:
    """Write rows in the published columns; a missing score is an empty cell."""
    known = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    names = [name for name in COLUMNS if name in known or name in COLUMNS[2:]]
    cells = [[_cell(getattr(row, name)) for name in names] for row in rows]
    return write_text_atomic(path, "".join(map(_line, [names, *cells])))


def _cell(value: str | float | None) -> str:
    return "" if value is None else str(value)


def _line(cells: Sequence[str]) -> str:
    out = io.StringIO(newline="")
    # With this ending the module quotes both kinds of line break within a cell.
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().removesuffix("\r\n") + "\n"
