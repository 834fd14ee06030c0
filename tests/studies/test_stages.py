"""Stages are timed, saved, and never run twice."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from emlens.artifacts import Result
from emlens.runs import RunFolder
from emlens.studies.stages import Stages


@dataclass(frozen=True, kw_only=True)
class Sample(Result):
    kind: ClassVar[str] = "test_stage_sample"
    value: int


def start(folder: Path) -> Stages:
    return Stages(RunFolder.start(folder / "run", {"kind": "sample"}))


def refuse() -> Sample:
    raise AssertionError("made again")


def test_a_finished_stage_is_read_and_keeps_its_time(tmp_path: Path):
    first = start(tmp_path)
    assert first.keep("a", Sample, lambda: Sample(value=3)) == Sample(value=3)
    again = start(tmp_path)
    assert again.keep("a", Sample, refuse) == Sample(value=3)
    assert again.seconds == first.seconds
    assert set(again.seconds) == {"a"}


def test_a_stage_that_fails_leaves_nothing_and_is_run_again(tmp_path: Path):
    stages = start(tmp_path)
    with pytest.raises(AssertionError):
        stages.keep("a", Sample, refuse)
    assert stages.seconds == {}
    assert start(tmp_path).keep("a", Sample, lambda: Sample(value=1)) == Sample(value=1)


def test_the_time_of_a_stage_leaves_out_the_stages_inside_it(tmp_path: Path):
    stages = start(tmp_path)

    def outer() -> Sample:
        stages.time("load", lambda: time.sleep(0.2))
        with pytest.raises(ZeroDivisionError):
            stages.time("broken", lambda: 1 // 0)
        time.sleep(0.05)
        return Sample(value=1)

    began = time.perf_counter()
    stages.keep("a", Sample, outer)
    whole = time.perf_counter() - began
    assert 0.2 <= stages.seconds["load"] < whole
    assert stages.seconds["a"] < whole - 0.19
    assert sum(stages.seconds.values()) <= whole + 0.01
