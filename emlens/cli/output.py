"""What a command prints on stdout: a table and a few lines, or one JSON object and nothing else."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

import emlens

UNITS = ("B", "kB", "MB", "GB", "TB")
WIDEST = 160
"""Columns of a table where the output is no terminal."""


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")


def header(kind: str) -> dict[str, str]:
    """The first fields of what `--json` prints where no saved result prints it."""
    return {"schema": f"emlens/{kind}/1", "emlens_version": emlens.__version__}


def print_plan(plan: Any, out: Path | None, *, json: bool) -> None:
    """Print what a command would do, instead of doing it.

    Args:
        plan: a dataclass or a mapping.
        out: where it would write; None where it would only print.
        json: as one JSON object, `emlens/plan/1`, instead of lines.
    """
    from emlens.encoding import encode

    fields = encode(plan, "plan")
    if json:
        print_json({**header("plan"), "out": None if out is None else str(out), **fields})
        return
    print_line(f"nothing was done; this would be {f'written to {out}' if out else 'printed'}:")
    for name, value in fields.items():
        print_line(f"  {name}: {value}")


def print_line(text: str = "") -> None:
    """Print a line as it is: no markup is read in it, no width is forced on it."""
    typer.echo(text)


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Print rows of equal keys as a table; numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        number = any(_is_number(row[name]) for row in rows)
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_show_cell(name, value)) for name, value in row.items()))
    width = None if sys.stdout.isatty() else WIDEST
    Console(file=sys.stdout, width=width).print(table)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show_cell(name: str, value: object) -> str:
    """A value; a p- or q-value that there is none of is of what was not tested."""
    tests = name in ("p", "p_value", "q_value") or name.endswith("_p")
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "not tested" if tests and missing else show_value(value)


def show_value(value: object) -> str:
    """A cell's text: floats to four digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_bytes(count: int | float | None) -> str:
    """Bytes in decimal units, three digits: `1.23 GB`."""
    if count is None:
        return "unknown"
    unit = 0
    while count >= 999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {UNITS[unit]}"
