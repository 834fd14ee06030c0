"""Growth: how do time and peak memory grow with prompts, layers, latents, adapters and batches?

Bound: straight lines. Memory should not grow with prompts at all.
Beside it: what `emlens doctor --plan` says beforehand, for the comparison of two models.

At full size each point is a process of its own, and
``python scripts/draw_growth.py SUITE.json OUT.svg`` draws them.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.adapters import Case
from benchmarks.memory import measure_residence, resident_bytes
from benchmarks.models import (
    TOY,
    load_hugging_face,
    load_tokenizer,
    make_chats,
    plan_source,
    random_model,
)
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.sae_diff import count, make_bench
from benchmarks.settings import Settings
from benchmarks.timing import single_ratio
from emlens.activations import stream_activations
from emlens.data import Batching, Chat, TokenizedChats
from emlens.data.tokenized import REMEMBERED
from emlens.diffing.compare import compare_models
from emlens.models.attach import attach_adapter
from emlens.models.memory import plan_memory
from emlens.models.pair import load_pair
from emlens.models.views import lay_views

WORDS = 32
"""Of each chat; its header comes on top."""
FLAT = 1.05
"""Peak with the most over that with the fewest, where memory should not grow. What the texts
themselves take, in the caller's hands, is left out."""
PLAN_ERROR = 1.1
"""Planned bytes over measured ones, or the reverse, whichever is above 1."""
SHORT = 5
"""Words of the chat that tells how long a header is."""
LONG_BATCH = 4096
"""Tokens a batch where it is the length of a chat that grows."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is made larger, and how large."""

    toy: tuple[int, ...]
    full: tuple[int, ...]
    flat: bool = False
    """Whether memory should stay."""

    def sizes(self, settings: Settings) -> tuple[int, ...]:
        """The points of one run."""
        return self.full if settings.full else self.toy


