"""Decode: how fast are 32 greedy tokens after a prompt of 32, for one row and for 32?

Bound: the bare multiplications of the prompt and then of every further token, timed in the same
rounds (reading the cache comes on top); and for a step alone, which is the time of all tokens less
that of the first, the bytes of weights and cache over the rate at which the machine reads memory.
Beside it: Hugging Face generate (sdpa attention) and TransformerLens's own loading and generate.
Neither side looks for an end of text.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import read_memory
from benchmarks.models import (
    describe_model,
    draw_ids,
    linear_weights,
    load_hugging_face,
    sweep_weights,
)
from benchmarks.peers import find_peers, generate_hugging_face, generate_own_way, load_own_way
from benchmarks.records import Figure, Record
from benchmarks.reference import check_tokens
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import Timings, time_sides
from benchmarks.work import Work, count_decode, count_pass
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.packed_weights import PackedWeights
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
    work: dict[str, Work] = {}
    notes: list[str] = []
    batches = settings.batches(BATCHES[settings.size])
    sizes: dict[str, Any] = {"prompt": PROMPT, "new": n, "batch": batches}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        makers = {side: make_side(side, hf) for side in SIDES[:2]}
        makers |= find_peers({side: partial(make_side, side, hf) for side in SIDES[2:]}, notes)
        reading, read = read_memory(settings)
        for batch in batches:
            ids = draw_ids(hf, batch, PROMPT)
            sides = {side: make(ids, n) for side, make in makers.items()}
            _check(sides, hf, ids)
            timings = time_sides(
                sides
                | {
                    "bound": sweep_tokens(hf, batch, n),
                    "first token": makers["emlens"](ids, 1),
                    "reading": reading,
                },
                rounds=settings.rounds,
                device=settings.device,
                clock=settings.read_clock,
            )
            timings = timings.derived("step", lambda found, n=n: step_seconds(found, n))
            step = count_pass(hf, batch, 1, held=PROMPT + n // 2)
            figures += _compare(timings, dtype, batch, settings)
            figures.append(
                Figure(
                    name=f"batch {batch}: step, share of the machine's bytes/s",
                    dtype=dtype,
                    ratio=timings.share("step", step.bytes, "reading", read),
                    better="higher",
                )
            )
            case = f"batch {batch}, {dtype}"
            seconds |= {f"{case}: {side}": timings.median(side) for side in timings.seconds}
            work |= {f"{case}: {side}": count_decode(hf, batch, PROMPT, n) for side in sides}
            work |= {f"{case}: step": step, f"{case}: reading": Work(flops=0, bytes=read)}
    return Record(
        row="decode",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            f"vs_{peer}": f"batch {batches[0]}: vs_{peer}" for peer in ("huggingface", "bound")
        },
        seconds=seconds,
        work=work,
        peak_sides=SIDES,
        notes=tuple(dict.fromkeys(notes)),
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
    for side in sides.keys() - {"huggingface"}:
        check_tokens(sides[side](), theirs, hf, ids)


def sweep_tokens(hf: Any, batch: int, n: int) -> Callable[[], None]:
    """The multiplications of the prompts, unembedded at their end, and of n - 1 further tokens."""
    *blocks, unembed = linear_weights(hf)
    prompts, first = sweep_weights(blocks, batch * PROMPT), sweep_weights([unembed], batch)
    step = sweep_weights([*blocks, unembed], batch)

    def sweep() -> None:
        with PackedWeights().used():  # as generation has them
            prompts()
            first()
            for _ in range(n - 1):
                step()

    return sweep


def step_seconds(found: Mapping[str, float], n: int) -> float:
    """A decode step's seconds: those of n tokens less those of the first, which is the prompt's."""
    return max(found["emlens"] - found["first token"], 1e-9) / (n - 1)


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
        if peer in timings.seconds
    ]


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then decode the most rows that are timed, pausing for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    batch = max(settings.batches(BATCHES[settings.size]))
    decode = make_side(side, hf)(draw_ids(hf, batch, PROMPT), NEW[settings.size])
    yield {}
    decode()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
