"""The sampling loop: left-padded rows over a preallocated key-value cache, ended rows leaving it.

It knows hooks and no interventions. Hooks must treat the rows of a batch alike, or tell them by
`tokens_in_flight(model).rows`: rows leave, and prompts that several rows share are run once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.data import PositionsError
from emlens.models.attach import acts_on_rows
from emlens.models.kv_cache import KeyValueCache, run_cached
from emlens.models.packed_weights import PackedWeights
from emlens.models.sampling import Sampling, choose_tokens
from emlens.models.shared_prompts import find_equal, frame_shared
from emlens.models.tokens_in_flight import TokensInFlight, frame_prompts, publish_tokens
from emlens.models.unembed import compute_logits
from emlens.models.views import origin_of
from emlens.numerics.by_device import ByDevice
from emlens.numerics.validation import NonFiniteError, WidthError

__all__ = ["Generated", "Sampling", "generate_tokens", "stop_tokens"]

_CHECKS = ByDevice(cpu=1, elsewhere=8)
"""Steps between looks at which rows have ended; each waits for the device."""
_LEAVING = 8
"""Ended rows leave when they are at least one in so many: moving the cache costs about a step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """Continuations of a batch of prompts."""

    ids: tuple[Int[Tensor, " _"], ...]
    """New tokens of each row, its stop token included; on the CPU."""
    ended: tuple[bool, ...]
    """Whether each row ended by a stop token rather than by its length."""
    tokens_run: int
    """Tokens of prompts and continuations put through the model, padding and ended rows included;
    a prompt that several rows share counts once."""
    tokens_needed: int
    """How many of them were neither padding nor after a row's end."""


