"""Decode: how fast are 32 greedy tokens after a prompt of 32, for one row and for 32?

Bound: every weight read once a token, timed as the bare multiplications of that many rows in the
same run (reading the cache comes on top).
Beside it: Hugging Face generate (sdpa attention) and TransformerLens's own loading and generate.
Neither side looks for an end of text.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import (
    describe_model,
    draw_ids,
    linear_weights,
    load_hugging_face,
    sweep_weights,
)
from benchmarks.peers import check_tokens, generate_hugging_face, generate_own_way, load_own_way
from benchmarks.records import Figure, Record
from benchmarks.rows import measure_peaks, run_alone
from benchmarks.settings import Settings
from benchmarks.timing import Timings, time_sides
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.views import lay_views

BATCHES = {"toy": (1,), "full": (1, 32)}
NEW = {"toy": 8, "full": 32}
PROMPT = 32
SIDES = ("emlens", "huggingface", "transformer_lens")
AIMS = {
    ("float32", 1, "huggingface"): 1.0,
    ("float32", 32, "huggingface"): 1.0,
    ("bfloat16", 1, "huggingface"): 1.1,
    ("bfloat16", 32, "huggingface"): 2.5,
    ("float32", 1, "transformer_lens"): 3.0,
    ("bfloat16", 1, "transformer_lens"): 3.0,
}


def measure(settings: Settings) -> Record:
    """Time all sides on the same prompts, in each dtype and batch."""
    n = NEW[settings.size]
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {"prompt": PROMPT, "new": n, "batch": BATCHES[settings.size]}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        makers = {side: make_side(side, hf) for side in SIDES}
        for batch in BATCHES[settings.size]:
            ids = draw_ids(hf, batch, PROMPT)
            sides = {side: make(ids, n) for side, make in makers.items()}
            _check(sides, hf, ids)
            timings = time_sides(
                sides | {"bound": _sweep_often(hf, batch, n)},
                rounds=settings.rounds,
                device=settings.device,
                clock=settings.read_clock,
            )
            figures += _compare(timings, dtype, batch, settings)
            for side in timings.seconds:
                seconds[f"batch {batch}, {dtype}: {side}"] = timings.median(side)
            read = n * sum(w.numel() * w.element_size() for w in linear_weights(hf))
            rate = read / timings.median("emlens")
            sizes[f"batch {batch}, {dtype}: weight bytes/s"] = rate
    return Record(
        row="decode",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            f"vs_{peer}": f"batch 1: vs_{peer}" for peer in ("transformer_lens", "huggingface")
        },
        seconds=seconds,
        peak_bytes=measure_peaks("decode", SIDES, settings),
    )


def make_side(side: str, hf: Any) -> Callable[[Tensor, int], Callable[[], Tensor]]:
    """Build one side's model; returns ids, n -> a call that decodes n tokens [batch n]."""
    if side == "huggingface":
        return lambda ids, n: generate_hugging_face(hf, ids, n)
    if side == "transformer_lens":
        own = load_own_way(hf)
        return lambda ids, n: generate_own_way(own, ids, n)
    views = lay_views(hf, None)
    return lambda ids, n: lambda: generate_ours(views, ids, n)


def generate_ours(model: Any, ids: Tensor, n: int) -> Tensor:
    """Greedy decoding of exactly ``n`` tokens: [batch n]."""
    sampling = Sampling(1, temperature=0, max_new_tokens=n)
    found = generate_tokens(model, ids, torch.ones_like(ids), sampling=sampling)
    return torch.stack(found.ids).to(ids.device)


def _check(sides: dict[str, Callable[[], Tensor]], hf: Any, ids: Tensor) -> None:
    theirs = sides["huggingface"]()
    for side in ("emlens", "transformer_lens"):
        check_tokens(sides[side](), theirs, hf, ids)


def _sweep_often(hf: Any, batch: int, n: int) -> Callable[[], None]:
    sweep = sweep_weights(linear_weights(hf), batch)

    def often() -> None:
        for _ in range(n):
            sweep()

    return often


def _compare(timings: Timings, dtype: str, batch: int, settings: Settings) -> list[Figure]:
    return [
        Figure(
            name=f"batch {batch}: vs_{peer}",
            dtype=dtype,
            ratio=timings.speed("emlens", peer),
            better="higher",
            aim=settings.aim(AIMS.get((dtype, batch, peer))),
        )
        for peer in ("huggingface", "transformer_lens", "bound")
    ]


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then decode one row, pausing after each for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    decode = make_side(side, hf)(draw_ids(hf, 1, PROMPT), NEW[settings.size])
    yield {}
    decode()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
