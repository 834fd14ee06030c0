"""Finished parts of a screen by name, on the disk where there is a folder, else in memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emlens.journal import Journal
from emlens.runs import RunFolder

JOURNAL_NAME = "screen.jsonl"


class ScreenJournal:
    """Parts that are made once; `open_journal` gives one."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        rows = [] if journal is None else journal.rows()
        self._done: dict[str, Any] = {row["id"]: row["part"] for row in rows}

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def ask(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the part of a name; made now, and kept at once, where it is not there yet."""
        if name not in self._done:
            part = make()
            if self._journal is not None:
                self._journal.append([{"id": name, "part": part}])
            self._done[name] = part
        return self._done[name]


@contextmanager
def open_journal(out: str | Path | None, plan: Mapping[str, Any]) -> Iterator[ScreenJournal]:
    """Begin or go on with a screen in a folder; None keeps nothing.

    Raises:
        PlanChangedError: the folder holds a screen of another plan; what differs is named.
        JournalLockedError: another process writes there.
    """
    if out is None:
        yield ScreenJournal(None)
        return
    run = RunFolder.start(out, plan)
    with Journal(run.path / JOURNAL_NAME) as journal:
        yield ScreenJournal(journal)
