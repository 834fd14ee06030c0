"""Steer screen: what do fixed responses cost to score under N vectors added half-way up a model?

Bound: N passes through the blocks above the site, with the responses' log-probabilities, in batches
of the same size; what lies below the site would be free.
Beside it: one whole pass a vector, the same rows together, each row's vector added by a plain hook.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import describe_model, load_hugging_face, load_tokenizer, make_chats
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import Timings, median_ratio, time_sides
from benchmarks.work import Work, count_pass
from emlens.data import Batching, TokenizedChat, tokenize_chat
from emlens.models.score import count_read, read_responses
from emlens.models.shared_prompts import pad_texts
from emlens.models.suffix import score_steered
from emlens.models.views import lay_views
from emlens.sites import Site

AIM = 0.9
"""Of the bound's speed."""
CHATS = {"toy": (4, 24), "full": (4, 98)}
"""Chats and words in each; a chat of SmolLM2 has 30 tokens of header and system prompt more."""
VECTORS = {"toy": 4, "full": 16}
"""A real screen tries hundreds: what lies below the site is then nothing."""
TOGETHER = 2
"""Vectors of one pass."""
SIDES = ("emlens", "above the site", "whole passes")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One dtype's model, texts and vectors."""

    hf: Any
    model: Any
    chats: tuple[TokenizedChat, ...]
    ids: Tensor
    vectors: Tensor
    site: Site

    @property
    def first(self) -> int:
        """The first block above the site."""
        assert self.site.layer is not None
        return self.site.layer + 1

    @property
    def spread(self) -> list[Tensor]:
        """The vectors of each pass, one a row."""
        return [part.repeat_interleave(len(self.chats), 0) for part in self.vectors.split(TOGETHER)]


