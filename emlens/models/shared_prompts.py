"""Rows that begin alike: which they are, how they are padded, and what hooks are told of them.

Not for rows that hooks treat differently by their place in the batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from emlens.models.tokens_in_flight import TokensInFlight

NO_ROW = 1 << 40
"""Stands for the index of a row in the run: past every run, so that looking it up is refused."""


def find_equal(texts: Sequence[Int[Tensor, " _"]]) -> tuple[list[int], list[int]]:
    """Return the first of each kind of equal texts, and for each text the number of its kind."""
    kinds: dict[bytes, int] = {}
    first: list[int] = []
    kind_of = []
    for place, text in enumerate(texts):
        key = text.cpu().numpy().tobytes()
        if key not in kinds:
            kinds[key] = len(first)
            first.append(place)
        kind_of.append(kinds[key])
    return first, kind_of


def frame_shared(frame: TokensInFlight, first: Sequence[int]) -> TokensInFlight:
    """Frame prompts that stand for several rows: they are no row's own, and their texts go on.

    Args:
        frame: of all rows.
        first: places of the rows that are run.
    """
    kept = frame.keep(list(first))
    rows = torch.full_like(kept.rows, NO_ROW)
    return dataclasses.replace(kept, rows=rows, open_ended=True)


def pad_texts(
    texts: Sequence[Int[Tensor, " _"]], *, side: Literal["left", "right"]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Ids and mask (1 at tokens) of texts in one batch; padding has the id 0, which is not seen.

    Args:
        texts: token ids of each row.
        side: where the padding goes; left for prompts that are gone on from.
    """
    width = max(1, *(len(text) for text in texts))
    ids = torch.zeros((len(texts), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, text in enumerate(texts):
        real = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[place, real] = text
        mask[place, real] = 1
    return ids, mask