CURVES = {
    # From several full batches on: up to one, it is the batch that grows.
    "prompts": Curve(toy=(8, 32), full=(100, 300, 1000), flat=True),
    # And from more chats on than are remembered tokenised, which so small a model would show.
    "prompts, two layers": Curve(toy=(8, 64), full=(2 * REMEMBERED, 30_000, 100_000), flat=True),
    "layers": Curve(toy=(2, 4), full=(4, 8, 16, 32)),
    "latents": Curve(toy=(256, 1024), full=(4096, 16_384, 65_536)),
    "adapters": Curve(toy=(1, 4), full=(1, 4, 16, 64)),
    "tokens a batch": Curve(toy=(64, 256), full=(512, 2048, 8192)),
    # Whole batches of them, which is what is planned.
    "tokens a chat": Curve(toy=(32, 128), full=(128, 512, 2048)),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of one curve."""

    x: int
    items: int
    """Prompts, layers, latents, adapters, or tokens run: what time is counted by."""
    seconds: float
    floor: int
    """Bytes in use before anything is loaded."""
    loaded: int
    """And after."""
    peak: int
    """The most; where memory should stay, of a run in which no heap keeps what is free."""
    planned: int
    """What `plan_memory` adds up; 0 where it was not asked."""
    tensors: int = 0
    """Peak over the floor in a run of its own in which no heap keeps what is free; with a plan,
    which counts tensors."""


def measure(settings: Settings) -> Record:
    """Run every point of every curve; in float32, on a GPU in its only dtype."""
    dtype = settings.dtypes[0]
    curves = {
        name: [_run_point(name, x, dtype, settings) for x in curve.sizes(settings)]
        for name, curve in CURVES.items()
    }
    figures = [
        figure
        for name, points in curves.items()
        for figure in _compare(name, points, dtype, settings)
    ]
    return Record(
        row="growth",
        settings=settings,
        sizes={name: [asdict(point) for point in points] for name, points in curves.items()},
        figures=figures,
        headline={"time_per_prompt": "prompts: time for each, most / fewest"},
        notes=["single runs: no intervals"],
    )


def _compare(name: str, points: list[Point], dtype: str, settings: Settings) -> list[Figure]:
    few, many = points[0], points[-1]
    pace = (many.seconds / many.items) / (few.seconds / few.items)
    figures = [_figure(f"{name}: time for each, most / fewest", dtype, pace)]
    if not settings.full:
        return figures
    if CURVES[name].flat:
        grown = (many.peak - many.loaded) - (few.peak - few.loaded)
        ratio = 1 + grown / (few.peak - few.floor)
        figures.append(
            _figure(f"{name}: bytes beyond the texts, most / fewest", dtype, ratio, FLAT)
        )
    for point in points:
        if point.planned:
            slack = (point.peak - point.floor) / point.tensors
            figures.append(_figure(f"{name}: resident / tensors, {point.x}", dtype, slack))
            ratio = point.planned / point.tensors
            figures.append(_figure(f"{name}: planned bytes / tensors, {point.x}", dtype, ratio))
            error = max(ratio, 1 / ratio)
            figures.append(
                _figure(f"{name}: error of the plan, {point.x}", dtype, error, PLAN_ERROR)
            )
    return figures


def _figure(name: str, dtype: str, value: float, aim: float | None = None) -> Figure:
    return Figure(name=name, dtype=dtype, ratio=single_ratio(value), better="lower", aim=aim)


def _run_point(name: str, x: int, dtype: str, settings: Settings) -> Point:
    side = f"{name}:{x}"
    if settings.full:
        found = measure_residence("growth", side, dtype, settings)
        counted = found.counted
        if CURVES[name].flat:  # what the heap keeps differs from run to run
            found = measure_residence("growth", side, dtype, settings, mapped=True)
        (floor, loaded, _), peak = found.after, max(found.peaks[1:])
    else:
        counted = {
            key: value for step in steps(side, dtype, settings) for key, value in step.items()
        }
        floor = loaded = peak = resident_bytes()
    planned, tensors = counted["planned"], 0
    if planned:
        alone = measure_residence("growth", side, dtype, settings, mapped=True)
        tensors = max(alone.peaks[1:]) - alone.after[0]
    return Point(
        x=x,
        items=counted["items"],
        seconds=counted["microseconds"] / 1e6,
        floor=floor,
        loaded=loaded,
        peak=peak,
        planned=planned,
        tensors=tensors,
    )


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Do nothing, load, and run one point, pausing after each for the memory to be read.

    A toy goes first, so that what is imported at first use is no part of what is measured.
    """
    name, _, size = side.rpartition(":")
    if settings.full:
        _MAKERS[name](CURVES[name].toy[0], "float32", replace(settings, size="toy")).run()
    yield {}
    made = _MAKERS[name](int(size), dtype, settings)
    yield {"planned": made.planned, "items": made.items}
    began = time.perf_counter()
    made.run()
    if settings.device != "cpu":
        torch.cuda.synchronize()
    yield {"microseconds": round(1e6 * (time.perf_counter() - began))}


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one point runs."""

    run: Callable[[], object]
    items: int
    planned: int = 0
    """Bytes, where `plan_memory` was asked."""


def _stream_prompts(n: int, dtype: str, settings: Settings) -> Made:
    base = lay_views(load_hugging_face(dtype, settings), load_tokenizer(settings))
    chats = make_chats(settings, n, WORDS)
    return Made(run=lambda: _stream(base, chats, tokens=2048), items=n)


def _stream_two_layers(n: int, _dtype: str, settings: Settings) -> Made:
    toy = replace(settings, size="toy")
    base = lay_views(_random_llama(2, settings), load_tokenizer(toy))
    chats = make_chats(toy, n, WORDS)
    return Made(run=lambda: _stream(base, chats, tokens=16384), items=n)


def _stream(base: Any, chats: Any, *, tokens: int) -> object:
    return stream_activations(
        base, chats, sites="resid_post", positions="all", batching=Batching(tokens=tokens)
    )


def _compare_layers(n: int, _dtype: str, settings: Settings) -> Made:
    toy = replace(settings, size="toy")
    hf = _random_llama(n, settings, width=256 if settings.full else TOY.hidden_size)
    base = lay_views(hf, load_tokenizer(toy))
    pair = load_pair(base, Case.all_modules(hf, 1).adapter)
    chats = make_chats(toy, 64, WORDS)
    return Made(run=lambda: compare_models(pair, chats, positions="all", examples=0), items=n)


def _attach_adapters(n: int, dtype: str, settings: Settings) -> Made:
    hf = load_hugging_face(dtype, settings)
    base = lay_views(hf, load_tokenizer(settings))
    adapters = [Case.all_modules(hf, 1).adapter for _ in range(n)]
    return Made(run=lambda: [attach_adapter(base, adapter) for adapter in adapters], items=n)


def _count_latents(n: int, dtype: str, settings: Settings) -> Made:
    bench = make_bench(dtype, settings, d_sae=n)
    return Made(run=lambda: count(bench), items=n)


def _compare_tokens(n: int, dtype: str, settings: Settings) -> Made:
    chats = make_chats(settings, max(8, n // WORDS), WORDS)
    return _compare_chats(chats, Batching(tokens=n), dtype, settings)


def _compare_lengths(n: int, dtype: str, settings: Settings) -> Made:
    (short,) = TokenizedChats(make_chats(settings, 1, SHORT), load_tokenizer(settings))
    header = len(short.ids) - SHORT
    chats = make_chats(settings, max(1, LONG_BATCH // n), n - header)
    return _compare_chats(chats, Batching(tokens=LONG_BATCH), dtype, settings)


def _compare_chats(
    chats: tuple[Chat, ...], batching: Batching, dtype: str, settings: Settings
) -> Made:
    hf = load_hugging_face(dtype, settings)
    tokenizer = load_tokenizer(settings)
    pair = load_pair(lay_views(hf, tokenizer), Case.all_modules(hf, 32).adapter)
    planned = 0
    if settings.full:
        planned = plan_memory(plan_source(settings), dtype=dtype, batching=batching).comparison
    return Made(
        run=lambda: compare_models(pair, chats, positions="all", examples=0, batching=batching),
        items=sum(len(chat.ids) for chat in TokenizedChats(chats, tokenizer)),
        planned=planned,
    )


_MAKERS: dict[str, Callable[[int, str, Settings], Made]] = {
    "prompts": _stream_prompts,
    "prompts, two layers": _stream_two_layers,
    "layers": _compare_layers,
    "latents": _count_latents,
    "adapters": _attach_adapters,
    "tokens a batch": _compare_tokens,
    "tokens a chat": _compare_lengths,
}


def _random_llama(n_layers: int, settings: Settings, *, width: int = TOY.hidden_size) -> Any:
    config: Any = copy.deepcopy(TOY)
    config.num_hidden_layers, config.hidden_size = n_layers, width
    made: Any = random_model(LlamaForCausalLM, config).requires_grad_(False)
    return made.to(settings.device)


if __name__ == "__main__":
    run_alone(measure)
