"""Progress of a command on stderr: bars in a terminal, lines elsewhere, nothing under --quiet."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_SECONDS = 5.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def show_work(*, quiet: bool) -> Iterator[None]:
    """Show what the library tells of its progress, and what it logs, while the block runs."""
    from emlens.data.progress import report_progress
    from emlens.models.quiet import quiet_host_libraries

    quiet_host_libraries()
    if quiet:
        yield
        return
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with _log_to(console):
        if console.is_terminal:
            with make_bars(console) as bars, report_progress(BarListener(bars)):
                yield
        else:
            with report_progress(LineListener(console)):
                yield


class RateColumn(ProgressColumn):
    """How fast the work goes."""

    def render(self, task: Task) -> Text:
        """Draw it."""
        rate = task.finished_speed or task.speed
        return Text(show_rate(rate) if rate else "", style="progress.data.speed")


def show_rate(rate: float) -> str:
    """A rate, given in units a second, by the shortest of the usual times that holds one unit."""
    if rate >= 1:
        return f"{rate:,.1f}/s"
    return f"{60 * rate:.1f}/min" if 60 * rate >= 1 else f"{3600 * rate:.1f}/h"


def make_bars(console: Console) -> Progress:
    """One line a task: bar, count, rate, time gone and time left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


class BarListener:
    """Draws progress as bars.

    Args:
        bars: where.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        """Take in one report."""
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._tasks[task], completed=done)
        if done >= total:  # the next task of that name gets a bar of its own
            del self._tasks[task]


class LineListener:
    """Prints progress as lines, a few a minute and one at the end.

    Args:
        console: where.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: dict[str, float] = {}
        self._printed: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        """Take in one report."""
        now = time.monotonic()
        began = self._began.setdefault(task, now)
        printed = self._printed.setdefault(task, now)
        if done < total and now - printed < LINE_SECONDS:
            return
        self._printed[task] = now
        self._console.print(describe_progress(task, done, total, seconds=now - began))
        if done >= total:
            del self._began[task], self._printed[task]


def describe_progress(task: str, done: int, total: int, *, seconds: float) -> str:
    """One line: `comparing (tokens): 512/2,048, 128.0/s, 0:12 left`."""
    line = f"{task}: {done:,}/{total:,}"
    if not done or not seconds:
        return line
    rate = done / seconds
    left = round((total - done) / rate)
    tail = f"{left // 60}:{left % 60:02d} left" if done < total else f"in {seconds:.1f} s"
    return f"{line}, {show_rate(rate)}, {tail}"


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage())


@contextmanager
def _log_to(console: Console) -> Iterator[None]:
    """Print what emlens logs, for instance that a file is converted once, above the bars."""
    logger, handler = logging.getLogger("emlens"), _ConsoleHandler(console)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
