"""Batches planned from the whole run: sorted by length, within a token budget, padded and masked.

Do not use it to cut long texts short: a row that does not fit is an error, never truncated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emlens.data.chat import TokenizedChat
from emlens.data.positions import Positions, PositionsError


class BatchError(ValueError):
    """Rows that cannot be batched: none at all, an empty one, or one that is too long."""


@dataclass(frozen=True)
class Batching:
    """How much is run through a model at once.

    Raises:
        BatchError: a size below 1.
    """

    tokens: int = 16384
    """Budget of a batch: rows times the longest row, padding included."""
    max_length: int = 2048
    """Longest row allowed, in tokens."""

    def __post_init__(self) -> None:
        for name, size in (("tokens", self.tokens), ("max_length", self.max_length)):
            if size < 1:
                raise BatchError(f"{name}: got {size}, expected at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of a run, padded to one length."""

    rows: tuple[int, ...]
    """Index in the run of each row of the batch."""
    ids: Int[Tensor, "batch pos"]
    """Token ids, padded."""
    mask: Int[Tensor, "batch pos"]
    """1 at real tokens, 0 at padding, whatever their ids are."""


def plan_batches(
    lengths: Sequence[int], batching: Batching, *, n_ctx: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Split the rows of a run into batches, longest rows first.

    Each batch is as large as rows x longest row <= `batching.tokens` allows, and at least one row.
    Rows of equal length keep their order, so that the plan depends on the lengths alone. The
    longest rows come first, so that a run that does not fit in memory fails at once.

    Args:
        lengths: tokens of each row.
        batching: budget and longest row allowed.
        n_ctx: context length of the model, where it has a limit.

    Raises:
        BatchError: no rows, an empty row, or a row longer than `max_length` or `n_ctx`.
    """
    _check_lengths(lengths, batching.max_length, n_ctx)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches: list[tuple[int, ...]] = []
    while order:
        size = max(1, batching.tokens // lengths[order[0]])
        batches.append(tuple(order[:size]))
        order = order[size:]
    return tuple(batches)


def pad_batch(
    chats: Sequence[TokenizedChat],
    rows: Sequence[int],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "left",
) -> Batch:
    """Put rows of a run into one padded batch.

    Args:
        chats: the whole run.
        rows: which of them, as `plan_batches` gives them.
        pad_id: id to pad with; any id will do, because the mask is explicit.
        side: where the padding goes.

    Raises:
        BatchError: no rows, a negative pad id, or an unknown side.
    """
    if not rows:
        raise BatchError("rows: got none, expected at least one")
    if pad_id < 0:
        raise BatchError(f"pad_id: got {pad_id}, expected an id of the vocabulary")
    if side not in ("left", "right"):
        raise BatchError(f"side: got {side!r}, expected 'left' or 'right'")
    width = max(len(chats[row].ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for place, row in enumerate(rows):
        length = len(chats[row].ids)
        real = slice(width - length, width) if side == "left" else slice(0, length)
        ids[place, real] = chats[row].ids
        mask[place, real] = 1
    return Batch(rows=tuple(rows), ids=ids, mask=mask)


def position_mask(
    batch: Batch, chats: Sequence[TokenizedChat], positions: Positions
) -> Bool[Tensor, "batch pos"]:
    """Return True at the tokens of a padded batch that the positions select.

    Args:
        batch: what `pad_batch` gave.
        chats: the whole run that the batch was made from.
        positions: which tokens of each chat.

    Raises:
        PositionsError: a chat has no such span or no such token; the row is named. What
            `Positions.mask` raises is kept, `EmptySelectionError` for an empty selection.
    """
    chosen = torch.zeros_like(batch.mask, dtype=torch.bool)
    for place, row in enumerate(batch.rows):
        try:
            chosen[place, batch.mask[place].bool()] = positions.mask(chats[row])
        except PositionsError as error:
            raise type(error)(f"row {row}: {error}") from error
    return chosen


def _check_lengths(lengths: Sequence[int], max_length: int, n_ctx: int | None) -> None:
    if not lengths:
        raise BatchError("lengths: got no rows, expected at least one")
    limit, name = max_length, "max_length"
    if n_ctx is not None and n_ctx < max_length:
        limit, name = n_ctx, "the model's context n_ctx"
    for row, length in enumerate(lengths):
        if length < 1:
            raise BatchError(f"row {row} has {length} tokens, expected at least 1")
        if length > limit:
            raise BatchError(
                f"row {row} has {length} tokens, more than {name} = {limit}; shorten it"
                + (" or raise Batching(max_length=...)" if name == "max_length" else "")
            )
