"""Teacher-forced log-probabilities of given responses; prompts that they share are run once.

For responses that exist already; what a model would say itself is a question for generation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.data import Batch, Batching, PositionsError, TokenizedChat, plan_batches, track
from emlens.models.kv_cache import KeyValueCache, run_cached
from emlens.models.shared_prompts import find_equal, frame_shared, pad_texts
from emlens.models.tokens_in_flight import frame_batch, publish_tokens
from emlens.models.unembed import compute_logits
from emlens.numerics.blocks import slice_rows, split_blocks
from emlens.numerics.validation import WidthError

KEPT = 0.8
"""Responses run together are at least this part of the longest of them."""
FEWEST_TOGETHER = 8
"""Fewer rows than this are not worth a pass of their own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseScore:
    """What a model makes of one response."""

    log_probs: Float[Tensor, " tokens"]
    """log p(token | everything before it) of each response token, in nats; float32 at least."""

    @property
    def total(self) -> float:
        """Sum over the response's tokens, in nats, added up in float64; 0 of an empty response."""
        return float(self.log_probs.double().sum())

    @property
    def mean(self) -> float:
        """Nats a token; NaN of an empty response."""
        return self.total / len(self.log_probs) if len(self.log_probs) else math.nan


@dataclass(frozen=True)
class _Part:
    """Rows that are run together; where they share prompts, those are run once, before them."""

    rows: tuple[int, ...]
    shared: bool
    tokens: int


