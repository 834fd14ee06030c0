"""Break the package one line at a time, and fail if the tests let a break live.

A list of known defects (`mutants.toml`), not a generator of random ones: each entry is a mistake
that somebody makes or made. Every defect is applied to a copy; the checkout stays as it is.

    python scripts/mutants.py [--list] [--only 3 --only 7]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "scripts" / "mutants.toml"
SECONDS_FOR_ONE = 900.0
"""A run of tests that takes longer than this (seconds) hangs, which counts as noticed."""
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "_build", "__pycache__", ".*_cache", ".hypothesis"
)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One defect: `old`, found exactly once in `file`, becomes `new`; `tests` should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutants(path: Path = LIST) -> tuple[Mutant, ...]:
    """The defects of a list, in its order.

    Raises:
        TypeError: an entry lacks a field or has one that is not known.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    return tuple(Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries)


def break_file(mutant: Mutant, root: Path) -> str:
    """The text of the broken file.

    Raises:
        ValueError: the entry no longer fits the source, or the broken file is not Python.
    """
    source = (root / mutant.file).read_text(encoding="utf-8")
    if (found := source.count(mutant.old)) != 1:
        raise ValueError(
            f"{mutant.what}: {mutant.old!r} is {found} times in {mutant.file}, expected once"
        )
    broken = source.replace(mutant.old, mutant.new)
    if broken == source or not mutant.tests:
        raise ValueError(f"{mutant.what}: it changes nothing or names no tests")
    if mutant.file.endswith(".py"):
        compile(broken, mutant.file, "exec")
    return broken


def run_tests(root: Path, tests: Sequence[str], seconds: float = SECONDS_FOR_ONE) -> str:
    """`passed`, `failed` (a hang too) or the end of what pytest said when it could not run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # The copy stands before an installed package; stale bytecode would hide the defect.
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "failed"
    verdicts = {0: "passed", 1: "failed"}
    return verdicts.get(done.returncode) or f"exit {done.returncode}: {done.stdout[-2000:]}"


def judge_mutant(mutant: Mutant, root: Path) -> str:
    """`killed`, `SURVIVED`, or `INVALID` with the reason; `root` ends as it began."""
    path = root / mutant.file
    try:
        broken = break_file(mutant, root)
    except (ValueError, SyntaxError, OSError) as error:
        return f"INVALID ({error})"
    source = path.read_text(encoding="utf-8")
    path.write_text(broken, encoding="utf-8")
    try:
        verdict = run_tests(root, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    return {"failed": "killed", "passed": "SURVIVED"}.get(verdict, f"INVALID ({verdict})")


def judge_mutants(mutants: Sequence[Mutant], root: Path) -> list[str]:
    """A verdict for each; a defect whose tests fail without it proves nothing and is INVALID."""
    healthy: dict[tuple[str, ...], str] = {}
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(root, copy, ignore=LEFT_OUT, symlinks=True)
        for mutant in mutants:
            start = time.monotonic()
            if mutant.tests not in healthy:
                healthy[mutant.tests] = run_tests(copy, mutant.tests)
            sound = healthy[mutant.tests]
            verdict = (
                judge_mutant(mutant, copy)
                if sound == "passed"
                else f"INVALID (without the defect its tests: {sound})"
            )
            print(f"{verdict:9} {time.monotonic() - start:6.1f} s  {mutant.what}", flush=True)
            verdicts.append(verdict)
    return verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every defect asked for was noticed."""
    parser = argparse.ArgumentParser(description="fail if the tests let a known defect live")
    parser.add_argument("--list", action="store_true", help="number the defects, run nothing")
    parser.add_argument("--only", type=int, action="append", metavar="N", help="defect number N")
    options = parser.parse_args(arguments)
    mutants = read_mutants()
    chosen = options.only or list(range(1, len(mutants) + 1))
    if wrong := [n for n in chosen if not 1 <= n <= len(mutants)]:
        parser.error(f"--only {wrong[0]}: there are defects 1 to {len(mutants)}")
    if options.list:
        for number in chosen:
            print(f"{number:3}  {mutants[number - 1].file}: {mutants[number - 1].what}")
        return 0
    verdicts = judge_mutants([mutants[n - 1] for n in chosen], ROOT)
    killed = verdicts.count("killed")
    print(f"{killed} of {len(verdicts)} killed")
    return 0 if verdicts and killed == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