def measure(settings: Settings) -> Record:
    """Time all sides on the same rows and vectors, in each dtype."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    work: dict[str, Work] = {}
    sizes: dict[str, Any] = {"vectors": VECTORS[settings.size], "vectors a pass": TOGETHER}
    for dtype in settings.dtypes:
        bench = make_bench(dtype, settings)
        sides = {side: make_side(side, bench) for side in SIDES}
        _check({name: side() for name, side in sides.items()}, dtype)
        timings = time_sides(
            sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
        )
        figures += _compare(timings, dtype, settings)
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in SIDES}
        scored = sum(b - a for a, b in (chat.response or (0, 0) for chat in bench.chats))
        rows, width = bench.ids.shape
        one = count_pass(bench.hf, rows, width, logits=scored // rows)
        work[f"{dtype}: whole passes"] = one.times(len(bench.vectors))
        sizes |= describe_model(bench.hf) | {f"{dtype}: batch, pos": [rows, width]}
        sizes |= {"blocks below the site": bench.first}
    return Record(
        row="steer_screen",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={"vs_bound": "share of the bound's speed", "vs_whole": "speed of whole passes"},
        seconds=seconds,
        work=work,
        peak_sides=SIDES[:1],
    )


def _compare(timings: Timings, dtype: str, settings: Settings) -> list[Figure]:
    pairs = zip(timings.seconds["above the site"], timings.seconds["emlens"], strict=True)
    return [
        Figure(
            name="share of the bound's speed",
            dtype=dtype,
            ratio=median_ratio([bound / own for bound, own in pairs]),
            better="higher",
            aim=settings.aim(AIM),
        ),
        Figure(
            name="speed of whole passes",
            dtype=dtype,
            ratio=timings.speed("emlens", "whole passes"),
            better="higher",
        ),
    ]


def make_bench(dtype: str, settings: Settings) -> Bench:
    """Load a model, lay out its chats in one batch, draw vectors of a tenth of its stream."""
    hf = load_hugging_face(dtype, settings)
    tokenizer: Any = load_tokenizer(settings)
    model = lay_views(hf, tokenizer)
    chats = tuple(
        tokenize_chat(chat, tokenizer) for chat in make_chats(settings, *CHATS[settings.size])
    )
    ids, _ = pad_texts([chat.ids[: count_read(chat)] for chat in chats], side="right")
    site = Site(model.cfg.n_layers // 2 - 1, "resid_post")
    ids = ids.to(hf.device)
    with torch.no_grad():
        stream = model(ids, stop_at_layer=model.cfg.n_layers // 2, prepend_bos=False)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(VECTORS[settings.size], model.cfg.d_model, generator=generator)
    length = 0.1 * float(stream.float().norm(dim=-1).median())
    vectors = (drawn / drawn.norm(dim=1, keepdim=True) * length).to(ids.device)
    return Bench(hf=hf, model=model, chats=chats, ids=ids, vectors=vectors, site=site)


def make_side(side: str, bench: Bench) -> Callable[[], Tensor]:
    """Log-probabilities of the responses [vectors chats], in nats, one way or another."""
    if side == "emlens":
        batching = Batching(tokens=TOGETHER * bench.ids.numel())
        return lambda: score_steered(
            bench.model, bench.chats, site=bench.site, vectors=bench.vectors, batching=batching
        )
    if side == "above the site":
        with torch.no_grad():
            below = _run_blocks(bench, _embed(bench), 0, bench.first)
        entered = [_add(below.repeat(TOGETHER, 1, 1), part) for part in bench.spread]
        return torch.no_grad()(
            lambda: _read(bench, [_run_blocks(bench, x, bench.first) for x in entered])
        )
    return torch.no_grad()(lambda: _read(bench, [_run_hooked(bench, v) for v in bench.spread]))


def _embed(bench: Bench) -> Tensor:
    return bench.model.embed(bench.ids)


def _run_blocks(bench: Bench, resid: Tensor, start: int, stop: int | None = None) -> Tensor:
    for block in bench.model.blocks[start:stop]:
        resid = block(resid)
    return resid


def _run_hooked(bench: Bench, vectors: Tensor) -> Tensor:
    """One whole pass, each row's vector added by a hook on the way."""
    point = bench.model.hook_dict[bench.site.hook_name]
    handle = point.register_forward_hook(lambda _module, _args, out: _add(out, vectors))
    try:
        return _run_blocks(bench, _embed(bench).repeat(TOGETHER, 1, 1), 0)
    finally:
        handle.remove()


def _add(x: Tensor, vectors: Tensor) -> Tensor:
    return (x.float() + vectors[:, None]).to(x.dtype)


def _read(bench: Bench, parts: list[Tensor]) -> Tensor:
    """Sums over each response of the log-probabilities that the last blocks leave."""
    spans = [chat.response or (0, 0) for chat in bench.chats]
    firsts, sizes = [a - 1 for a, _ in spans], [b - a for a, b in spans]
    found = []
    for resid in parts:
        whole = read_responses(bench.model, resid, bench.chats * TOGETHER, firsts * TOGETHER)
        split = whole.double().view(TOGETHER, -1).split(sizes, dim=1)
        found.append(torch.stack([part.sum(1) for part in split], dim=1))
    return torch.cat(found)


def _check(scores: dict[str, Tensor], dtype: str) -> None:
    """Require the same scores of all sides, and that the vectors change something.

    Raises:
        AssertionError: timing something else is no use.
    """
    expected = scores["whole passes"]
    allowed = 1e-5 if dtype == "float32" else 0.05
    for side in SIDES[:2]:
        gap = float((scores[side] - expected).abs().max() / expected.abs().max())
        if not gap <= allowed:
            raise AssertionError(f"{side}: scores differ by {gap:.2g}, at most {allowed} allowed")
    if float(expected.std(dim=0).max()) <= allowed:
        raise AssertionError("no vector changed a score")


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then score once."""
    run = make_side(side, make_bench(dtype, settings))
    yield {}
    run()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
