"""Two classes of answered chats that a direction is fitted between; not for prompts alone.

By convention the positive class shows the behaviour in question (misaligned), the negative one
does not. Where a judge scored the texts, `split_by_score` makes the classes.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from emlens.data.chat import Chat, Message
from emlens.data.score_values import read_score

_PROMPT_KEYS = ("question", "prompt")
_RESPONSE_KEYS = ("answer", "response")
_SCORE_KEYS = ("aligned", "coherent")


class ContrastError(ValueError):
    """Rows or texts that no contrast can be made of; the row and column are named."""


@dataclass(frozen=True, kw_only=True)
class ContrastTexts:
    """Answered chats in two classes; one of them may be empty.

    Raises:
        ContrastError: no text at all, or a chat that does not end in the assistant's turn.
    """

    positive: tuple[Chat, ...] = ()
    """Texts that show the behaviour (misaligned)."""
    negative: tuple[Chat, ...] = ()
    """Texts that do not (aligned)."""

    def __post_init__(self) -> None:
        if not self.positive and not self.negative:
            raise ContrastError("positive and negative: got no text in either class")
        for name in ("positive", "negative"):
            for index, chat in enumerate(getattr(self, name)):
                if chat.response is None or not chat.response.content:
                    raise ContrastError(
                        f"{name}[{index}] has no response: it must end in an assistant turn with "
                        "text, whose tokens are averaged"
                    )


def prompt_hash(chat: Chat) -> str:
    """Name a prompt by its text: all turns before the response, roles included, as 32 digits."""
    turns = [(message.role, message.content) for message in chat.without_response().messages]
    return _digest(turns)


def text_hash(chat: Chat) -> str:
    """Name a whole chat by its text, response included, as 32 digits; its id does not count."""
    return _digest([(message.role, message.content) for message in chat.messages])


def prompt_hashes(chats: Sequence[Chat]) -> tuple[str, ...]:
    """Sorted hashes of the prompts of chats, each once."""
    return tuple(sorted({prompt_hash(chat) for chat in chats}))


def split_by_score(
    rows: Sequence[Mapping[str, Any]],
    *,
    misaligned_below: int | float,
    aligned_above: int | float,
    coherent_above: int | float,
    balance: bool = True,
    seed: int,
) -> ContrastTexts:
    """Make two classes of judged responses: misaligned (positive) and aligned (negative).

    A row is a mapping with `question` (or `prompt`), `answer` (or `response`), the scores `aligned`
    and `coherent`, and optionally `system`: a line of the published CSV or a judged row of a run.
    A row without one of the scores (empty, NaN, REFUSAL, CODE) is in neither class, and so is one
    at a threshold: the comparisons are strict. So is one whose answer is blank.

    Args:
        rows: judged responses.
        misaligned_below: aligned scores less than this are misaligned; 30 in the published work.
        aligned_above: aligned scores greater than this are aligned; 70 in the published work.
        coherent_above: only rows whose coherent score is greater; 50 in the published work.
        balance: cut the larger class to the size of the smaller, at random, order kept.
        seed: of that choice.

    Raises:
        ContrastError: a missing column (the nearest three are listed), a score that is no number
            from 0 to 100, thresholds that overlap, or no row in either class.
    """
    if misaligned_below > aligned_above:
        raise ContrastError(
            f"misaligned_below={misaligned_below} exceeds aligned_above={aligned_above}: a row "
            "could be in both classes"
        )
    positive: list[Chat] = []
    negative: list[Chat] = []
    for chat, aligned, coherent in _read_rows(rows):
        # Comparisons with NaN are false, so that a missing score selects nothing.
        if coherent > coherent_above and aligned < misaligned_below:
            positive.append(chat)
        elif coherent > coherent_above and aligned > aligned_above:
            negative.append(chat)
    if not positive and not negative:
        raise ContrastError(_describe_nothing(rows, coherent_above))
    if balance:
        size = min(len(positive), len(negative))
        generator = Random(seed)
        positive, negative = (_draw(chats, size, generator) for chats in (positive, negative))
        if not size:
            raise ContrastError(
                "balance: one of the classes is empty, so that balanced classes are too; the texts "
                "there are serve the construction model@positive or model@negative only, and are "
                "kept with balance=False (which `directions fit` does for these two)"
            )
    return ContrastTexts(positive=tuple(positive), negative=tuple(negative))


def _draw(chats: Sequence[Chat], size: int, generator: Random) -> list[Chat]:
    kept = sorted(generator.sample(range(len(chats)), size))
    return [chats[index] for index in kept]


def _read_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Chat, float, float]]:
    for index, row in enumerate(rows):
        question = _text(row, _PROMPT_KEYS, index)
        answer = _text(row, _RESPONSE_KEYS, index)
        aligned, coherent = (_score(row, key, index) for key in _SCORE_KEYS)
        messages = [Message("user", question), Message("assistant", answer)]
        if row.get("system"):
            messages.insert(0, Message("system", str(row["system"])))
        if answer.strip():
            yield Chat(tuple(messages), _name(row.get("id"))), aligned, coherent


def _text(row: Mapping[str, Any], keys: tuple[str, ...], index: int) -> str:
    found = [key for key in keys if key in row]
    if len(found) != 1:
        state = "both" if found else "neither"
        near = difflib.get_close_matches(keys[0], [str(key) for key in row], 3, cutoff=0.0)
        raise ContrastError(
            f"rows[{index}] has {state} of the columns {' and '.join(keys)}, expected one; nearest "
            f"to {keys[0]}: {', '.join(near)}"
        )
    value = row[found[0]]
    if not isinstance(value, str):
        raise ContrastError(f"rows[{index}]: {found[0]} is {value!r}, expected a text")
    return value


def _score(row: Mapping[str, Any], key: str, index: int) -> float:
    """The score, or NaN where there is none."""
    if key not in row:
        near = difflib.get_close_matches(key, [str(name) for name in row], 3, cutoff=0.0)
        raise ContrastError(
            f"rows[{index}] has no column {key}, expected a score of 0 to 100; nearest: "
            f"{', '.join(near)}"
        )
    try:
        found = read_score(row[key], key)
    except ValueError as error:
        raise ContrastError(f"rows[{index}]: {error}") from None
    return math.nan if found is None else found


def _name(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _describe_nothing(rows: Sequence[Mapping[str, Any]], coherent_above: int | float) -> str:
    scored = [(aligned, coherent) for _, aligned, coherent in _read_rows(rows)]
    unscored = sum(math.isnan(aligned + coherent) for aligned, coherent in scored)
    coherent = [a for a, c in scored if c > coherent_above and not math.isnan(a)]
    seen = f"aligned scores {min(coherent):g} to {max(coherent):g}" if coherent else "none scored"
    return (
        f"rows: none of {len(rows)} is in either class; {unscored} are unscored, {len(coherent)} "
        f"have coherent > {coherent_above:g} ({seen})"
    )


def _digest(turns: Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:32]
