"""Run the benchmarks one after another: ``python -m benchmarks --suite cpu --size toy``.

Prints a table for each row and, as the last line, one JSON object with all records; ``--out`` also
writes it to a file after every row, which a later ``--compare`` reads. A row that fails does not
keep the others from running. Exits with 1 if one failed, or if a ratio has become worse by more
than both runs' intervals.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import free_memory
from benchmarks.records import (
    check_comparable,
    describe_settings,
    find_slowdowns,
    format_line,
    format_table,
)
from benchmarks.rows import ROWS, add_arguments, check_batch, read_settings, rows_of, run_row
from benchmarks.settings import Settings

SCHEMA = "emlens-benchmark-suite/2"


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; 1 where something has become slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--only", choices=ROWS, action="append", help="one row; may be repeated")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier --out file")
    parser.add_argument("--out", type=Path, help="where to write the JSON object")
    arguments = parser.parse_args(argv)
    settings = read_settings(arguments)
    rows = tuple(arguments.only or rows_of(settings))
    check_batch(settings, rows)
    old = read_records(arguments.compare, rows, settings) if arguments.compare else {}
    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    slower: list[str] = []
    suite = {"schema": SCHEMA, "suite": arguments.suite, "size": settings.size}
    suite |= {"rows": records, "failed": failed}
    for row in rows:
        free_memory()  # a row that died of too little leaves what it had
        start = time.perf_counter()
        try:
            record = run_row(row, settings)
        except Exception as error:  # whatever a model, a driver or a peer may raise
            failed[row] = f"{type(error).__name__}: {error}"
            print("".join(traceback.format_exception(error)), file=sys.stderr)
        else:
            print(format_table(record))
            print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
            records.append(json.loads(format_line(record)))
            if row in old:
                slower += find_slowdowns(old[row], records[-1])
        if arguments.out:
            arguments.out.write_text(json.dumps(suite) + "\n", encoding="utf-8")
    for row, error in failed.items():
        print(f"FAILED {row}: {error}")
    for line in slower:
        print(f"SLOWER {line}")
    print(json.dumps(suite))
    return 1 if slower or failed else 0


def read_records(path: Path, rows: Sequence[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """Read the records of an earlier run, by row; exits where they cannot be compared with."""
    try:
        suite = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--compare {path}: cannot be read ({error})") from error
    if not isinstance(suite, dict):
        raise SystemExit(f"--compare {path}: expected what --out wrote, one JSON object")
    if suite.get("schema") != SCHEMA:
        raise SystemExit(f"--compare {path}: schema {suite.get('schema')!r}, expected {SCHEMA!r}")
    if suite.get("size") != settings.size:
        raise SystemExit(
            f"--compare {path}: its size is {suite.get('size')!r} and this run's "
            f"{settings.size!r}: a toy's ratios say nothing of the full size's"
        )
    found = {record["row"]: record for record in suite["rows"]}
    missing = [row for row in rows if row not in found]
    if missing:
        print(f"--compare {path}: nothing there for {', '.join(missing)}")
    for row in found.keys() & set(rows):
        try:
            check_comparable(found[row], describe_settings(settings))
        except ValueError as error:
            raise SystemExit(f"--compare {path}, {row}: {error}") from error
    return found


if __name__ == "__main__":
    sys.exit(main())
