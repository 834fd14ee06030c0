"""Pair diff: what does comparing a base and its fine-tune cost, inside and at the output?

Bound: (l0 + 2 (L - l0)) / 2L of two prefills, where l0 of L layers come before the adapter, plus
the adapter's own multiplications on the tuned half, plus one rank-32 sketch a layer, plus both
models' log-probabilities. Each part is timed by itself in the same run. A merged fine-tune has no
multiplications of its own.
Beside it: two ``run_with_cache`` passes of TransformerLens's own loading, and two Hugging Face
passes with ``output_hidden_states``; neither reduces what it has read.

Every token is counted (positions ``all``), the worst case for sketches and log-probabilities.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters import Case, make_cases, multiply_adapter
from benchmarks.models import describe_model, load_hugging_face, load_tokenizer, make_chats
from benchmarks.peers import find_peers, load_own_way, merge_plainly
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import Ratio, Timings, median_ratio, time_sides
from benchmarks.work import Work, count_pass
from emlens.activations import plan_reading
from emlens.data import Batching, Chat
from emlens.diffing.compare import compare_models
from emlens.diffing.results import ModelDiff
from emlens.models.loading import Form
from emlens.models.pair import ModelPair, load_pair
from emlens.models.unembed import log_prob_slices
from emlens.models.views import lay_views
from emlens.numerics.predictions import compare_predictions
from emlens.numerics.sketch import CovarianceSketch

AIM = 1.05
WIDE_AIM = 1.10
"""Of an adapter of rank `WIDE` or more."""
WIDE = 32
CHATS = {"toy": (4, 24), "full": (8, 98)}
"""Chats and words in each; a chat of SmolLM2 has 30 tokens of header and system prompt more."""
PARTS = ("prefill", "sketches", "log-probabilities")
CHECKED = "nine down_proj, rank 1"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One dtype's models and texts."""

    hf: Any
    base: Any
    chats: tuple[Chat, ...]
    ids: Tensor
    mask: Tensor
    cases: tuple[Case, ...]

    def compare(self, pair: ModelPair) -> ModelDiff:
        """The call that is measured."""
        return compare_models(pair, self.chats, positions="all", examples=0)


def measure(settings: Settings) -> Record:
    """Time the comparison of every adapter and form, the parts of the bound, and both peers."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    work: dict[str, Work] = {}
    notes: list[str] = []
    sizes: dict[str, Any] = {}
    for dtype in settings.dtypes:
        bench = make_bench(dtype, settings)
        sizes |= describe_model(bench.hf) | {f"{dtype}: batch, pos": list(bench.ids.shape)}
        figures += _measure_dtype(bench, dtype, settings, seconds, notes)
        work[f"{dtype}: prefill"] = count_pass(bench.hf, *bench.ids.shape, logits=0)
        one = count_pass(bench.hf, 1, 1).flops - count_pass(bench.hf, 1, 1, logits=0).flops
        logits = Work(flops=2 * bench.ids.numel() * one, bytes=0)
        work[f"{dtype}: log-probabilities"] = logits
    name = _figure_name(CHECKED, "attached")
    return Record(
        row="pair_diff",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            "over_bound": name,
            "vs_huggingface": f"{CHECKED}: vs_huggingface",
        },
        seconds=seconds,
        work=work,
        notes=tuple(dict.fromkeys(notes)),
        peak_sides=("emlens", "transformer_lens"),
    )


def make_bench(dtype: str, settings: Settings) -> Bench:
    """Load a base and lay out its chats in one batch without padding."""
    hf = load_hugging_face(dtype, settings)
    base = lay_views(hf, load_tokenizer(settings))
    chats = make_chats(settings, *CHATS[settings.size])
    cases = make_cases(hf, settings)
    pair = load_pair(base, cases[0].adapter)
    plan = plan_reading(pair, chats, sites="resid_post", positions="all", batching=Batching())
    (batch,) = plan.pad("laying out")
    assert bool(batch.mask.all()), "chats of equal length were meant"
    return Bench(
        hf=hf, base=base, chats=chats, ids=batch.ids.to(hf.device), mask=batch.mask, cases=cases
    )


def _measure_dtype(
    bench: Bench, dtype: str, settings: Settings, seconds: dict[str, float], notes: list[str]
) -> list[Figure]:
    pairs = {
        (case.name, form): load_pair(bench.base, case.adapter, form=form)
        for case in bench.cases
        for form in choose_forms(case, settings)
    }
    found = bench.compare(pairs[CHECKED, "attached"])
    sides: dict[str, Callable[[], object]] = {
        f"{name}, {form}": (lambda pair=pair: bench.compare(pair))
        for (name, form), pair in pairs.items()
    }
    sides |= {f"adapter of {c.name}": _multiply(bench, c) for c in bench.cases}
    sides |= make_parts(bench) | {"huggingface": _two_hidden_states(bench)}
    sides |= find_peers({"transformer_lens": lambda: _cache_twice(bench, found)}, notes)
    timings = time_sides(
        sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
    )
    seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
    return [
        *(
            Figure(
                name=_figure_name(case.name, form),
                dtype=dtype,
                ratio=over_bound(timings, case, form, bench.base.cfg.n_layers),
                better="lower",
                aim=settings.aim(WIDE_AIM if case.rank >= WIDE else AIM),
            )
            for case in bench.cases
            for form in ("attached", "merged")
            if (case.name, form) in pairs
        ),
        *(
            Figure(
                name=f"{CHECKED}: vs_{peer}",
                dtype=dtype,
                ratio=timings.speed(f"{CHECKED}, attached", peer),
                better="higher",
            )
            for peer in ("transformer_lens", "huggingface")
            if peer in timings.seconds
        ),
    ]


def choose_forms(case: Case, settings: Settings) -> tuple[Form, ...]:
    """The forms in which a case is compared; merged only where it changes every layer.

    On a GPU the widest alone: a merged model costs the same at any rank, and each is a second copy
    of nearly all weights beside the base's.
    """
    if case.first_layer or (settings.device != "cpu" and case.rank < WIDE):
        return ("attached",)
    return ("attached", "merged")


def _figure_name(case: str, form: str) -> str:
    return f"{case}, {form} / bound"


def over_bound(timings: Timings, case: Case, form: str, n_layers: int) -> Ratio:
    """Time of a comparison over the sum of its bound's parts, round by round."""
    passes = (case.first_layer + 2 * (n_layers - case.first_layer)) / n_layers
    seconds = timings.seconds
    found = []
    for index, spent in enumerate(seconds[f"{case.name}, {form}"]):
        prefill, sketches, logits = (seconds[part][index] for part in PARTS)
        adapter = seconds[f"adapter of {case.name}"][index] if form == "attached" else 0.0
        found.append(spent / (passes * prefill + adapter + sketches + logits))
    return median_ratio(found)