def score_responses(
    model: HookedTransformer,
    chats: Sequence[TokenizedChat],
    *,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> list[ResponseScore]:
    """Score the response of every chat, as `log softmax(logits)[token]` at the token before it.

    Chats with equal prompts are run together, the prompt once, through the key-value cache. End-of-
    turn tokens are not part of a response.

    Args:
        model: a model loaded by emlens, with or without adapter and interventions.
        chats: each with an assistant turn, in any order.
        batching: rows times positions of one batch, padding included, and the longest row.

    Returns:
        One score a chat, in the order of the chats; tensors on the CPU.

    Raises:
        ValueError: a chat without a response, or with one that no token comes before.
        BatchError: no chats, or one too long for the batching or the model.
    """
    for row, chat in enumerate(chats):
        check_response(row, chat)
    found: dict[int, Tensor] = {}
    parts = _plan_parts(chats, batching, model.cfg.n_ctx)
    for part in track(parts, "scoring (tokens)", sizes=[part.tokens for part in parts]):
        found |= _run_part(model, chats, part)
    return [ResponseScore(log_probs=found[row]) for row in range(len(chats))]


def count_read(chat: TokenizedChat) -> int:
    """Tokens that are read to score a chat's response: all before its last one."""
    return max(_span(chat)[1] - 1, 1)


def check_response(row: int, chat: TokenizedChat) -> None:
    """Refuse a chat that has nothing to score.

    Args:
        row: its place in the run, for the message.
        chat: the chat.

    Raises:
        ValueError: no response, or one that no token comes before.
    """
    named = f"chats: row {row}" + ("" if chat.id is None else f" (id {chat.id!r})")
    if chat.response is None:
        raise ValueError(f"{named} has no response to score; expected a final assistant turn")
    if chat.response[0] == 0:
        raise ValueError(
            f"{named} begins with its response: nothing predicts the first token; give it a prompt "
            "or a tokenizer with a beginning-of-text token"
        )


def _span(chat: TokenizedChat) -> tuple[int, int]:
    assert chat.response is not None
    return chat.response


def _prefix(chat: TokenizedChat) -> Int[Tensor, " prefix"]:
    """All of the prompt but its last token, whose own prediction is the first one scored."""
    return chat.ids[: _span(chat)[0] - 1]


def _suffix(chat: TokenizedChat) -> Int[Tensor, " suffix"]:
    """The tokens whose predictions are scored: shifted by one, as long as the response."""
    start, stop = _span(chat)
    return chat.ids[start - 1 : stop - 1]


def _plan_parts(chats: Sequence[TokenizedChat], batching: Batching, n_ctx: int) -> list[_Part]:
    """Rows with prompts of their own in one pass; the others by prompt, in as few as fit."""
    lengths = [count_read(chat) for chat in chats]
    plan_batches(lengths, batching, n_ctx=n_ctx)  # refuses what cannot be run, by its row
    first, kind = find_equal([_prefix(chat) for chat in chats])
    groups: list[list[int]] = [[] for _ in first]
    for row, number in enumerate(kind):
        groups[number].append(row)
    shared = [rows for rows in groups if len(rows) > 1 and len(_prefix(chats[rows[0]]))]
    together = {row for rows in shared for row in rows}
    alone = [row for row in range(len(chats)) if row not in together]
    parts = [
        _Part(tuple(rows), shared=True, tokens=_tokens(chats, rows))
        for rows in _pack_groups(chats, shared, batching.tokens, min(n_ctx, batching.max_length))
    ]
    if alone:
        for batch in plan_batches([lengths[row] for row in alone], batching, n_ctx=n_ctx):
            rows = tuple(alone[place] for place in batch)
            parts.append(_Part(rows, shared=False, tokens=_tokens(chats, rows)))
    return parts


def _tokens(chats: Sequence[TokenizedChat], rows: Sequence[int]) -> int:
    return sum(_span(chats[row])[1] for row in rows)


def _pack_groups(
    chats: Sequence[TokenizedChat], groups: Sequence[Sequence[int]], tokens: int, limit: int
) -> Iterator[list[int]]:
    """Fill batches with whole groups, longest responses first; cut a group only if it must be."""
    ordered = [sorted(rows, key=lambda row: -len(_suffix(chats[row]))) for rows in groups]
    ordered.sort(key=lambda rows: -len(_suffix(chats[rows[0]])))
    batch: list[int] = []
    for rows in ordered:
        if batch and not _fits(chats, [*batch, *rows], tokens, limit):
            yield batch
            batch = []
        batch = [*batch, *rows]
        while not _fits(chats, batch, tokens, limit) and len(batch) > 1:
            size = max(1, tokens // _width(chats, batch))
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def _fits(chats: Sequence[TokenizedChat], rows: Sequence[int], tokens: int, limit: int) -> bool:
    width = _width(chats, rows)
    return width * len(rows) <= tokens and width <= limit


def _width(chats: Sequence[TokenizedChat], rows: Sequence[int]) -> int:
    prefix = max(len(_prefix(chats[row])) for row in rows)
    return prefix + max(len(_suffix(chats[row])) for row in rows)


@torch.no_grad()
def _run_part(
    model: HookedTransformer, chats: Sequence[TokenizedChat], part: _Part
) -> dict[int, Tensor]:
    if not part.shared:
        return _run_whole(model, chats, part.rows)
    try:
        return _run_shared(model, chats, part.rows)
    except (PositionsError, WidthError):
        # A hook tells the rows apart, by where they end or by their number: share nothing.
        return _run_whole(model, chats, part.rows)


def _run_whole(
    model: HookedTransformer, chats: Sequence[TokenizedChat], rows: Sequence[int]
) -> dict[int, Tensor]:
    """Score rows in one pass, prompt and response together."""
    texts = [chats[row].ids[: _span(chats[row])[1] - 1] for row in rows]
    ids, mask = pad_texts(texts, side="right")
    with publish_tokens(model, frame_batch(Batch(rows=tuple(rows), ids=ids, mask=mask), chats)):
        resid = run_cached(model, ids.to(model.W_E.device), None)
    return _score(model, resid, chats, rows, [len(_prefix(chats[row])) for row in rows])


def _run_shared(
    model: HookedTransformer, chats: Sequence[TokenizedChat], rows: Sequence[int]
) -> dict[int, Tensor]:
    """Run each prompt once, then the responses on copies of what it left in the cache."""
    device = model.W_E.device
    first, kind = find_equal([_prefix(chats[row]) for row in rows])
    ids, mask = pad_texts([_prefix(chats[row]) for row in rows], side="left")
    prompts = frame_shared(frame_batch(Batch(rows=tuple(rows), ids=ids, mask=mask), chats), first)
    cache = KeyValueCache(model, batch=len(first), capacity=ids.shape[1])
    with publish_tokens(model, prompts):
        run_cached(model, ids[first].to(device), cache, mask=mask[first].to(device))
    found: dict[int, Tensor] = {}
    for places in _cut_by_length([len(_suffix(chats[row])) for row in rows]):
        chosen = [rows[place] for place in places]
        suffixes, real = pad_texts([_suffix(chats[row]) for row in chosen], side="right")
        starts = torch.tensor([kind[place] for place in places], device=device)
        own = cache.spread(model, starts, capacity=ids.shape[1] + suffixes.shape[1])
        begins = torch.tensor([[len(_prefix(chats[row]))] for row in chosen])
        absolute = torch.where(real.bool(), begins + torch.arange(suffixes.shape[1]), -1)
        responses = frame_batch(Batch(rows=tuple(chosen), ids=suffixes, mask=real), chats)
        with publish_tokens(model, responses.at(absolute)):
            resid = run_cached(model, suffixes.to(device), own)
        found |= _score(model, resid, chats, chosen, [0] * len(chosen))
    return found


def _cut_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Places of rows, longest first, cut where padding to the longest would waste a fifth."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    cuts: list[list[int]] = []
    for place in order:
        if cuts and (
            lengths[place] >= KEPT * lengths[cuts[-1][0]] or len(cuts[-1]) < FEWEST_TOGETHER
        ):
            cuts[-1].append(place)
        else:
            cuts.append([place])
    return cuts


def _score(
    model: HookedTransformer,
    resid: Float[Tensor, "batch pos d_model"],
    chats: Sequence[TokenizedChat],
    rows: Sequence[int],
    firsts: Sequence[int],
) -> dict[int, Tensor]:
    """Log-probabilities of each row's response."""
    whole = read_responses(model, resid, [chats[row] for row in rows], firsts)
    sizes = [len(_suffix(chats[row])) for row in rows]
    return dict(zip(rows, whole.split(sizes), strict=True))


def read_responses(
    model: HookedTransformer,
    resid: Float[Tensor, "batch pos d_model"],
    chats: Sequence[TokenizedChat],
    firsts: Sequence[int],
) -> Float[Tensor, " tokens"]:
    """Read responses off the stream after the last block, as log-probabilities end to end.

    Args:
        model: whose final norm and unembedding.
        resid: one row a chat.
        chats: whose responses.
        firsts: for each row, the column that predicts the response's first token.

    Returns:
        float32 at least, on the CPU.
    """
    spans = [_span(chat) for chat in chats]
    sizes = [stop - start for start, stop in spans]
    device = resid.device
    flat = torch.cat(
        [resid[i, at : at + n] for i, (at, n) in enumerate(zip(firsts, sizes, strict=True))]
    )
    targets = torch.cat([chat.ids[a:b] for chat, (a, b) in zip(chats, spans, strict=True)])
    targets = targets.to(device)
    scores = [
        pick_log_probs(model, flat[part], targets[part])
        for part in slice_rows(len(flat), model.cfg.d_vocab, copies=2)
    ]
    nothing = flat.new_empty(0, dtype=torch.promote_types(flat.dtype, torch.float32))
    return torch.cat([nothing, *scores]).cpu()


def pick_log_probs(
    model: HookedTransformer, resid: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probability of one token a position.

    Args:
        model: whose final norm and unembedding.
        resid: streams after the last block.
        targets: the token that each of them predicts.
    """
    logits = compute_logits(model, resid)
    wide = torch.promote_types(logits.dtype, torch.float32)
    chosen = logits.gather(-1, targets[:, None])[:, 0].to(wide)
    totals = [torch.logsumexp(rows.to(wide), dim=-1) for rows in split_blocks(logits)]
    return chosen - torch.cat(totals)
