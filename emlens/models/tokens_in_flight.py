"""Which token each column of a running forward pass is, whatever the padding and the cache.

Callers that run chats publish this beside the model, and hooks ask for it. Under a plain
`model(ids)` nobody publishes: there named positions have no meaning.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.data import Batch, Positions, PositionsError, TokenizedChat

_ENDLESS = sys.maxsize
"""End of a span that is still growing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokensInFlight:
    """Where each column of a forward pass stands in its row's unpadded text.

    What is known of a row is kept on the CPU, so that looking it up never waits for a device.
    """

    absolute: Int[Tensor, "batch pos"]
    """Index of the token in its row's text, -1 at padding."""
    rows: Int[Tensor, " batch"]
    """Index of each row in the caller's whole run."""
    length: Int[Tensor, " batch"]
    """Tokens of the row's whole text, also of the part that is not in this pass."""
    prompt_end: Int[Tensor, " batch"]
    """Number of prompt tokens."""
    response_start: Int[Tensor, " batch"]
    """First token of the response, -1 where there is none."""
    response_stop: Int[Tensor, " batch"]
    """Index after the last token of the response, -1 where there is none."""
    eot_stop: Int[Tensor, " batch"]
    """Index after the end-of-turn token of the response, -1 where none is written."""
    awaits: Bool[Tensor, " batch"]
    """Whether a response begins at, or right after, the end of the prompt."""
    open_ended: bool = False
    """Whether the texts are still growing: then everything after the prompt is response."""

    def __post_init__(self) -> None:
        if self.absolute.ndim != 2:
            raise ValueError(f"absolute: got {tuple(self.absolute.shape)}, expected [batch pos]")
        batch = len(self.absolute)
        for name in _ROW_FIELDS:
            if getattr(self, name).shape != (batch,):
                raise ValueError(
                    f"{name}: got shape {tuple(getattr(self, name).shape)}, expected [{batch}], "
                    "one value a row"
                )

    def repeat(self, copies: int) -> "TokensInFlight":
        """The rows of several models in one batch: all rows of the first, then of the second."""
        repeated = {name: getattr(self, name).repeat(copies) for name in _ROW_FIELDS}
        return dataclasses.replace(self, absolute=self.absolute.repeat(copies, 1), **repeated)

    def keep(self, places: Sequence[int] | Int[Tensor, " kept"]) -> "TokensInFlight":
        """Only some rows of the batch, by their places in it: the others have left."""
        chosen = torch.as_tensor(places, dtype=torch.int64).cpu()
        kept = {name: getattr(self, name)[chosen] for name in _ROW_FIELDS}
        absolute = self.absolute[chosen.to(self.absolute.device)]
        return dataclasses.replace(self, absolute=absolute, **kept)

    def at(self, absolute: Int[Tensor, "batch new"]) -> "TokensInFlight":
        """The same rows at other columns, as when a cache holds the ones before."""
        return dataclasses.replace(self, absolute=absolute)


_ROW_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(TokensInFlight)
    if field.name not in ("absolute", "open_ended")
)

_PUBLISHED: WeakKeyDictionary[HookedTransformer, list[TokensInFlight]] = WeakKeyDictionary()


@contextmanager
def publish_tokens(model: HookedTransformer, tokens: TokensInFlight) -> Iterator[None]:
    """Say which tokens the forward passes of a model hold while the context lasts."""
    absolute = tokens.absolute.to(model.embed.W_E.device)
    stack = _PUBLISHED.setdefault(model, [])
    stack.append(dataclasses.replace(tokens, absolute=absolute))
    try:
        yield
    finally:
        stack.pop()


def tokens_in_flight(model: HookedTransformer) -> TokensInFlight | None:
    """What was published last for a model, or None: nobody said."""
    stack = _PUBLISHED.get(model)
    return stack[-1] if stack else None


