"""A study in stages that a run folder remembers: each is timed, saved, and never run twice.

For one result a stage. Not a scheduler: stages run in the order in which they are asked for.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from emlens.artifacts import AnyResult, Result
from emlens.runs import RunFolder

TIMES = "times"

AnyValue = TypeVar("AnyValue")


@dataclass(frozen=True, kw_only=True)
class StageTimes(Result):
    """Wall time of the stages of a run that are finished."""

    kind: ClassVar[str] = "stage_times"

    seconds: dict[str, float]
    """Stage -> seconds."""


class Stages:
    """The stages of one run.

    Args:
        run: where results and times are kept.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        kept = run.read_result(TIMES, StageTimes).seconds if run.has_result(TIMES) else {}
        self.seconds = dict(kept)
        """Stage -> wall time without that of stages inside it, earlier calls included."""
        self._inner = [0.0]

    def keep(self, name: str, cls: type[AnyResult], make: Callable[[], AnyResult]) -> AnyResult:
        """Return the result of a stage: read if it is there, else made, timed and saved."""
        if self._run.has_result(name):
            return self._run.read_result(name, cls)
        return self.time(name, lambda: self._saved(name, make()))

    def time(self, name: str, make: Callable[[], AnyValue]) -> AnyValue:
        """Return what a function makes, its wall time kept under a stage's name."""
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            value = make()
        finally:
            inner = self._inner.pop()
        spent = time.perf_counter() - began
        self._inner[-1] += spent
        self.seconds[name] = round(spent - inner, 3)
        self._run.save_result(TIMES, StageTimes(seconds=self.seconds))
        return value

    def _saved(self, name: str, result: AnyResult) -> AnyResult:
        self._run.save_result(name, result)
        return result
