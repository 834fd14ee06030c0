"""How far a long loop is, told to whoever listens; silent unless somebody asks.

Loops call `track`; `report_progress` or `show_progress` around a call listens. Not for logging.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int, int], None]
"""Called with the name of a task, what is done of it, and its total, in tokens, rows or steps."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def tell_progress(task: str, done: int, total: int) -> None:
    """Tell the listener, if there is one, how far a task is."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(task, done, total)


def track(
    items: Sequence[Item], task: str, *, sizes: Iterable[int] | None = None
) -> Iterator[Item]:
    """Yield the items; the listener hears at the start and after each of them.

    Args:
        items: what is worked on.
        task: what the listener shows, such as `comparing (tokens)`.
        sizes: work in each item, where they differ; 1 each by default.
    """
    weights = [1] * len(items) if sizes is None else list(sizes)
    done, total = 0, sum(weights)
    tell_progress(task, 0, total)
    for item, weight in zip(items, weights, strict=True):
        yield item
        done += weight
        tell_progress(task, done, total)


@contextmanager
def report_progress(listener: Listener | None) -> Iterator[None]:
    """Let a function hear of all progress inside the block; None silences an outer listener."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def show_progress() -> Iterator[None]:
    """Show a bar with rate and remaining time for each task, in a notebook or a terminal."""
    from tqdm.auto import tqdm

    bars: dict[str, tqdm] = {}

    def advance(task: str, done: int, total: int) -> None:
        if task not in bars:
            bars[task] = tqdm(total=total, desc=task)
        bars[task].update(done - bars[task].n)
        if done >= total:  # the next task of that name gets a bar of its own
            bars.pop(task).close()

    try:
        with report_progress(advance):
            yield
    finally:
        for bar in bars.values():
            bar.close()
