"""Captured activations in random order, from disk through a buffer; for training codecs on them.

Shards are drawn in random order, as many at once as the buffer holds, and their rows are mixed. Not
for statistics, which do not depend on the order (`stream_activations`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.activations.capture import ActivationShards
from emlens.sites import Site, parse_site

_READ_ROWS = 8192
"""Rows yielded at a time."""


@dataclass(frozen=True, kw_only=True)
class ShuffledActivations:
    """Rows of captured activations, each once a pass, in an order that the seed decides.

    Iterating gives one pass, `rows_from` any number of them from any row on. In memory are the rows
    of one buffer and no others.

    Raises:
        ValueError: no shard, a buffer without rows, or streams that were not captured.
        SiteError: a site that was not captured.
    """

    shards: ActivationShards
    """What was captured."""
    site: Site
    """Which of its sites."""
    seed: int
    """Of the order, and of what `split` holds out."""
    streams: tuple[str, ...] = ()
    """Which models; by default all that were captured."""
    paired: bool = False
    """Whether the models' activations of a token come together, [models n d]; otherwise those of
    all models are rows [n d] among one another."""
    buffer_rows: int = 2**17
    """Tokens mixed with one another; a shard that is larger comes alone. 2^17 of width 576 are
    150 MB in bfloat16, a model."""
    base_fingerprint: str | None = None
    """Of the weights of the model, or of the base of a pair: `identify(model).base_fingerprint`."""
    chosen: tuple[int, ...] | None = None
    """Numbers of the shards; None for all."""
    device: str = "cpu"
    """Where the rows are handed out, such as `cuda`; the buffer stays on the processor."""

    def __post_init__(self) -> None:
        if self.buffer_rows < 1:
            raise ValueError(f"buffer_rows: got {self.buffer_rows}, expected at least 1")
        if self.chosen is not None and not self.chosen:
            raise ValueError("chosen: got no shard, expected at least one")
        for stream in self._streams:
            self.shards.batches(self.site, stream=stream)  # names what was not captured

    @property
    def positions(self) -> str:
        """Which tokens were captured."""
        return str(self.shards.plan["positions"])

    @property
    def n_rows(self) -> int:
        """Rows of one pass."""
        return self._tokens * (1 if self.paired else len(self._streams))

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides which rows come in which order."""
        plan = {
            "capture": self.shards.plan,
            "order": [str(self.site), self.seed, self.buffer_rows, self.paired],
            "rows": [self._streams, self._shards],
        }
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:32]

    def split(self, held_out: float) -> tuple["ShuffledActivations", "ShuffledActivations"]:
        """The rows in two parts, whole texts apart: the larger, and about a share of all rows.

        A text lies in one shard with all its tokens, so that shards are held out.

        Args:
            held_out: share, between 0 and 1.

        Raises:
            ValueError: a share that leaves one part without a shard.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: got {held_out}, expected a share between 0 and 1")
        order = self._shuffled(-1)
        wanted, found = held_out * self._tokens, 0
        kept: list[int] = []
        while order and found < wanted:
            kept.append(order.pop())
            found += self._rows_of(kept[-1])
        if not order:
            raise ValueError(
                f"held_out: a share of {held_out} of {len(kept)} shards leaves none to train on; "
                "capture with fewer tokens a batch, so that there are more"
            )
        parts = (tuple(sorted(part)) for part in (order, kept))
        train, held = (dataclasses.replace(self, chosen=part) for part in parts)
        return train, held

    def __iter__(self) -> Iterator[Float[Tensor, "... n d"]]:
        """Yield the rows of the first pass, some thousand at a time."""
        return self._pass(0, 0)

    def rows_from(self, row: int) -> Iterator[Float[Tensor, "... n d"]]:
        """Yield all rows from one on, pass after pass without an end.

        Each pass has an order of its own. Row `n_rows` is the first of the second pass. Buffers
        before the row are not read.
        """
        first, skip = divmod(row, self.n_rows)
        for number in count(first):
            yield from self._pass(number, skip if number == first else 0)

    def _pass(self, number: int, skip: int) -> Iterator[Tensor]:
        """The rows of a pass but the first ones."""
        for place, group in enumerate(self._groups(number)):
            rows = self._count(group)
            if skip < rows:
                yield from self._buffer(group, number, place, skip)
            skip = max(0, skip - rows)

    def _buffer(self, group: list[int], number: int, place: int, skip: int) -> Iterator[Tensor]:
        """The rows of some shards in random order but the first ones."""
        held = torch.stack([self._read(group, stream) for stream in self._streams])
        rows = held if self.paired else held.flatten(0, 1)
        order = torch.randperm(rows.shape[-2], generator=self._generator(number, place))
        for chosen in order[skip:].split(_READ_ROWS):
            yield rows.index_select(-2, chosen).to(self.device)

    def _read(self, group: list[int], stream: str) -> Tensor:
        shards = self.shards
        return torch.cat([shards.read_shard(k, self.site, stream=stream) for k in group])

    def _groups(self, number: int) -> Iterator[list[int]]:
        """The shards of a pass, as many together as the buffer holds."""
        group: list[int] = []
        tokens = 0
        for shard in self._shuffled(number):
            size = self._rows_of(shard)
            if group and tokens + size > self.buffer_rows:
                yield group
                group, tokens = [], 0
            group.append(shard)
            tokens += size
        yield group

    def _shuffled(self, number: int) -> list[int]:
        """The shards in the order of a pass."""
        order = torch.randperm(len(self._shards), generator=self._generator(number, -1))
        return [self._shards[place] for place in order.tolist()]

    def _generator(self, number: int, place: int) -> torch.Generator:
        """A random stream for one buffer of one pass, whichever were read before it."""
        key = hashlib.sha256(f"{self.seed} {number} {place}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)

    def _count(self, group: list[int]) -> int:
        tokens = sum(self._rows_of(shard) for shard in group)
        return tokens * (1 if self.paired else len(self._streams))

    def _rows_of(self, shard: int) -> int:
        return self.shards.plan["shard_rows"][shard]

    @cached_property
    def _tokens(self) -> int:
        return sum(self._rows_of(shard) for shard in self._shards)

    @property
    def _streams(self) -> tuple[str, ...]:
        return self.streams or self.shards.streams

    @property
    def _shards(self) -> tuple[int, ...]:
        return tuple(range(self.shards.n_shards)) if self.chosen is None else self.chosen


def shuffle_activations(
    shards: ActivationShards,
    *,
    site: str | Site,
    seed: int,
    paired: bool = False,
    base_fingerprint: str | None = None,
    device: str = "cpu",
) -> ShuffledActivations:
    """Captured activations of one site in random order; see `ShuffledActivations`.

    For one stream of a pair, other buffers or some shards: `dataclasses.replace`.
    """
    return ShuffledActivations(
        shards=shards,
        site=parse_site(site) if isinstance(site, str) else site,
        seed=seed,
        paired=paired,
        base_fingerprint=base_fingerprint,
        device=device,
    )
