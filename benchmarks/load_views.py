"""Load views: what does a HookedTransformer cost on top of the checkpoint, in bytes and in time?

Bound: 0 bytes copied.
Beside it: TransformerLens's own loading of the same model in memory, and its TransformerBridge.

Bytes are counted twice: tensor storage that is alive after laying the model and was not before,
and resident bytes of a process that loads the checkpoint and then lays the model over it. The time
is that of loading checkpoint and tokenizer from disk with the model laid over, beside loading them
alone. On a GPU, where the weights are random and lie on no disk, bytes only.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.memory import Residence, count_new_bytes, measure_residence
from benchmarks.models import (
    checkpoint_folder,
    describe_model,
    draw_ids,
    load_hugging_face,
    load_tokenizer,
)
from benchmarks.peers import find_peers, load_bridge, load_own_way
from benchmarks.records import Figure, Record
from benchmarks.reference import Reference
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import exact_ratio, single_ratio, time_sides
from emlens.models.loading import load_model
from emlens.models.views import lay_views

SIDES = ("emlens", "transformer_lens", "bridge")
EXTRA_AIM = 0.02
"""Bytes beyond the checkpoint, of the checkpoint's."""
TIME_AIM = 1.1
"""Time of checkpoint and views over that of the checkpoint."""


def measure(settings: Settings) -> Record:
    """Check the logits of every side, then count bytes and take times."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    notes: list[str] = []
    for dtype in settings.dtypes:
        figures += _count(dtype, settings, sizes, notes)
        if settings.device == "cpu":
            figures += _time(dtype, settings, seconds)
            figures += _occupy(dtype, settings, peaks)
    timed = settings.device == "cpu"
    return Record(
        row="load_views",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={"extra_bytes": "extra bytes / checkpoint: emlens"}
        | ({"vs_transformer_lens": "load time: vs_transformer_lens"} if timed else {})
        | ({"vs_huggingface": "load time: vs_huggingface"} if timed else {}),
        seconds=seconds,
        peak_bytes=peaks,
        peak_sides=() if timed else SIDES,  # on a CPU those of `_occupy`
        notes=tuple(dict.fromkeys(notes)),
    )


def lay(side: str, hf: Any, tokenizer: Any) -> Any:
    """Put one side's model over, or beside, a Hugging Face model in memory."""
    if side == "emlens":
        return lay_views(hf, tokenizer)
    return load_own_way(hf) if side == "transformer_lens" else load_bridge(hf, tokenizer)


def _count(dtype: str, settings: Settings, sizes: dict[str, Any], notes: list[str]) -> list[Figure]:
    tokenizer = load_tokenizer(settings)

    def count(side: str) -> Figure:
        hf = load_hugging_face(dtype, settings)
        sizes.update(describe_model(hf))
        ids = draw_ids(hf, 2, 16)
        reference = Reference(hf, ids)
        _ = reference.exact  # made now: the bridge changes the model that it is given
        held = sum(p.numel() * p.element_size() for p in hf.parameters())
        model, extra = count_new_bytes(lambda: lay(side, hf, tokenizer))
        with torch.inference_mode():
            logits = model(ids, attention_mask=torch.ones_like(ids))
        reference.check(logits, what=f"{side} {dtype}")
        return Figure(
            name=f"extra bytes / checkpoint: {side}",
            dtype=dtype,
            ratio=exact_ratio(extra / held),
            better="lower",
            aim=settings.aim(EXTRA_AIM) if side == "emlens" else None,
        )

    peers = {side: partial(count, side) for side in SIDES[1:]}
    return [count("emlens"), *find_peers(peers, notes).values()]


def _time(dtype: str, settings: Settings, seconds: dict[str, float]) -> list[Figure]:
    def both(side: str) -> Callable[[], object]:
        return lambda: lay(side, load_hugging_face(dtype, settings), load_tokenizer(settings))

    timings = time_sides(
        {
            "emlens": lambda: load_model(checkpoint_folder(settings.size), dtype=dtype),
            "huggingface": lambda: (
                load_hugging_face(dtype, settings),
                load_tokenizer(settings),
            ),
            "transformer_lens": both("transformer_lens"),
            "bridge": both("bridge"),
        },
        rounds=settings.rounds,
        clock=settings.read_clock,
    )
    seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
    cost = Figure(
        name="load time / checkpoint's",
        dtype=dtype,
        ratio=timings.cost("emlens", "huggingface"),
        better="lower",
        aim=settings.aim(TIME_AIM),
    )
    speeds = [
        Figure(
            name=f"load time: vs_{peer}",
            dtype=dtype,
            ratio=timings.speed("emlens", peer),
            better="higher",
        )
        for peer in ("huggingface", "transformer_lens", "bridge")
    ]
    return [cost, *speeds]


def _occupy(dtype: str, settings: Settings, peaks: dict[str, int]) -> list[Figure]:
    """Resident bytes of a process of its own, at full size: a toy drowns in the allocator's."""
    figures = []
    if not settings.full:
        return figures
    for side in SIDES:
        found: Residence = measure_residence("load_views", side, dtype, settings)
        peaks[f"{dtype}: {side}"] = found.peak
        held = int(found.counted["checkpoint"])
        figures.append(
            Figure(
                name=f"extra resident bytes / checkpoint: {side}",
                dtype=dtype,
                ratio=single_ratio((found.after[1] - found.after[0]) / held),
                better="lower",
                aim=settings.aim(EXTRA_AIM) if side == "emlens" else None,
            )
        )
    return figures


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load the checkpoint and read all of it; then lay the model over it."""
    hf = load_hugging_face(dtype, settings)
    tokenizer = load_tokenizer(settings)
    for parameter in hf.parameters():
        parameter.sum()  # a mapped page becomes resident when it is read
    yield {"checkpoint": sum(p.numel() * p.element_size() for p in hf.parameters())}
    model = lay(side, hf, tokenizer)
    yield {}
    del model


if __name__ == "__main__":
    run_alone(measure)
