"""Prefill: how fast is one forward pass of 8 x 128 tokens, logits included?

Bound: the matrix multiplications of the weights alone, timed in the same run.
Beside it: Hugging Face (sdpa attention) with logits, and TransformerLens's own loading.
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
from benchmarks.peers import check_logits, load_own_way
from benchmarks.records import Figure, Record
from benchmarks.rows import measure_peaks, run_alone
from benchmarks.settings import Settings
from benchmarks.timing import time_sides
from emlens.models.views import lay_views

SHAPES = {"toy": (4, 32), "full": (8, 128)}
SIDES = ("emlens", "huggingface", "transformer_lens")


def measure(settings: Settings) -> Record:
    """Time all sides on the same ids, in each dtype."""
    batch, length = SHAPES[settings.size]
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {"batch": batch, "pos": length}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        ids = draw_ids(hf, batch, length)
        sides = {side: make_side(side, hf, ids) for side in SIDES}
        for name, side in sides.items():
            check_logits(side(), hf, ids, what=f"{name} {dtype}")
        weights = linear_weights(hf)
        timings = time_sides(
            sides | {"bound": sweep_weights(weights, batch * length)},
            rounds=settings.rounds,
            device=settings.device,
            clock=settings.read_clock,
        )
        figures += [
            Figure(
                name=f"vs_{peer}",
                dtype=dtype,
                ratio=timings.speed("emlens", peer),
                better="higher",
                aim=settings.aim({"huggingface": 1.0}.get(peer)),
            )
            for peer in ("huggingface", "transformer_lens", "bound")
        ]
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
        flops = 2 * batch * length * sum(w.numel() for w in weights)
        sizes |= describe_model(hf) | {
            f"{dtype}: matrix FLOP/s": flops / timings.median("emlens"),
        }
    return Record(
        row="prefill",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={"vs_transformer_lens": "vs_transformer_lens", "vs_huggingface": "vs_huggingface"},
        seconds=seconds,
        peak_bytes=measure_peaks("prefill", SIDES, settings),
    )


def make_side(side: str, hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A forward pass that returns logits [batch pos d_vocab]."""
    model = {"emlens": lambda: lay_views(hf, None), "transformer_lens": lambda: load_own_way(hf)}
    if side == "huggingface":
        return torch.inference_mode()(lambda: hf(ids, use_cache=False).logits)
    hooked = model[side]()
    return torch.inference_mode()(lambda: hooked(ids))


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then run twice, pausing after each for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    run = make_side(side, hf, draw_ids(hf, *SHAPES[settings.size]))
    yield {}
    run()
    run()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