def make_parts(bench: Bench) -> dict[str, Callable[[], object]]:
    """The parts of the bound that all adapters share, and one that is in no bound."""
    base, n = bench.base, bench.ids.numel()
    n_layers, width = base.cfg.n_layers, base.cfg.d_model
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(n, width, generator=generator).to(bench.hf.device)
    with torch.no_grad():
        resid = base(bench.ids, stop_at_layer=n_layers).flatten(0, 1)
        both = torch.cat([resid, resid])
        log_p = torch.cat([log for _, log in log_prob_slices(base, resid)])

    def sketch() -> None:
        for _ in range(n_layers):
            CovarianceSketch(width, rank=32).update(change)

    def log_probabilities() -> None:
        for _ in log_prob_slices(base, both):
            pass

    sides: dict[str, Callable[[], object]] = {
        "prefill": lambda: base(bench.ids, stop_at_layer=n_layers),
        "sketches": sketch,
        "log-probabilities": log_probabilities,
        "divergences (in no bound)": lambda: compare_predictions(log_p, log_p),
    }
    return {name: torch.no_grad()(side) for name, side in sides.items()}


def _multiply(bench: Bench, case: Case) -> Callable[[], None]:
    return multiply_adapter(bench.hf, case.adapter, bench.ids.numel())


@torch.no_grad()
def cache_residuals(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every layer's resid_post, the usual way."""
    logits, cache = model.run_with_cache(
        ids, names_filter=lambda name: name.endswith("hook_resid_post")
    )
    return logits, dict(cache)


def _cache_twice(bench: Bench, found: ModelDiff) -> Callable[[], object]:
    """Two cached passes, by which a comparison of ours is checked first."""
    nine = next(case for case in bench.cases if case.name == CHECKED)
    own = load_own_way(bench.hf)
    check_difference(found, own, load_own_way(merge_plainly(bench.hf, nine.adapter)), bench.ids)
    # The time depends on shapes alone: the base stands for its fine-tune, which is let go.
    return lambda: [cache_residuals(own, bench.ids) for _ in range(2)]


def _two_hidden_states(bench: Bench) -> Callable[[], object]:
    # The base stands for its fine-tune here too.
    @torch.no_grad()
    def run() -> object:
        return [bench.hf(bench.ids, use_cache=False, output_hidden_states=True) for _ in range(2)]

    return run


def check_difference(diff: ModelDiff, own: Any, tuned: Any, ids: Tensor) -> None:
    """Require the mean change of every layer, and both divergences, of two cached passes.

    Raises:
        AssertionError: the comparison that is about to be timed gives another answer.
    """
    (logits, cache), (logits_tuned, cache_tuned) = (cache_residuals(m, ids) for m in (own, tuned))
    expected = torch.stack(
        [(cache_tuned[n].double() - cache[n].double()).mean((0, 1)) for n in cache]
    )
    found = (diff.activations.mean_tuned - diff.activations.mean_base)[:, 0]
    # In bfloat16 the two ways round differently at every layer.
    allowed = 1e-3 if logits.dtype == torch.float32 else 0.2
    gap = float((found - expected.cpu()).norm() / expected.norm())
    if not gap <= allowed:
        raise AssertionError(f"mean changes differ by {gap:.2g} of their norm, at most {allowed}")
    log_p, log_q = (x.float().log_softmax(-1)[:, :-1] for x in (logits, logits_tuned))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    if not abs(diff.logits.kl_base_tuned - kl) <= allowed * kl + 1e-6:
        raise AssertionError(f"divergence {diff.logits.kl_base_tuned:.4g}, two passes {kl:.4g}")


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load two models, then compare them once, or cache both."""
    bench = make_bench(dtype, settings)
    nine = next(case for case in bench.cases if case.name == CHECKED)
    if side == "emlens":
        pair = load_pair(bench.base, nine.adapter)
        yield {}
        bench.compare(pair)
    else:
        models = load_own_way(bench.hf), load_own_way(copy.deepcopy(bench.hf))
        yield {}
        kept = [cache_residuals(model, bench.ids) for model in models]
        del kept
    yield {}


if __name__ == "__main__":
    run_alone(measure)
