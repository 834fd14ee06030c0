"""Named positions: which tokens of a chat a measurement looks at.

Do not use it on padded rows: a mask here has one entry for each real token (`batches.position_mask`
places masks in a padded batch).
"""

import difflib
import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from emlens.data.chat import TokenizedChat

SPANS = ("prompt", "response", "response+eot", "all", "last_prompt")

_GRAMMAR = re.compile(r"([^\[\]]*)(?:\[(-?[0-9]+)?:(-?[0-9]+)?\])?")


class PositionsError(ValueError):
    """Positions that do not follow the grammar, or a span that a chat does not have."""


class EmptySelectionError(PositionsError):
    """Positions that select no token of a chat."""


@dataclass(frozen=True)
class Positions:
    """A named span of a chat and a slice counted inside it.

    `prompt` is everything before the response, `response` the last assistant turn without header
    and end-of-turn token, `response+eot` the same with it, `all` every real token, `last_prompt`
    the token right before the response starts.

    Raises:
        PositionsError: an unknown span; the nearest three are listed.
    """

    span: str
    """One of `prompt`, `response`, `response+eot`, `all`, `last_prompt`."""
    start: int | None = None
    """First token inside the span, as in a Python slice; negative counts from its end."""
    stop: int | None = None
    """Token after the last inside the span, as in a Python slice; None is the span's end."""

    def __post_init__(self) -> None:
        if self.span not in SPANS:
            near = difflib.get_close_matches(self.span, SPANS, n=3, cutoff=0.0)
            raise PositionsError(
                f"positions: the span {self.span!r} is not known; nearest: {', '.join(near)}"
            )

    def __str__(self) -> str:
        if self.start is None and self.stop is None:
            return self.span
        start, stop = ("" if edge is None else edge for edge in (self.start, self.stop))
        return f"{self.span}[{start}:{stop}]"

    def mask(self, chat: TokenizedChat) -> Bool[Tensor, " pos"]:
        """Return True at the selected tokens of a chat.

        Raises:
            PositionsError: the chat has no assistant turn, no end-of-turn token, or does not end
                where a response begins, and the span needs it.
            EmptySelectionError: no token is selected.
        """
        first, after = self._bounds(chat)
        selected = range(first, after)[self.start : self.stop]
        if not selected:
            raise EmptySelectionError(
                f"positions: {self} selects nothing{_of(chat)}: the span has {after - first} tokens"
            )
        mask = torch.zeros(len(chat.ids), dtype=torch.bool)
        mask[selected.start : selected.stop] = True
        return mask

    def _bounds(self, chat: TokenizedChat) -> tuple[int, int]:
        if self.span == "all":
            return 0, len(chat.ids)
        if self.span == "prompt":
            return 0, chat.prompt_end
        if self.span == "last_prompt":
            return self._last_prompt(chat)
        if chat.response is None:
            raise PositionsError(
                f"positions: {self} needs an assistant turn, and there is none{_of(chat)}"
            )
        if self.span == "response":
            return chat.response
        if chat.response_eot is None:
            raise PositionsError(
                f"positions: {self} needs an end-of-turn token after the response, and the "
                f"template writes none{_of(chat)}; use 'response'"
            )
        return chat.response[0], chat.response_eot

    def _last_prompt(self, chat: TokenizedChat) -> tuple[int, int]:
        if chat.response is None and not chat.awaits_response:
            raise PositionsError(
                f"positions: {self} is the token before a response, and no response can start"
                f"{_of(chat)}: it was tokenised without the header of an answer; pass "
                "for_generation=True"
            )
        return max(chat.prompt_end - 1, 0), chat.prompt_end


def parse_positions(text: str) -> Positions:
    """Read `prompt`, `response`, `response+eot`, `all` or `last_prompt`, with an optional slice.

    Raises:
        PositionsError: an unknown span, or a slice other than `[start:stop]`.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise PositionsError(
            f"positions: cannot read {text!r}; expected a span ({', '.join(SPANS)}) with an "
            "optional slice such as 'response[:5]' or 'all[8:]'"
        )
    span, start, stop = match.groups()
    return Positions(
        span, None if start is None else int(start), None if stop is None else int(stop)
    )


def _of(chat: TokenizedChat) -> str:
    return " in the chat" if chat.id is None else f" in the chat with id {chat.id!r}"