def stop_tokens(model: HookedTransformer) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's own and the generation config's."""
    named = getattr(origin_of(model).generation_config, "eos_token_id", None)
    own = getattr(model.tokenizer, "eos_token_id", None)
    ids = [own, *(named if isinstance(named, list | tuple) else [named])]
    return tuple(sorted({i for i in ids if i is not None}))


def generate_tokens(
    model: HookedTransformer,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    sampling: Sampling,
    keys: Int[Tensor, " batch"] | None = None,
    stop_ids: Sequence[int] = (),
    rows: Sequence[int] | None = None,
) -> Generated:
    """Continue each row of a batch of prompts; `sampling.n` is not looked at.

    Args:
        model: a model loaded by emlens, with or without adapters and hooks.
        ids: prompts, padded on the left.
        mask: 1 at tokens of the prompts, 0 at padding, whatever the ids there are.
        sampling: how tokens are chosen.
        keys: the key of each row's random numbers; greedy sampling needs none.
        stop_ids: a row ends with the first of these.
        rows: index of each row in the caller's whole run, for hooks; by default its place.

    Raises:
        ValueError: an empty prompt, one that leaves no room in the model's context, a mask that is
            not padded on the left, or no keys to sample with.
        NonFiniteError: logits that are no numbers.
    """
    ids, mask = _check_prompts(model, ids, mask, sampling)
    device = model.W_E.device
    if not sampling.greedy:
        if keys is None or keys.shape != (len(ids),) or keys.dtype != torch.int64:
            got = None if keys is None else (keys.dtype, tuple(keys.shape))
            raise ValueError(f"keys: got {got}, expected int64 [{len(ids)}], one a row")
        keys = keys.to(device)
    frame = frame_prompts(mask, rows=rows)
    with torch.inference_mode(), PackedWeights().used():
        loop = _Loop(
            model, sampling, torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
        )
        loop.start(ids.to(device), mask.to(device), frame, keys)
        while loop.go_on():
            pass
        new, counts = loop.new.cpu(), loop.counts.tolist()
    found = tuple(row[:count].clone() for row, count in zip(new, counts, strict=True))
    return Generated(
        ids=found,
        ended=tuple(int(row[-1]) in stop_ids for row in found),
        tokens_run=loop.tokens_run,
        tokens_needed=loop.prompt_tokens + sum(counts) - len(counts),
    )


def _check_prompts(
    model: HookedTransformer, ids: Tensor, mask: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """The prompts without columns that are all padding."""
    if ids.ndim != 2 or mask.shape != ids.shape or not len(ids):
        raise ValueError(
            f"ids {tuple(ids.shape)} and mask {tuple(mask.shape)}: expected both [batch pos], with "
            "at least one row"
        )
    lengths = mask.ne(0).sum(dim=1)
    if not bool(lengths.all()):
        raise ValueError(f"ids: row {int(lengths.argmin())} is empty; there is nothing to go on")
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError("mask: it must be 0 on the left and 1 on the right; pad on the left")
    width = int(lengths.max())
    if width + sampling.max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"ids: the prompt of {width} tokens in row {int(lengths.argmax())} and "
            f"{sampling.max_new_tokens} new tokens exceed the model's context of "
            f"{model.cfg.n_ctx}; shorten the prompt or ask for fewer tokens"
        )
    return ids[:, -width:], mask[:, -width:]


class _Loop:
    """What the rows still in the batch carry from step to step, and what all have said."""

    cache: KeyValueCache
    frame: TokensInFlight
    new: Int[Tensor, "batch steps"]
    """Tokens of every row that ever was in the batch."""
    counts: Int[Tensor, " batch"]
    """How many of them are the row's own: the rest came after its end."""

    def __init__(self, model: HookedTransformer, sampling: Sampling, stops: Tensor):
        self.model, self.sampling, self.stops = model, sampling, stops
        self.step = 0
        self.rows_act = acts_on_rows(model)
        self.every = _CHECKS.of(stops.device)

    def start(self, ids: Tensor, mask: Tensor, frame: TokensInFlight, keys: Tensor | None) -> None:
        """Run the prompts and choose the first tokens."""
        batch, steps = len(ids), self.sampling.max_new_tokens
        self.frame, self.keys = frame, keys
        self.new = ids.new_zeros((batch, steps))
        self.counts = ids.new_full((batch,), steps)
        self.places = torch.arange(batch, device=ids.device)
        """Row of ``new`` that each row in the batch writes to."""
        self.ended = torch.zeros_like(self.places, dtype=torch.bool)
        self.sound = torch.ones((), dtype=torch.bool, device=ids.device)
        self.lengths = mask.sum(dim=1)
        self._choose(self._run_prompts(ids, mask))

    def go_on(self) -> bool:
        """Run the tokens chosen last and choose the next; False if there is nothing left to do."""
        if self.step == self.sampling.max_new_tokens or self._all_ended():
            if not bool(self.sound):
                raise NonFiniteError(
                    "logits: NaN or infinity came out of the model; a hook, an adapter or half "
                    "precision may have overflowed"
                )
            return False
        frame = self.frame.at((self.lengths + self.step - 1)[:, None])
        with publish_tokens(self.model, frame):
            resid = run_cached(self.model, self.current[:, None], self.cache)
        self.tokens_run += len(self.current)
        self._choose(resid[:, -1])
        return True

    def _run_prompts(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "batch d_model"]:
        """Fill the cache, each distinct prompt once; returns the streams at the last position."""
        width = ids.shape[1]
        room = width + self.sampling.max_new_tokens - 1
        marked = torch.where(mask.bool(), ids, -1)
        first, kind = find_equal(list(marked.cpu()))
        self.prompt_tokens = int(self.lengths[first].sum())
        if len(first) < len(ids) and not self.rows_act:
            try:
                cache = KeyValueCache(self.model, batch=len(first), capacity=width)
                with publish_tokens(self.model, frame_shared(self.frame, first)):
                    resid = run_cached(self.model, ids[first], cache, mask=mask[first])
            except (PositionsError, WidthError):
                pass  # a hook that tells the rows apart: run them all
            else:
                self.tokens_run = len(first) * width
                rows = torch.tensor(kind, device=ids.device)
                self.cache = cache.spread(self.model, rows, capacity=room)
                return resid[rows, -1]
        self.prompt_tokens = int(self.lengths.sum())
        self.tokens_run = ids.numel()
        self.cache = KeyValueCache(self.model, batch=len(ids), capacity=room)
        with publish_tokens(self.model, self.frame):
            return run_cached(self.model, ids, self.cache, mask=mask)[:, -1]

    def _choose(self, resid: Float[Tensor, "rows d_model"]) -> None:
        logits = compute_logits(self.model, resid)
        self.current, sound = choose_tokens(
            logits, keys=self.keys, step=self.step, sampling=self.sampling
        )
        self.sound = self.sound & (sound | self.ended).all()
        self.new[self.places, self.step] = self.current
        self.step += 1
        if len(self.stops):
            hit = (self.current[:, None] == self.stops).any(dim=1) & ~self.ended
            counts = self.counts[self.places]
            self.counts[self.places] = torch.where(hit, self.step, counts)
            self.ended = self.ended | hit

    def _all_ended(self) -> bool:
        """Whether every row has; now and then, and rows that have may leave the batch."""
        if not len(self.stops) or self.step % self.every:
            return False
        n, ended = len(self.ended), int(self.ended.sum())
        if ended < n and ended * _LEAVING >= n and not self.rows_act:
            self._leave((~self.ended).nonzero()[:, 0])
        return ended == n

    def _leave(self, kept: Int[Tensor, " kept"]) -> None:
        self.cache.keep(kept)
        self.frame = self.frame.keep(kept)
        self.places, self.lengths = self.places[kept], self.lengths[kept]
        self.ended, self.current = self.ended[kept], self.current[kept]
        self.keys = None if self.keys is None else self.keys[kept]
