"""Time several ways of doing one thing, interleaved, and compare them pair by pair.

Not for absolute times on a shared CPU: only the ratios of one run mean something there.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

LEVEL = 0.95
"""Coverage asked of an interval."""
MIN_PAIRS = 6
"""With fewer pairs not even smallest-to-largest covers the median in 95 % of runs."""

Side = Callable[[], object]


class PeerLeftOutError(RuntimeError):
    """A peer cannot be run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median of paired ratios and an interval of it."""

    median: float
    low: float
    high: float
    pairs: int
    """How many; 1 for a count, which is the same in every run, and for a single measurement."""
    coverage: float
    """Probability that such an interval holds the true median; 0 where there is none."""


def exact_ratio(value: float) -> Ratio:
    """A ratio that was counted rather than timed."""
    return Ratio(median=value, low=value, high=value, pairs=1, coverage=1.0)


def single_ratio(value: float) -> Ratio:
    """A ratio that was measured once, as memory is: it has no interval."""
    return Ratio(median=value, low=value, high=value, pairs=1, coverage=0.0)


def median_ratio(values: Sequence[float]) -> Ratio:
    """The median with the narrowest pair of order statistics that covers it at 95 %.

    The number of values under the true median is binomial(n, 1/2), whatever the distribution, so
    the interval between the k-th smallest and the k-th largest misses it with probability
    2 P(fewer than k).

    Raises:
        ValueError: fewer than six values.

    Source: Conover 1999, Practical Nonparametric Statistics, 3rd edition, section 3.2.
    """
    n = len(values)
    if n < MIN_PAIRS:
        raise ValueError(f"values: got {n} pairs, expected at least {MIN_PAIRS}")
    ordered = sorted(values)
    k, missed = 1, 2 * 0.5**n
    while missed + 2 * math.comb(n, k) * 0.5**n <= 1 - LEVEL:
        missed += 2 * math.comb(n, k) * 0.5**n
        k += 1
    return Ratio(
        median=statistics.median(ordered),
        low=ordered[k - 1],
        high=ordered[n - k],
        pairs=n,
        coverage=1 - missed,
    )


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of every side in every round."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, side: str) -> float:
        """The median time of one side, in seconds."""
        return statistics.median(self.seconds[side])

    def derived(self, name: str, formula: Callable[[Mapping[str, float]], float]) -> "Timings":
        """The same with one more side, whose time in each round follows from the others'."""
        rounds = zip(*self.seconds.values(), strict=True)
        found = tuple(formula(dict(zip(self.seconds, times, strict=True))) for times in rounds)
        return Timings(seconds={**self.seconds, name: found})

    def share(self, side: str, done: float, of: str, most: float) -> Ratio:
        """What one side does a second of what another does, round by round.

        Args:
            side: whose rate.
            done: what it does in a call, such as FLOPs or bytes.
            of: the side whose rate is the most there is.
            most: what that one does in a call, in the same unit.
        """
        pairs = zip(self.seconds[side], self.seconds[of], strict=True)
        return median_ratio([(done / a) / (most / b) for a, b in pairs])

    def cost(self, side: str, over: str) -> Ratio:
        """Time of one side over another's, round by round."""
        pairs = zip(self.seconds[side], self.seconds[over], strict=True)
        return median_ratio([a / b for a, b in pairs])

    def speed(self, side: str, over: str) -> Ratio:
        """Speed of one side relative to another's: above 1 is faster."""
        return self.cost(over, side)


def time_sides(
    sides: Mapping[str, Side],
    *,
    rounds: int,
    warm_up: int | None = None,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    notes: list[str] | None = None,
) -> Timings:
    """Time each side once a round, back and forth, so that drift falls on all of them alike.

    Args:
        sides: what is compared, by name; what they return is thrown away.
        rounds: how many pairs each ratio will have.
        warm_up: untimed calls of each side beforehand; by default one, on a GPU three: kernels are
            chosen, and clocks come up, in the first.
        device: a GPU's own events are used instead of the clock.
        clock: seconds.
        notes: why a peer that gave up on the way was left out is added to these; without them it
            ends the timing.
    """
    calls = warm_up if warm_up is not None else (1 if device == "cpu" else 3)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in sides.items():
        with _left_out(name, seconds, notes):
            for _ in range(calls):
                side()
    for index in range(rounds):
        order = list(seconds) if index % 2 == 0 else list(seconds)[::-1]
        with _without_collector():
            for name in order:
                with _left_out(name, seconds, notes):
                    seconds[name].append(_time_one(sides[name], device, clock))
    return Timings(seconds={name: tuple(values) for name, values in seconds.items()})


@contextmanager
def _left_out(
    name: str, seconds: dict[str, list[float]], notes: list[str] | None
) -> Iterator[None]:
    """Forget a peer that gives up, where there are notes to say so in."""
    try:
        yield
    except PeerLeftOutError as error:
        if notes is None:
            raise
        notes.append(f"{name}: {error}")
        del seconds[name]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Collect before a round rather than inside a timed call."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _time_one(side: Side, device: str, clock: Callable[[], float]) -> float:
    """Seconds of one call; on a GPU between two events, so that launching late is counted."""
    if device == "cpu":
        start = clock()
        side()
        return clock() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    side()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3
