"""Stream: what do mean and variance at every layer, over all tokens, cost beside the forward pass?

Bound: one prefill up to the last block, without logits; nothing else need be done with a token.
Beside it: ``run_with_cache`` of TransformerLens's own loading, and Hugging Face's
``output_hidden_states``, each followed by mean and variance of what it holds: every token at every
layer.

At full size the peak memory of four times as many tokens is measured too: it should not grow.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import measure_residence
from benchmarks.models import describe_model, load_hugging_face, load_tokenizer, make_chats
from benchmarks.peers import find_peers, load_own_way
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import single_ratio, time_sides
from benchmarks.work import Work, count_pass
from emlens.activations import plan_reading, stream_activations
from emlens.activations.results import ActivationStatistics
from emlens.data import Batching, Chat, pad_batch
from emlens.models.views import lay_views

AIM = 1.05
PEERS = ("transformer_lens", "huggingface")
MEMORY_AIM = 1.02
CHATS = {"toy": (4, 24), "full": (8, 98)}
"""Chats and words in each; a chat of SmolLM2 has 30 tokens of header and system prompt more."""
BATCHES = {"emlens": 1, "few": 2, "many": 8}
"""Batches of chats that a process streams; from the second on the peak should be the same."""


def measure(settings: Settings) -> Record:
    """Time streaming, the pass alone and the cache, in each dtype."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    work: dict[str, Work] = {}
    notes: list[str] = []
    sizes: dict[str, Any] = {}
    for dtype in settings.dtypes:
        figures += _measure_memory(dtype, settings)  # before anything lies in the memory
        hf = load_hugging_face(dtype, settings)
        base = lay_views(hf, load_tokenizer(settings))
        chats = make_chats(settings, *CHATS[settings.size])
        ids = batch_ids(base, chats)
        sides: dict[str, Callable[[], object]] = {
            "emlens": lambda base=base, chats=chats: stream(base, chats),
            "prefill": lambda base=base, ids=ids: run_blocks(base, ids),
        }
        found = stream(base, chats)
        peers = {side: partial(make_peer, side, hf, ids, found) for side in PEERS}
        sides |= find_peers(peers, notes)
        timings = time_sides(
            sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
        )
        figures += [
            Figure(
                name="mean and variance / prefill",
                dtype=dtype,
                ratio=timings.cost("emlens", "prefill"),
                better="lower",
                aim=settings.aim(AIM),
            ),
            *(
                Figure(
                    name=f"vs_{peer}",
                    dtype=dtype,
                    ratio=timings.speed("emlens", peer),
                    better="higher",
                )
                for peer in PEERS
                if peer in timings.seconds
            ),
        ]
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
        work[f"{dtype}: prefill"] = count_pass(hf, *ids.shape, logits=0)
        sizes |= describe_model(hf) | dict(zip(("batch", "pos"), ids.shape, strict=True))
    return Record(
        row="stream",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            "over_prefill": "mean and variance / prefill",
            "vs_huggingface": "vs_huggingface",
        },
        seconds=seconds,
        work=work,
        notes=tuple(dict.fromkeys(notes)),
        peak_sides=("emlens", "transformer_lens"),
    )


def make_peer(
    side: str, hf: Any, ids: Tensor, found: ActivationStatistics
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A peer's mean and variance [layer d], those that are about to be timed checked by them."""
    if side == "transformer_lens":
        run = partial(reduce_cache, load_own_way(hf), ids)
    else:
        run = partial(reduce_hidden_states, hf, ids)
    # In bfloat16 the two ways round differently at every layer.
    allowed = 1e-3 if hf.dtype == torch.float32 else 0.2
    # Hugging Face's last hidden state is after the final norm.
    layers = slice(None) if side == "transformer_lens" else slice(None, -1)
    check_statistics(found, run(), allowed, layers=layers)
    return run


def stream(base: Any, chats: tuple[Chat, ...], tokens: int = 16384) -> ActivationStatistics:
    """The call that is measured."""
    return stream_activations(
        base, chats, sites="resid_post", positions="all", batching=Batching(tokens=tokens)
    )


def batch_ids(base: Any, chats: tuple[Chat, ...]) -> Tensor:
    """The chats as one batch without padding."""
    plan = plan_reading(base, chats, sites="resid_post", positions="all", batching=Batching())
    (rows,) = plan.batches
    batch = pad_batch(plan.tokenized, rows, pad_id=plan.pad_id)
    assert bool(batch.mask.all()), "chats of equal length were meant"
    return batch.ids.to(base.W_E.device)


@torch.no_grad()
def run_blocks(base: Any, ids: Tensor) -> Tensor:
    """The forward pass up to the last block."""
    return base(ids, stop_at_layer=base.cfg.n_layers)


@torch.no_grad()
def reduce_cache(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [layer d] of a cache of every token, the usual way."""
    _, cache = model.run_with_cache(
        ids, names_filter=lambda name: name.endswith("hook_resid_post"), return_type=None
    )
    return _reduce(list(cache.values()))


@torch.no_grad()
def reduce_hidden_states(hf: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [layer d] of the states after each block; no logits are made."""
    states = hf.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states
    return _reduce(states[1:])


def _reduce(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    flat = [value.flatten(0, 1).float() for value in values]
    means = torch.stack([x.mean(0) for x in flat])
    return means, torch.stack([x.var(0, correction=0) for x in flat])


def check_statistics(
    found: ActivationStatistics,
    expected: tuple[Tensor, Tensor],
    allowed: float,
    *,
    layers: slice = slice(None),
) -> None:
    """Require mean and variance of every layer, or of some, of a cached pass.

    Raises:
        AssertionError: the statistics that are about to be timed are other ones.
    """
    for name, value in zip(("mean", "variance"), expected, strict=True):
        theirs = value[layers].cpu().double()
        ours = getattr(found, name)[0, layers, 0].cpu()
        gap = float((ours - theirs).norm() / theirs.norm())
        if not gap <= allowed:
            raise AssertionError(f"{name} differs by {gap:.2g} of its norm, at most {allowed}")


def _measure_memory(dtype: str, settings: Settings) -> list[Figure]:
    if not settings.full:
        return []
    # Mapped, as what the heap keeps differs by 3 % from run to run.
    few, many = (
        measure_residence("stream", side, dtype, settings, mapped=True).peaks[-1]
        for side in ("few", "many")
    )
    return [
        Figure(
            name="peak bytes, four times the tokens / once",
            dtype=dtype,
            ratio=single_ratio(many / few),
            better="lower",
            aim=MEMORY_AIM,
        )
    ]


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then cache or stream once; ``few`` and ``many`` stream several batches."""
    hf = load_hugging_face(dtype, settings)
    n, words = CHATS[settings.size]
    chats = make_chats(settings, n * BATCHES.get(side, 1), words)
    base = lay_views(hf, load_tokenizer(settings))
    if side == "transformer_lens":
        own, ids = load_own_way(hf), batch_ids(base, chats)
        yield {}
        reduce_cache(own, ids)
    else:
        yield {}
        # Batches of the same size in both, so that only what is kept between them can grow.
        stream(base, chats, tokens=batch_ids(base, chats[:n]).numel())
    yield {}


if __name__ == "__main__":
    run_alone(measure)
