"""Judges as people call them: by kind and model, beside the beginning of the hash in their id."""

import string

SHOWN_DIGITS = 8
"""Of a hash: one in four billion judges of one name would be shown alike."""
LEAST_DIGITS = 16
"""A shorter last part of an id is no hash, and is shown as it is."""


def name_judge(judge: str, name: str = "") -> str:
    """A judge for tables and sentences, such as `openai/gpt-4o (5fd1bae4)`.

    Args:
        judge: its id, whose last part is a hash as a rule.
        name: what it calls itself; where it is empty, the rest of the id.
    """
    kind, _, last = judge.rpartition("/")
    digits = last.partition("-")[0]
    hashed = len(digits) >= LEAST_DIGITS and set(digits) <= set(string.hexdigits)
    if not hashed:
        return f"{name} ({judge})" if name and name != judge else judge
    return f"{name or kind} ({last[:SHOWN_DIGITS]}{last[len(digits) :]})"
