"""Rows that begin alike: which they are, and how hooks are told of the one that stands for them.

Not for rows that hooks treat differently by their place in the batch.
"""

import dataclasses
from collections.abc import Sequence

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
