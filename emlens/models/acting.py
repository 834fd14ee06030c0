"""What acts on a model for a while, in words: for those who write down what was computed.

Whoever changes a model says so here; what is there for good (weights, an adapter) is `identity`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

Describe = Callable[[], Sequence[dict[str, Any]]]
"""Gives one JSON object for each thing that acts; called only when somebody asks."""

_ACTING: WeakKeyDictionary[Any, list[Describe]] = WeakKeyDictionary()


@contextmanager
def declare_acting(model: Any, describe: Describe) -> Iterator[None]:
    """Say what acts on a model while the context lasts."""
    stack = _ACTING.setdefault(model, [])
    stack.append(describe)
    try:
        yield
    finally:
        stack.pop()


def describe_acting(model: Any) -> list[dict[str, Any]]:
    """Everything that acts on a model right now, outer contexts first; equal for equal effects."""
    return [one for describe in _ACTING.get(model, ()) for one in describe()]