def count_positions(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Index of each token in its row's text, from a mask padded on either side; -1 at padding."""
    present = mask.bool()
    return torch.where(present, present.cumsum(dim=1) - 1, -1)


def frame_batch(batch: Batch, tokenized: Sequence[TokenizedChat]) -> TokensInFlight:
    """Frame whole chats, teacher-forced, in one padded batch.

    Args:
        batch: what `pad_batch` gave.
        tokenized: the whole run that the batch was made from.
    """
    chats = [tokenized[row] for row in batch.rows]
    responses = [chat.response or (-1, -1) for chat in chats]
    eots = [-1 if chat.response_eot is None else chat.response_eot for chat in chats]
    return TokensInFlight(
        absolute=count_positions(batch.mask),
        rows=torch.tensor(batch.rows),
        length=torch.tensor([len(chat.ids) for chat in chats]),
        prompt_end=torch.tensor([chat.prompt_end for chat in chats]),
        response_start=torch.tensor([first for first, _ in responses]),
        response_stop=torch.tensor([after for _, after in responses]),
        eot_stop=torch.tensor(eots),
        awaits=torch.tensor([chat.awaits_response or chat.response is not None for chat in chats]),
    )


def frame_prompts(
    mask: Int[Tensor, "batch pos"], *, rows: Sequence[int] | None = None
) -> TokensInFlight:
    """Frame padded prompts at the start of generation; what follows them is the response.

    A later step is `frame.at(lengths[:, None])`, one column at the index of the new token; rows
    that leave the batch are dropped by `frame.keep`.

    Args:
        mask: 1 at tokens of the prompts, 0 at padding.
        rows: index of each row in the whole run; by default the place in the batch.
    """
    length = mask.sum(dim=1).cpu()
    return TokensInFlight(
        absolute=count_positions(mask),
        rows=torch.arange(len(mask)) if rows is None else torch.tensor(list(rows)),
        length=length,
        prompt_end=length,
        response_start=length,
        response_stop=length,
        eot_stop=length,
        awaits=torch.ones(len(mask), dtype=torch.bool),
        open_ended=True,
    )


def select_positions(tokens: TokensInFlight, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """Return True at the columns that hold tokens which the positions name.

    The same tokens for any padding, and for any cut of a text into cached passes. Unlike
    `Positions.mask`, a row with nothing to select is no error: the pass may not have come to it.

    Raises:
        PositionsError: a row without the span, or a slice counted from the end of a text that is
            still growing.
    """
    bounds = [_bounds(tokens, place, positions) for place in range(len(tokens.absolute))]
    cut = [range(*pair)[positions.start : positions.stop] for pair in bounds]
    limits = torch.tensor([(part.start, part.stop) for part in cut], dtype=torch.int64)
    first, after = limits.to(tokens.absolute.device).reshape(-1, 2, 1).unbind(dim=1)
    chosen = (tokens.absolute >= first) & (tokens.absolute < after)
    return chosen & (tokens.absolute >= 0)


def _bounds(tokens: TokensInFlight, place: int, positions: Positions) -> tuple[int, int]:
    """The span's first token and the one after its last, in one row."""
    span, prompt_end = positions.span, int(tokens.prompt_end[place])
    if span == "prompt":
        return 0, prompt_end
    if span == "last_prompt":
        if not tokens.awaits[place]:
            raise PositionsError(_missing(tokens, place, positions, "place for a response"))
        return max(prompt_end - 1, 0), prompt_end
    if tokens.open_ended:
        if (positions.start or 0) < 0 or (positions.stop or 0) < 0:
            raise PositionsError(
                f"positions: {positions} counts from the end of a text that is still being "
                "generated; count from the start"
            )
        return (0 if span == "all" else int(tokens.response_start[place])), _ENDLESS
    if span == "all":
        return 0, int(tokens.length[place])
    start = int(tokens.response_start[place])
    after = int((tokens.response_stop if span == "response" else tokens.eot_stop)[place])
    if start < 0 or after < 0:
        what = "response" if start < 0 else "end-of-turn token after the response"
        raise PositionsError(_missing(tokens, place, positions, what))
    return start, after


def _missing(tokens: TokensInFlight, place: int, positions: Positions, what: str) -> str:
    return f"positions: row {int(tokens.rows[place])} has no {what}, and {positions} needs one"
