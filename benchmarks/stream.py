"""Stream: what do mean and variance at every layer, over all tokens, cost beside the forward pass?

Bound: one prefill up to the last block, without logits; nothing else need be done with a token.
Beside it: ``run_with_cache`` of TransformerLens's own loading, then mean and variance of the cache,
which holds every token at every layer.

At full size the peak memory of four times as many tokens is measured too: it should not grow.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import measure_residence
from benchmarks.models import describe_model, load_hugging_face, load_tokenizer, make_chats
from benchmarks.peers import load_own_way
from benchmarks.records import Figure, Record
from benchmarks.rows import measure_peaks, run_alone
from benchmarks.settings import Settings
from benchmarks.timing import exact_ratio, time_sides
from emlens.activations import plan_reading, stream_activations
from emlens.activations.results import ActivationStatistics
from emlens.data import Batching, Chat, pad_batch
from emlens.models.views import lay_views

AIM = 1.05
MEMORY_AIM = 1.02
CHATS = {"toy": (4, 24), "full": (8, 98)}
"""Chats and words in each; a chat of SmolLM2 has 30 tokens of header and system prompt more."""
BATCHES = {"emlens": 1, "few": 2, "many": 8}
"""Batches of chats that a process streams; from the second on the peak should be the same."""


def measure(settings: Settings) -> Record:
    """Time streaming, the pass alone and the cache, in each dtype."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        base, own = lay_views(hf, load_tokenizer(settings)), load_own_way(hf)
        chats = make_chats(settings, *CHATS[settings.size])
        ids = batch_ids(base, chats)
        # In bfloat16 the two ways round differently at every layer.
        allowed = 1e-3 if dtype == "float32" else 0.2
        check_statistics(stream(base, chats), reduce_cache(own, ids), allowed)
        sides: dict[str, Callable[[], object]] = {
            "emlens": lambda base=base, chats=chats: stream(base, chats),
            "prefill": lambda base=base, ids=ids: run_blocks(base, ids),
            "transformer_lens": lambda own=own, ids=ids: reduce_cache(own, ids),
        }
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
            Figure(
                name="vs_transformer_lens",
                dtype=dtype,
                ratio=timings.speed("emlens", "transformer_lens"),
                better="higher",
            ),
            *_measure_memory(dtype, settings),
        ]
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
        sizes |= describe_model(hf) | dict(zip(("batch", "pos"), ids.shape, strict=True))
    return Record(
        row="stream",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            "over_prefill": "mean and variance / prefill",
            "vs_transformer_lens": "vs_transformer_lens",
        },
        seconds=seconds,
        peak_bytes=measure_peaks("stream", ("emlens", "transformer_lens"), settings),
    )


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
    flat = [value.flatten(0, 1).float() for value in cache.values()]
    means = torch.stack([x.mean(0) for x in flat])
    return means, torch.stack([x.var(0, correction=0) for x in flat])


def check_statistics(
    found: ActivationStatistics, expected: tuple[Tensor, Tensor], allowed: float
) -> None:
    """Require mean and variance of every layer of a cached pass.

    Raises:
        AssertionError: the statistics that are about to be timed are other ones.
    """
    for name, value in zip(("mean", "variance"), expected, strict=True):
        theirs = value.cpu().double()
        gap = float((getattr(found, name)[0, :, 0].cpu() - theirs).norm() / theirs.norm())
        if not gap <= allowed:
            raise AssertionError(f"{name} differs by {gap:.2g} of its norm, at most {allowed}")


def _measure_memory(dtype: str, settings: Settings) -> list[Figure]:
    if not settings.full or settings.device != "cpu":
        return []
    few, many = (
        measure_residence("stream", side, dtype, settings).peak for side in ("few", "many")
    )
    return [
        Figure(
            name="peak bytes, four times the tokens / once",
            dtype=dtype,
            ratio=exact_ratio(many / few),
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
