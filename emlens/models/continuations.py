"""Probabilities of many short continuations of a prompt, through a prefix tree over one cache.

For what a judge may answer, such as the numbers 0 to 100. Long responses, one or a few a prompt,
are for `score`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.data import Batching, track
from emlens.models.kv_cache import KeyValueCache, run_cached
from emlens.models.shared_prompts import pad_texts
from emlens.models.tokens_in_flight import frame_prompts, publish_tokens
from emlens.models.unembed import log_probabilities
from emlens.numerics.blocks import slice_rows

Tokens = tuple[int, ...]

CACHE_SHARE = 10
"""A pass over prefixes may hold one part in so many of a GPU's memory as their copies of the cache:
8 GB of 80, on any GPU an estimate of what the prompts' own pass took for activations and has given
back."""
CACHE_TOKENS = 8
"""As many positions may be held for a token of the budget, so that a smaller one still asks for
less memory."""


@dataclass(frozen=True)
class _Tree:
    """Every prefix of some continuations, by depth; the empty one is the prompt itself."""

    levels: tuple[tuple[Tokens, ...], ...]
    next_tokens: dict[Tokens, tuple[int, ...]]


def score_continuations(
    model: HookedTransformer,
    prompts: Sequence[Int[Tensor, " _"]],
    continuations: Sequence[Sequence[int]],
    *,
    never_next: Int[Tensor, " k"],
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> Float64[Tensor, "prompts continuations"]:
    """Log-probability of each continuation after each prompt, and of what may come next.

    log p(n) = sum_i log p(token_i | prompt, tokens before) + log(1 - p(never_next | all of them)):
    where numbers are spelt digit by digit, `8` must not swallow `85`. A prompt is run once; each
    prefix that continuations share is run once for each prompt.

    Args:
        model: loaded by emlens.
        prompts: token ids, none empty; prompts of like length run together.
        continuations: token ids, none empty, each once.
        never_next: ids that would make another continuation of it, such as all that begin with a
            digit; may be none.
        batching: tokens run together, those held in a cache counted; on a GPU a cache may hold up
            to eight times as many, within a tenth of its memory, since few tokens a pass would
            leave it idle.

    Raises:
        ValueError: no prompts, an empty one or one that leaves no room; continuations that are
            empty or come twice.
    """
    found = [tuple(int(token) for token in one) for one in continuations]
    _check(model, prompts, found)
    tree = _plant(found)
    scores = torch.empty(len(prompts), len(found), dtype=torch.float64)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    longest = len(tree.levels) - 1
    for rows in track(list(_batches(prompts, order, batching, longest)), "judging (prompts)"):
        logs = _score_batch(model, [prompts[row] for row in rows], tree, never_next, batching)
        for column, tokens in enumerate(found):
            value = logs.after[tokens].clone()
            for depth in range(len(tokens)):
                value = value + logs.steps[tokens[: depth + 1]]
            scores[list(rows), column] = value
    return scores


@dataclass
class _Logs:
    """By prefix, one value a prompt: log p of its last token, log p that none of a set follows."""

    steps: dict[Tokens, Tensor]
    after: dict[Tokens, Tensor]


@torch.no_grad()
def _score_batch(
    model: HookedTransformer,
    prompts: Sequence[Tensor],
    tree: _Tree,
    never_next: Tensor,
    batching: Batching,
) -> _Logs:
    device = model.W_E.device
    ids, mask = pad_texts(prompts, side="left")
    frame = frame_prompts(mask)
    logs = _Logs({}, {})
    cache = KeyValueCache(model, batch=len(prompts), capacity=ids.shape[1])
    with publish_tokens(model, frame):
        resid = run_cached(model, ids.to(device), cache, mask=mask.to(device))[:, -1]
    _read(model, resid, [()] * len(prompts), tree, never_next, logs)
    lengths = mask.sum(1)
    room = _count_room(cache, batching, memory=_device_memory(device))
    for level in tree.levels[1:]:
        run = len(prompts) * len(level[0])
        held = len(prompts) * ids.shape[1] + run
        for nodes in _cut(level, min(room // held, batching.tokens // run)):
            # One row a node and prompt, the prompts of a node side by side.
            rows = torch.arange(len(prompts)).repeat(len(nodes))
            tokens = torch.tensor(nodes).repeat_interleave(len(prompts), dim=0)
            width = tokens.shape[1]
            own = cache.spread(model, rows.to(device), capacity=ids.shape[1] + width)
            places = lengths[rows][:, None] + torch.arange(width)
            with publish_tokens(model, frame.keep(rows.tolist()).at(places)):
                resid = run_cached(model, tokens.to(device), own)[:, -1]
            prefixes = [node for node in nodes for _ in prompts]
            _read(model, resid, prefixes, tree, never_next, logs)
    return logs


def _read(
    model: HookedTransformer,
    resid: Float[Tensor, "n d_model"],
    prefixes: Sequence[Tokens],
    tree: _Tree,
    never_next: Tensor,
    logs: _Logs,
) -> None:
    """Take from the distributions after some prefixes what the tree asks of them."""
    asked = torch.tensor(sorted({token for ts in tree.next_tokens.values() for token in ts}))
    never = never_next.to(resid.device)
    kept, left = [], []
    for part in slice_rows(len(resid), model.cfg.d_vocab, copies=2):
        logs_of_part = log_probabilities(model, resid[part])
        kept.append(logs_of_part[:, asked.to(resid.device)].double().cpu())
        left.append(logs_of_part[:, never].double().exp().sum(1).clamp(max=1).cpu())
    steps, after = torch.cat(kept), torch.log1p(-torch.cat(left))
    column = {int(token): place for place, token in enumerate(asked)}
    n = prefixes.count(prefixes[0])
    for place in range(0, len(prefixes), n):
        prefix = prefixes[place]
        logs.after[prefix] = after[place : place + n]
        for token in tree.next_tokens.get(prefix, ()):
            logs.steps[(*prefix, token)] = steps[place : place + n, column[token]]


def _plant(continuations: Sequence[Tokens]) -> _Tree:
    levels: list[dict[Tokens, None]] = [{(): None}]
    following: dict[Tokens, dict[int, None]] = {}
    for tokens in continuations:
        for depth, token in enumerate(tokens, start=1):
            if len(levels) <= depth:
                levels.append({})
            levels[depth][tokens[:depth]] = None
            following.setdefault(tokens[: depth - 1], {})[token] = None
    return _Tree(
        levels=tuple(tuple(level) for level in levels),
        next_tokens={prefix: tuple(tokens) for prefix, tokens in following.items()},
    )


def _batches(
    prompts: Sequence[Tensor], order: Sequence[int], batching: Batching, longest: int
) -> Iterator[tuple[int, ...]]:
    batch: list[int] = []
    for row in order:
        width = len(prompts[batch[0] if batch else row]) + longest
        if batch and width * (len(batch) + 1) > batching.tokens:
            yield tuple(batch)
            batch = []
        batch.append(row)
    yield tuple(batch)


def _count_room(cache: KeyValueCache, batching: Batching, *, memory: int | None) -> int:
    """Positions that the copies of a cache may hold in one pass, on a GPU of so many bytes."""
    if memory is None:
        return batching.tokens
    fitting = memory // CACHE_SHARE // cache.position_bytes
    return max(batching.tokens, min(CACHE_TOKENS * batching.tokens, fitting))


def _device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for what is busy with few tokens, or does not say."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _cut(level: Sequence[Tokens], fitting: int) -> Iterator[tuple[Tokens, ...]]:
    """Nodes of a level, as many at a time as fit; one where none does."""
    step = max(1, fitting)
    for start in range(0, len(level), step):
        yield tuple(level[start : start + step])


def _check(
    model: HookedTransformer, prompts: Sequence[Tensor], continuations: Sequence[Tokens]
) -> None:
    if not prompts:
        raise ValueError("prompts: got none, expected at least one")
    if not continuations or not all(continuations):
        raise ValueError("continuations: got none or an empty one, expected tokens to be scored")
    if len(set(continuations)) < len(continuations):
        raise ValueError("continuations: one comes twice")
    room = model.cfg.n_ctx - max(map(len, continuations))
    for place, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"prompts[{place}]: {len(prompt)} tokens, expected 1 to {room} for this model"
            )
