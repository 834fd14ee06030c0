"""What is read of which chats: tokenised once, every position checked, batches planned.

Nothing is run here but through `read`, one batch at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.data import (
    Batch,
    Batching,
    Chat,
    Positions,
    TokenizedChats,
    as_chats,
    pad_batch,
    parse_positions,
    plan_batches,
    position_mask,
    track,
)
from emlens.models.reading import Readable, base_of, count_models, read_sites
from emlens.models.tokenizer_needs import require_tokenizer
from emlens.models.tokens_in_flight import frame_batch
from emlens.models.views import origin_of
from emlens.sites import Site, check_sites, expand_sites

SitesLike = str | Site | Sequence[str | Site]
PositionsLike = str | Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The tokens of one batch that one of the positions selects."""

    index: Int[Tensor, " n"]
    """Place of each in the batch, rows laid end to end; on the model's device."""
    rows: Int[Tensor, " n"]
    """Chat of each, as an index in the run; on the CPU."""
    tokens: Int[Tensor, " n"]
    """Index of each in its chat's unpadded ids; on the CPU."""
    covers_batch: bool
    """Whether that is every column of the batch."""

    def take(self, x: Float[Tensor, "models batch pos ..."]) -> Float[Tensor, "models n d"]:
        """The activations of the selected tokens, heads laid end to end."""
        flat = x.flatten(1, 2)
        chosen = flat if self.covers_batch else flat.index_select(1, self.index)
        return chosen.flatten(2)


Visitor = Callable[[Site, Float[Tensor, "models batch pos ..."], tuple[Selection, ...]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadingPlan:
    """One pass over chats, at some sites and positions."""

    model: Readable
    chats: tuple[Chat, ...]
    tokenized: TokenizedChats
    sites: tuple[Site, ...]
    """In the order asked for."""
    positions: tuple[Positions, ...]
    batches: tuple[tuple[int, ...], ...]
    """Rows of each batch, longest first."""
    batching: Batching
    pad_id: int

    def width(self, site: Site) -> int:
        """Values of one token at a site."""
        return site.width(base_of(self.model).cfg)

    @property
    def common_width(self) -> int:
        """Width of all sites.

        Raises:
            ValueError: they are not of one width.
        """
        widths = {self.width(site) for site in self.sites}
        if len(widths) > 1:
            raise ValueError(f"sites: widths {sorted(widths)} in one result; ask for them apart")
        return widths.pop()

    def count_tokens(self, position: Positions, rows: Sequence[int]) -> int:
        """Tokens that positions select in some of the chats."""
        return sum(int(position.mask(self.tokenized[row]).sum()) for row in rows)

    def pad(self, task: str, *, chosen: Iterable[int] | None = None) -> Iterator[Batch]:
        """Yield the planned batches, longest rows first, telling progress under a task's name.

        Args:
            task: name of the work, for progress.
            chosen: numbers of the batches; by default all.
        """
        todo = self.batches if chosen is None else [self.batches[number] for number in chosen]
        sizes = [sum(self.tokenized.lengths[row] for row in rows) for rows in todo]
        for rows in track(todo, task, sizes=sizes):
            yield pad_batch(self.tokenized, rows, pad_id=self.pad_id)

    def read(
        self, visit: Visitor, task: str, *, chosen: Iterable[int] | None = None
    ) -> Iterator[tuple[Selection, ...]]:
        """Run the batches in turn; yields the selections of each after all its sites were visited.

        Args:
            visit: called once a site and batch with the activations of all models, base first, and
                one selection for each of the positions; must not keep or change the tensor.
            task: name of the work, for progress.
            chosen: numbers of the batches to run; by default all.
        """
        for batch in self.pad(task, chosen=chosen):
            tokens = frame_batch(batch, self.tokenized)
            masks = [position_mask(batch, self.tokenized, p) for p in self.positions]
            device = base_of(self.model).embed.W_E.device
            found = tuple(_select(mask, tokens.rows, tokens.absolute, device) for mask in masks)
            read_sites(
                self.model,
                batch,
                tokens,
                sites=self.sites,
                visit=lambda site, x, found=found: visit(site, x, found),
            )
            yield found


def _select(mask: Tensor, rows: Tensor, absolute: Tensor, device: torch.device) -> Selection:
    place, _ = mask.nonzero(as_tuple=True)
    index = mask.flatten().nonzero()[:, 0]
    return Selection(
        index=index.to(device),
        rows=rows[place],
        tokens=absolute[mask],
        covers_batch=bool(mask.all()),
    )


def require_one(positions: PositionsLike) -> str:
    """Return the one name of positions, where a result holds no more.

    Raises:
        ValueError: several names, or none.
    """
    if not isinstance(positions, str):
        raise ValueError(
            f"positions: got {list(positions)}, expected one name, such as 'response': one result "
            "holds the tokens of one; call once for each"
        )
    return positions


def plan_reading(
    model: Readable,
    chats: Sequence[Chat | str],
    *,
    sites: SitesLike,
    positions: PositionsLike,
    batching: Batching,
    copies: int | None = None,
) -> ReadingPlan:
    """Tokenise chats and plan batches; whatever cannot be read is named before anything runs.

    Args:
        model: one model or a pair.
        chats: prompts (str) or chats; a chat without a response is framed up to where one begins.
        sites: where; a bare stream is every layer.
        positions: which tokens, one name or several.
        batching: tokens run at once, all models counted.
        copies: how many models run at once; by default one, or the two of a pair.

    Raises:
        ValueError: no tokenizer, a site the model lacks, positions that a chat does not have, or a
            chat that is too long.
    """
    base = base_of(model)
    tokenizer: Any = require_tokenizer(base.tokenizer, origin_of(base).name)
    chosen = expand_sites(sites, base.cfg)
    check_sites(chosen, base.hook_dict)
    for site in chosen:
        _check_positional(site)
    names = [positions] if isinstance(positions, str) else list(positions)
    if not names:
        raise ValueError("positions: got an empty list; expected at least one, such as 'response'")
    parsed = tuple(parse_positions(name) for name in names)
    given = as_chats(chats)
    tokenized = TokenizedChats(
        given, tokenizer, check=lambda chat: [position.mask(chat) for position in parsed]
    )  # a span that is missing fails before anything is run
    budget = Batching(
        max(1, batching.tokens // (copies or count_models(model))), batching.max_length
    )
    pad = tokenizer.pad_token_id
    return ReadingPlan(
        model=model,
        chats=given,
        tokenized=tokenized,
        sites=chosen,
        positions=parsed,
        batches=plan_batches(tokenized.lengths, budget, n_ctx=base.cfg.n_ctx),
        batching=batching,
        pad_id=0 if pad is None else pad,
    )


def _check_positional(site: Site) -> None:
    if not site.is_positional:
        raise ValueError(
            f"sites: {site} has axes {site.axes}, not one vector for each token, so that positions "
            "cannot select from it"
        )
