"""Prefill: how fast is one forward pass of 8 x 128 tokens, logits included?

Bound: the matrix multiplications of the weights alone, timed in the same rounds; and for the use
made of the device, the rate at which it multiplies large square matrices.
Beside it: Hugging Face (sdpa attention) with logits, TransformerLens's own loading and its bridge,
and nnsight around Hugging Face's modules.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import multiply_squares
from benchmarks.models import (
    describe_model,
    draw_ids,
    linear_weights,
    load_hugging_face,
    load_tokenizer,
    sweep_weights,
)
from benchmarks.nnsight_peer import pass_once, trace_model
from benchmarks.peers import find_peers, load_bridge, load_own_way
from benchmarks.records import Figure, Record
from benchmarks.reference import Reference
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import Timings, time_sides
from benchmarks.work import Work, count_pass
from emlens.models.views import lay_views

SHAPES = {"toy": (4, 32), "full": (8, 128)}
SIDES = ("emlens", "huggingface", "transformer_lens")
PEERS = ("transformer_lens", "bridge", "nnsight")
"""Left out, with a reason, where they cannot be run."""
AIMS = {"huggingface": 1.0}


def measure(settings: Settings) -> Record:
    """Time all sides on the same ids, in each dtype."""
    batch, length = SHAPES[settings.size]
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    work: dict[str, Work] = {}
    notes: list[str] = []
    sizes: dict[str, Any] = {"batch": batch, "pos": length}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        ids = draw_ids(hf, batch, length)
        sides = make_sides(hf, ids, settings, notes)
        squares, most = multiply_squares(dtype, settings)
        timings = time_sides(
            sides
            | {"bound": sweep_weights(linear_weights(hf), batch * length), "squares": squares},
            rounds=settings.rounds,
            device=settings.device,
            clock=settings.read_clock,
        )
        done = count_pass(hf, batch, length)
        figures += _compare(timings, dtype, settings)
        figures.append(
            Figure(
                name="share of the machine's FLOP/s",
                dtype=dtype,
                ratio=timings.share("emlens", done.flops, "squares", most),
                better="higher",
            )
        )
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
        work |= {f"{dtype}: {side}": done for side in sides}
        work[f"{dtype}: squares"] = Work(flops=most, bytes=0)
        sizes |= describe_model(hf)
    return Record(
        row="prefill",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={"vs_huggingface": "vs_huggingface", "vs_bound": "vs_bound"},
        seconds=seconds,
        work=work,
        peak_sides=SIDES,
        notes=tuple(dict.fromkeys(notes)),
    )


def make_sides(
    hf: Any, ids: Tensor, settings: Settings, notes: list[str]
) -> dict[str, Callable[[], Tensor]]:
    """Every side that can be run here, its logits checked."""
    reference = Reference(hf, ids)

    def checked(side: str) -> Callable[[], Tensor]:
        run = make_side(side, hf, ids, settings)
        reference.check(run(), what=side)
        return run

    peers = {side: (lambda side=side: checked(side)) for side in PEERS}
    return {side: checked(side) for side in ("emlens", "huggingface")} | find_peers(peers, notes)


def make_side(side: str, hf: Any, ids: Tensor, settings: Settings) -> Callable[[], Tensor]:
    """A forward pass that returns logits [batch pos d_vocab]."""
    if side == "huggingface":
        return torch.inference_mode()(lambda: hf(ids, use_cache=False).logits)
    if side == "nnsight":
        return pass_once(trace_model(hf, load_tokenizer(settings)), ids)
    if side == "bridge":
        own = load_hugging_face(str(hf.dtype).removeprefix("torch."), settings)
        bridge = load_bridge(own, load_tokenizer(settings))
        mask = torch.ones_like(ids)
        return torch.inference_mode()(lambda: bridge(ids, attention_mask=mask))
    hooked = lay_views(hf, None) if side == "emlens" else load_own_way(hf)
    return torch.inference_mode()(lambda: hooked(ids))


def _compare(timings: Timings, dtype: str, settings: Settings) -> list[Figure]:
    return [
        Figure(
            name=f"vs_{peer}",
            dtype=dtype,
            ratio=timings.speed("emlens", peer),
            better="higher",
            aim=settings.aim(AIMS.get(peer)),
        )
        for peer in ("huggingface", *PEERS, "bound")
        if peer in timings.seconds
    ]


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then run twice, pausing after each for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    run = make_side(side, hf, draw_ids(hf, *SHAPES[settings.size]), settings)
    yield {}
    run()
    run()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
