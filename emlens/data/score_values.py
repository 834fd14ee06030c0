"""What a judge's score may look like in a table, read in one way everywhere; not a judge.

A missing score is None, never 0: whoever counts must say what became of it.
"""

import math
import re
from numbers import Real
from typing import Any

UNSCORED = frozenset({"", "nan", "none", "null", "n/a", "na", "refusal", "code"})
"""What stands in a score's place where the judge gave none, in any case of letters."""
ROUNDING = 1e-6
"""A weighted mean of 0..100 may lie that far outside by rounding."""
# Of ASCII alone: Python's own float() takes digits of any script, underscores, and "inf".
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_score(value: Any, name: str) -> float | None:
    """Read a score from 0 to 100; None where the judge gave none (empty, NaN, REFUSAL, ...).

    Args:
        value: a number, the text of one, None, or one of `UNSCORED`.
        name: of the column, for messages.

    Raises:
        ValueError: anything else, such as `²`, `1_0`, `inf` or 101; a bool is no number.
    """
    found = value
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in UNSCORED:
            return None
        found = float(text) if _NUMBER.fullmatch(text) else None
    elif value is None:
        return None
    if isinstance(found, bool) or not isinstance(found, Real):
        raise ValueError(f"{name} is {value!r}, expected a number, or nothing without a score")
    number = float(found)
    if math.isnan(number):
        return None
    if not is_score(number):
        raise ValueError(f"{name} is {value!r}, expected 0 to 100, or nothing without a score")
    return number


def is_score(number: float | int) -> bool:
    """Whether a number is from 0 to 100, rounding aside."""
    return -ROUNDING <= number <= 100 + ROUNDING
