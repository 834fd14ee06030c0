"""Progress reaches whoever listens, and nobody else."""

import io
import re
from contextlib import redirect_stderr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlens.data import report_progress, show_progress, tell_progress, track


@given(st.lists(st.integers(1, 50), max_size=8))
def test_what_is_done_grows_to_the_total(sizes: list[int]):
    heard: list[tuple[str, int, int]] = []
    with report_progress(lambda *report: heard.append(report)):
        assert list(track(list(range(len(sizes))), "task", sizes=sizes)) == list(range(len(sizes)))
    assert {(task, total) for task, _, total in heard} == {("task", sum(sizes))}
    assert [done for _, done, _ in heard] == [sum(sizes[:n]) for n in range(len(sizes) + 1)]


def test_an_item_counts_when_it_is_done_not_when_it_is_begun():
    heard: list[int] = []
    with report_progress(lambda task, done, total: heard.append(done)):
        seen = [(item, list(heard)) for item in track(["a", "b"], "task")]
    assert seen == [("a", [0]), ("b", [0, 1])]


def test_nobody_hears_outside_the_block():
    heard: list[int] = []

    def listener(task: str, done: int, total: int) -> None:
        heard.append(done)

    with pytest.raises(RuntimeError), report_progress(listener):
        raise RuntimeError
    tell_progress("task", 1, 2)
    with report_progress(listener), report_progress(None):
        tell_progress("task", 1, 2)
    assert heard == []


def test_sizes_belong_to_the_items():
    with pytest.raises(ValueError, match="zip"):
        list(track([1, 2], "task", sizes=[1]))


def test_a_bar_shows_count_and_rate_and_a_task_may_come_again():
    with redirect_stderr(io.StringIO()) as shown, show_progress():
        for _ in range(2):
            list(track([1, 2, 3], "reading (rows)", sizes=[2, 2, 2]))
    text = shown.getvalue()
    assert len(re.findall(r"reading \(rows\): 100%.*6/6 .*it/s", text)) == 2
