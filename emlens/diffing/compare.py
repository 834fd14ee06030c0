"""A base and its fine-tune compared in one pass over chats: activations and predictions.

The band that chance would give is the same comparison with random adapters: ``null_band``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.activations.reading import PositionsLike, ReadingPlan, SitesLike, plan_reading
from emlens.data import Batch, Batching, Chat, position_mask
from emlens.diffing.activations import SiteDifferences, summarise_changes
from emlens.diffing.logits import LogitDifferences, PredictionRows
from emlens.diffing.results import ActivationDiff, LogitDiff, ModelDiff
from emlens.models.pair import ModelPair
from emlens.models.paired import PairedForward, Tuned, forward_many, tuned_parts
from emlens.models.tokens_in_flight import frame_batch, publish_tokens
from emlens.models.unembed import log_probabilities
from emlens.models.views import origin_of
from emlens.numerics.blocks import slice_rows
from emlens.sites import Site

TASK = "comparing (tokens)"
COPIES = 4
"""Tensors of a slice's logits alive at once: two log-probabilities and their exponentials."""
SHOWN_TEXT = 120
"""Characters of a prompt kept in its row."""


def compare_models(
    pair: ModelPair,
    chats: Sequence[Chat | str],
    *,
    sites: SitesLike = "resid_post",
    positions: PositionsLike = "response",
    examples: int = 20,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> ModelDiff:
    """Compare a base and its fine-tune on the same chats, inside and at the output, in one pass.

    Args:
        pair: the two models.
        chats: prompts (str) or chats; both models read the same tokens.
        sites: where activations are compared; all must have one width.
        positions: which tokens; several names give several columns, and predictions are compared
            on the first of them. A token's prediction is made one position before it.
        examples: how many chats, from the first, are kept token by token.
        batching: tokens run at once, all models counted.

    Raises:
        ValueError: no tokenizer, sites of different widths, positions that a chat does not have.
    """
    parts = tuned_parts(pair)
    work = plan_reading(pair, chats, sites=sites, positions=positions, batching=batching)
    cells = make_accumulators(work, n_tuned=1)
    logits = LogitDifferences(pair.base.cfg.d_vocab, len(work.chats))
    last: PairedForward | None = None
    for batch in work.pad(TASK):
        last = run_batch(pair, parts, work, batch, cells)
        _count_predictions(pair, work, batch, last.resid, logits, examples)
    assert last is not None
    return ModelDiff(
        base=pair.base_name,
        base_fingerprint=origin_of(pair.base).fingerprint,
        tuned=pair.tuned_name,
        tuned_fingerprint=(
            pair.adapter.fingerprint if pair.adapter else origin_of(pair.tuned).fingerprint
        ),
        n_chats=len(work.chats),
        method=last.method,
        shared_layers=last.shared_layers,
        activations=summarise_changes(
            cells,
            sites=[str(site) for site in work.sites],
            positions=[str(p) for p in work.positions],
        ),
        logits=_finish_logits(pair, work, logits, examples),
    )


def compare_activations(
    pair: ModelPair,
    chats: Sequence[Chat | str],
    *,
    sites: SitesLike = "resid_post",
    positions: PositionsLike = "response",
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> ActivationDiff:
    """Compare activations only; arguments and errors as for ``compare_models``."""
    parts = tuned_parts(pair)
    work = plan_reading(pair, chats, sites=sites, positions=positions, batching=batching)
    cells = make_accumulators(work, n_tuned=1)
    for batch in work.pad(TASK):
        run_batch(pair, parts, work, batch, cells)
    return summarise_changes(
        cells,
        sites=[str(site) for site in work.sites],
        positions=[str(p) for p in work.positions],
    )


def compare_logits(
    pair: ModelPair,
    chats: Sequence[Chat | str],
    *,
    positions: str = "response",
    examples: int = 20,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> LogitDiff:
    """Compare predictions only; arguments and errors as for ``compare_models``."""
    parts = tuned_parts(pair)
    work = plan_reading(pair, chats, sites="resid_post.0", positions=positions, batching=batching)
    logits = LogitDifferences(pair.base.cfg.d_vocab, len(work.chats))
    for batch in work.pad(TASK):
        with publish_tokens(pair.base, frame_batch(batch, work.tokenized)):
            done = forward_many(
                pair.base, parts, batch.ids, batch.mask, sites=(), visit=lambda site, x: None
            )
        _count_predictions(pair, work, batch, done.resid, logits, examples)
    return _finish_logits(pair, work, logits, examples)


def make_accumulators(work: ReadingPlan, *, n_tuned: int) -> list[list[SiteDifferences]]:
    """Make one accumulator for each site and positions.

    Raises:
        ValueError: sites of several widths.
    """
    width = work.common_width
    return [[SiteDifferences(width, n_tuned) for _ in work.positions] for _ in work.sites]


def run_batch(
    pair: ModelPair,
    parts: Sequence[Tuned],
    work: ReadingPlan,
    batch: Batch,
    cells: Sequence[Sequence[SiteDifferences]],
) -> PairedForward:
    """Run one batch through base and fine-tunes, counting activations on the way."""
    device = pair.base.W_E.device
    masks = [position_mask(batch, work.tokenized, p) for p in work.positions]
    places = [None if mask.all() else mask.flatten().nonzero()[:, 0].to(device) for mask in masks]
    rows = dict(zip(work.sites, cells, strict=True))

    def count(site: Site, x: Tensor) -> None:
        for cell, index in zip(rows[site], places, strict=True):
            cell.update(x, index)

    with publish_tokens(pair.base, frame_batch(batch, work.tokenized)):
        return forward_many(pair.base, parts, batch.ids, batch.mask, sites=work.sites, visit=count)


def _count_predictions(
    pair: ModelPair,
    work: ReadingPlan,
    batch: Batch,
    resid: Float[Tensor, "models batch pos d_model"],
    logits: LogitDifferences,
    examples: int,
) -> None:
    """Compare the predictions of a batch's counted tokens, and of all tokens of examples."""
    counted = position_mask(batch, work.tokenized, work.positions[0])
    shown = torch.tensor([row < examples for row in batch.rows])[:, None] & batch.mask.bool()
    # The prediction of the token in column t is made in column t - 1.
    has_before = batch.mask[:, :-1].bool()
    wanted = (counted | shown)[:, 1:] & has_before
    place, column = wanted.nonzero(as_tuple=True)
    starts = (batch.mask.cumsum(1) == 0).sum(1)
    rows = PredictionRows(
        chat=torch.tensor(batch.rows)[place],
        token=column + 1 - starts[place],
        counted=counted[:, 1:][wanted],
        shown=shown[:, 1:][wanted],
    )
    chosen = resid[:, :, :-1][:, wanted.to(resid.device)]
    models = (pair.base, pair.tuned)
    for part in slice_rows(chosen.shape[1], pair.base.cfg.d_vocab, copies=COPIES):
        # Nothing holds on to a slice while the next is made: two of six copies at the peak.
        logits.update(
            *(log_probabilities(model, x[part]) for model, x in zip(models, chosen, strict=True)),
            rows=_cut(rows, part),
        )


def _cut(rows: PredictionRows, part: slice) -> PredictionRows:
    return PredictionRows(
        chat=rows.chat[part],
        token=rows.token[part],
        counted=rows.counted[part],
        shown=rows.shown[part],
    )


def _finish_logits(
    pair: ModelPair, work: ReadingPlan, logits: LogitDifferences, examples: int
) -> LogitDiff:
    def decode(token: int) -> str:
        return pair.tokenizer.decode([token])

    names = [_name(chat, i) for i, chat in enumerate(work.chats)]
    shown = [
        logits.example(
            index,
            name=names[index][0],
            pieces=chat.pieces,
            counted=work.positions[0].mask(chat).tolist(),
            decode=decode,
        )
        for index, chat in enumerate(work.tokenized[:examples])
    ]
    return logits.result(
        positions=str(work.positions[0]), names=names, examples=shown, decode=decode
    )


def _name(chat: Chat, index: int) -> tuple[str, str]:
    users = [m.content for m in chat.messages if m.role == "user"]
    text = users[-1] if users else chat.messages[-1].content
    return chat.id or str(index), text[:SHOWN_TEXT]
