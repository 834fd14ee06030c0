"""Ablation: what does one direction out of every write cost a pass of 8 x 128 tokens?

Bound: nothing (the plain forward pass), which the folded weights should reach.
Beside it: the usual Python hooks, one function a site with two products and a difference.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import describe_model, draw_ids, load_hugging_face
from benchmarks.records import Figure, Record
from benchmarks.reference import EXACT
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import time_sides
from benchmarks.work import Work, count_pass
from emlens.interventions import Ablate, Intervention, fold_into_weights, intervene, write_sites
from emlens.models.views import lay_views

SHAPES = {"toy": (4, 32), "full": (8, 128)}
SIDES = ("plain", "emlens", "folded", "python_hooks")
MAX_COST = 1.05
"""Time under interventions over that of a plain pass."""


def measure(settings: Settings) -> Record:
    """Time all sides on the same ids, in each dtype."""
    batch, length = SHAPES[settings.size]
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    work: dict[str, Work] = {}
    sizes: dict[str, Any] = {"batch": batch, "pos": length}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        ids = draw_ids(hf, batch, length)
        sides = {side: make_side(side, hf, ids) for side in SIDES}
        _check({name: side().float() for name, side in sides.items()}, dtype)
        timings = time_sides(
            sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
        )
        aims = {"emlens": MAX_COST, "folded": MAX_COST}
        figures += [
            Figure(
                name=f"{side}: cost",
                dtype=dtype,
                ratio=timings.cost(side, "plain"),
                better="lower",
                aim=settings.aim(aims.get(side)),
            )
            for side in ("emlens", "folded", "python_hooks")
        ]
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
        work[f"{dtype}: plain"] = count_pass(hf, batch, length)
        sizes |= describe_model(hf) | {"sites": len(write_sites(lay_views(hf, None)))}
    return Record(
        row="ablate",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={side: f"{side}: cost" for side in ("emlens", "folded", "python_hooks")},
        seconds=seconds,
        work=work,
        peak_sides=SIDES,
    )


def make_side(side: str, hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A forward pass that returns logits [batch pos d_vocab], the direction taken out or not."""
    model = lay_views(hf, None)
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64)
    chosen = [Intervention("writes", Ablate(vector))]
    if side == "plain":
        return torch.inference_mode()(lambda: model(ids))
    if side == "folded":
        folded = fold_into_weights(model, chosen)
        return torch.inference_mode()(lambda: folded(ids))
    if side == "emlens":

        @torch.inference_mode()
        def run() -> Tensor:
            with intervene(model, chosen):
                return model(ids)

        return run
    unit = (vector / vector.norm()).to(model.W_E)

    def take_out(x: Tensor, hook: Any) -> Tensor:
        return x - (x @ unit)[..., None] * unit

    hooks: list[Any] = [(site.hook_name, take_out) for site in write_sites(model)]
    return torch.inference_mode()(lambda: model.run_with_hooks(ids, fwd_hooks=hooks))


def _check(logits: dict[str, Tensor], dtype: str) -> None:
    """Require the same logits of all that ablate, other ones than without.

    Raises:
        AssertionError: they differ by more than rounding; timing something else is no use.
    """
    expected = logits["python_hooks"]
    allowed = 2 * EXACT if dtype == "float32" else 0.1
    for side in ("emlens", "folded"):
        gap = float((logits[side] - expected).abs().max() / expected.abs().max())
        if not gap <= allowed:
            raise AssertionError(f"{side}: logits differ by {gap:.2g}, at most {allowed} allowed")
    if torch.equal(logits["plain"], logits["emlens"]):
        raise AssertionError("the ablation changed nothing")


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
