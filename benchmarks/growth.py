"""Growth: how do time and peak memory grow with prompts, layers, adapters and tokens a batch?

Bound: straight lines. Memory should not grow with prompts at all.
Beside it: what `emlens doctor --plan` says beforehand, for the comparison of two models.

At full size each point is a process of its own, and
``python scripts/draw_growth.py SUITE.json OUT.html`` draws them.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlamaForCausalLM

from benchmarks.adapters import Case
from benchmarks.memory import measure_residence, resident_bytes
from benchmarks.models import TOY, load_hugging_face, load_tokenizer, make_chats, random_model
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import exact_ratio
from emlens.activations import stream_activations
from emlens.data import Batching
from emlens.diffing.compare import compare_models
from emlens.models.attach import attach_adapter
from emlens.models.memory import plan_memory
from emlens.models.pair import load_pair
from emlens.models.views import lay_views

WORDS = 32
"""Of each chat; its header comes on top."""
FLAT = 1.05
"""Largest peak over the smallest, where memory should not grow."""


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
    "prompts": Curve(toy=(8, 32), full=(10, 100, 1000), flat=True),
    "prompts, two layers": Curve(toy=(8, 64), full=(100, 1000, 10_000, 100_000), flat=True),
    "layers": Curve(toy=(2, 4), full=(4, 8, 16, 32)),
    "adapters": Curve(toy=(1, 4), full=(1, 4, 16, 64)),
    "tokens a batch": Curve(toy=(64, 256), full=(512, 2048, 8192)),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of one curve."""

    x: int
    seconds: float
    floor: int
    """Resident bytes before anything is loaded."""
    loaded: int
    """And after."""
    peak: int
    planned: int
    """What `plan_memory` adds up; 0 where it was not asked."""


def measure(settings: Settings) -> Record:
    """Run every point of every curve in float32."""
    curves = {
        name: [_run_point(name, x, settings) for x in curve.sizes(settings)]
        for name, curve in CURVES.items()
    }
    figures = [
        figure for name, points in curves.items() for figure in _compare(name, points, settings)
    ]
    return Record(
        row="growth",
        settings=settings,
        sizes={name: [asdict(point) for point in points] for name, points in curves.items()},
        figures=figures,
        headline={"time_per_prompt": "prompts: time for each, most / fewest"},
        notes=["single runs: no intervals"],
    )


def _compare(name: str, points: list[Point], settings: Settings) -> list[Figure]:
    few, many = points[0], points[-1]
    pace = (many.seconds / many.x) / (few.seconds / few.x)
    figures = [_figure(f"{name}: time for each, most / fewest", pace)]
    if not settings.full:
        return figures
    if CURVES[name].flat:
        ratio = (many.peak - many.floor) / (few.peak - few.floor)
        figures.append(_figure(f"{name}: bytes over the floor, most / fewest", ratio, FLAT))
    figures += [
        _figure(f"{name}: planned bytes / measured, {p.x}", p.planned / (p.peak - p.floor))
        for p in points
        if p.planned
    ]
    return figures


def _figure(name: str, value: float, aim: float | None = None) -> Figure:
    return Figure(name=name, dtype="float32", ratio=exact_ratio(value), better="lower", aim=aim)


def _run_point(name: str, x: int, settings: Settings) -> Point:
    side = f"{name}:{x}"
    if settings.full:
        found = measure_residence("growth", side, "float32", settings)
        (floor, loaded, _), peak, counted = found.after, found.peak, found.counted
    else:
        counted = {
            key: value for step in steps(side, "float32", settings) for key, value in step.items()
        }
        floor = loaded = peak = resident_bytes()
    return Point(
        x=x,
        seconds=counted["microseconds"] / 1e6,
        floor=floor,
        loaded=loaded,
        peak=peak,
        planned=counted["planned"],
    )


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Do nothing, load, and run one point, pausing after each for the memory to be read."""
    name, _, size = side.rpartition(":")
    yield {}
    run, planned = _MAKERS[name](int(size), dtype, settings)
    yield {"planned": planned}
    began = time.perf_counter()
    run()
    yield {"microseconds": round(1e6 * (time.perf_counter() - began))}


Made = tuple[Callable[[], object], int]


def _stream_prompts(n: int, dtype: str, settings: Settings) -> Made:
    base = lay_views(load_hugging_face(dtype, settings), load_tokenizer(settings))
    chats = make_chats(settings, n, WORDS)
    return lambda: _stream(base, chats, tokens=2048), 0


def _stream_two_layers(n: int, _dtype: str, settings: Settings) -> Made:
    toy = Settings(size="toy", threads=settings.threads)
    base = lay_views(_random_llama(2), load_tokenizer(toy))
    chats = make_chats(toy, n, WORDS)
    return lambda: _stream(base, chats, tokens=16384), 0


def _stream(base: Any, chats: Any, *, tokens: int) -> object:
    return stream_activations(
        base, chats, sites="resid_post", positions="all", batching=Batching(tokens=tokens)
    )


def _compare_layers(n: int, _dtype: str, settings: Settings) -> Made:
    toy = Settings(size="toy", threads=settings.threads)
    hf = _random_llama(n, width=256 if settings.full else TOY.hidden_size)
    base = lay_views(hf, load_tokenizer(toy))
    pair = load_pair(base, Case.all_modules(hf, 1).adapter)
    chats = make_chats(toy, 64, WORDS)
    return lambda: compare_models(pair, chats, positions="all", examples=0), 0


def _attach_adapters(n: int, dtype: str, settings: Settings) -> Made:
    hf = load_hugging_face(dtype, settings)
    base = lay_views(hf, load_tokenizer(settings))
    adapter = Case.all_modules(hf, 1).adapter
    return lambda: [attach_adapter(base, adapter) for _ in range(n)], 0


def _compare_tokens(n: int, dtype: str, settings: Settings) -> Made:
    hf = load_hugging_face(dtype, settings)
    base = lay_views(hf, load_tokenizer(settings))
    pair = load_pair(base, Case.all_modules(hf, 32).adapter)
    batching = Batching(tokens=n)
    chats = make_chats(settings, max(8, n // WORDS), WORDS)
    planned = 0
    if settings.full:
        planned = plan_memory("emlens:smollm2", dtype=dtype, batching=batching).comparison
    return (
        lambda: compare_models(pair, chats, positions="all", examples=0, batching=batching),
        planned,
    )


_MAKERS: dict[str, Callable[[int, str, Settings], Made]] = {
    "prompts": _stream_prompts,
    "prompts, two layers": _stream_two_layers,
    "layers": _compare_layers,
    "adapters": _attach_adapters,
    "tokens a batch": _compare_tokens,
}


def _random_llama(n_layers: int, *, width: int = TOY.hidden_size) -> Any:
    config: Any = copy.deepcopy(TOY)
    config.num_hidden_layers, config.hidden_size = n_layers, width
    return random_model(LlamaForCausalLM, config).requires_grad_(False)


if __name__ == "__main__":
    run_alone(measure)
