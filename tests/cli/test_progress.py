"""Progress as lines and as bars, always on stderr."""

import io
import logging

import pytest
from rich.console import Console

from emlens.cli import progress
from emlens.cli.progress import (
    BarListener,
    LineListener,
    describe_progress,
    make_bars,
    show_work,
)
from emlens.data import track


def make_console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_has_count_rate_and_time_left():
    assert describe_progress("reading", 250, 1000, seconds=10.0) == (
        "reading: 250/1,000, 25.0/s, 0:30 left"
    )
    slow = describe_progress("training (steps)", 3, 20, seconds=300.0)
    assert slow == "training (steps): 3/20, 36.0/h, 28:20 left"
    assert "1/20, 2.4/min" in describe_progress("training (steps)", 1, 20, seconds=25.0)
    assert describe_progress("reading", 0, 1000, seconds=10.0) == "reading: 0/1,000"
    assert describe_progress("reading", 1000, 1000, seconds=10.0).endswith("in 10.0 s")


def test_lines_come_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 2.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    console = make_console(terminal=False)
    listener = LineListener(console)
    for done in range(6):
        listener("reading", done, 5)
    lines = text_of(console).splitlines()
    assert [line.split(",")[0] for line in lines] == ["reading: 3/5", "reading: 5/5"]


def test_a_task_that_comes_again_starts_anew():
    console = make_console(terminal=False)
    listener = LineListener(console)
    for _ in range(2):
        listener("reading", 0, 2)
        listener("reading", 2, 2)
    assert len(text_of(console).splitlines()) == 2


def test_bars_show_each_task_with_its_count():
    console = make_console(terminal=True)
    with make_bars(console) as bars:
        listener = BarListener(bars)
        listener("first [x]", 1, 4)
        listener("second", 2, 2)
        listener("second", 0, 2)
        assert [(task.completed, task.total) for task in bars.tasks] == [(1, 4), (2, 2), (0, 2)]
    assert "first [x]" in text_of(console)
    assert "1/4" in text_of(console)


def test_work_is_shown_on_stderr_alone(capsys: pytest.CaptureFixture[str]):
    with show_work(quiet=False):
        list(track([1, 2], "counting"))
        logging.getLogger("emlens.sample").info("a [notice] of %d", 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "counting: 2/2" in captured.err
    assert "a [notice] of 3" in captured.err


def test_quiet_shows_nothing_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]):
    before = list(logging.getLogger("emlens").handlers)
    with show_work(quiet=True):
        list(track([1, 2], "counting"))
        logging.getLogger("emlens.sample").info("a notice")
    with show_work(quiet=False):
        pass
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("emlens").handlers == before
