"""Run the benchmarks one after another: ``python -m benchmarks --suite cpu --size toy``.

Prints a table for each row and, as the last line, one JSON object with all records; ``--out`` also
writes it to a file, which a later ``--compare`` reads. Exits with 1 if a ratio has become worse by
more than both runs' intervals.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.records import find_slowdowns, format_line, format_table
from benchmarks.rows import ROWS, add_arguments, read_settings, run_row

SCHEMA = "emlens-benchmark-suite/1"


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; 1 where something has become slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--only", choices=ROWS, action="append", help="one row; may be repeated")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier --out file")
    parser.add_argument("--out", type=Path, help="where to write the JSON object")
    arguments = parser.parse_args(argv)
    settings = read_settings(arguments)
    old = read_records(arguments.compare) if arguments.compare else {}
    records: list[dict[str, Any]] = []
    slower: list[str] = []
    for row in arguments.only or ROWS:
        start = time.perf_counter()
        record = run_row(row, settings)
        print(format_table(record))
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        records.append(json.loads(format_line(record)))
        if row in old:
            slower += find_slowdowns(old[row], records[-1])
    for line in slower:
        print(f"SLOWER {line}")
    suite = {"schema": SCHEMA, "suite": arguments.suite, "size": settings.size, "rows": records}
    line = json.dumps(suite)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 1 if slower else 0


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read the records of an earlier run, by row."""
    suite = json.loads(path.read_text(encoding="utf-8"))
    if suite.get("schema") != SCHEMA:
        raise SystemExit(f"--compare {path}: schema {suite.get('schema')!r}, expected {SCHEMA!r}")
    return {record["row"]: record for record in suite["rows"]}


if __name__ == "__main__":
    sys.exit(main())
