"""Measure the detector of turns: how often it is wrong on paths without one, how near it comes.

    OMP_NUM_THREADS=1 python scripts/measure_transition.py [--n 200] [--window 5] [--points 130]
        [--trajectory SOURCE]

Null paths are those that the detector compares with, drawn anew, an arc that bends slowly by a
right angle from end to end and turns nowhere, which no null path knows, and runs of an optimiser
with momentum and warm-up, a checkpoint every five steps. Turns are right angles, and half of one,
at steps all along the path, with noise of a tenth of a step; those of the runs are spread over 60
steps. Windows are in checkpoints. `--trajectory` gives null paths the step lengths, straightness
and dimension of a real run instead of planted ones. A path takes about a second. The last line is
one JSON object.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from emlens.numerics.bent_paths import sample_bent_path, sample_momentum_path, sample_turn
from emlens.numerics.intervals import wilson
from emlens.numerics.null_paths import KINDS, PathShape, sample_null_paths, shape_of_path
from emlens.organisms.trajectory import AdapterTrajectory, ModuleTrajectory, load_trajectory
from emlens.organisms.transition import PhaseTransition, gram_of_trajectory, measure_transition

WIDTH = 576
"""Numbers in a planted point."""
NOISE = 0.1
"""Length of a step's noise, in steps."""
ANGLES = {"turn by 90 degrees": math.pi / 2, "turn by 45 degrees": math.pi / 4}
THRESHOLD = 0.03
EVERY = 5
"""Training steps from one checkpoint of a run with momentum to the next."""
SPREAD = 60
"""Training steps over which such a run turns."""
RUN_NOISES = (1.5, 5.0)
"""Noise of its gradients, in gradients: local cosines about -.96 and -.72 over ten steps."""
STRAIGHTNESS, DIMENSION = 0.5, 300
"""Of planted null paths."""


def wrap_paths(*paths: Tensor, every: int = 1) -> AdapterTrajectory:
    """Rank-1 adapters whose B runs along the paths [t d], a checkpoint each so many steps."""
    modules = tuple(
        ModuleTrajectory(
            name=f"model.layers.{place}.mlp.down_proj",
            scale=1.0,
            A=torch.ones(len(path), 1, 3),
            B=path[:, :, None],
        )
        for place, path in enumerate(paths)
    )
    return AdapterTrajectory(
        source="planted",
        steps=torch.arange(len(paths[0])) * every,
        modules=modules,
        logged_steps=torch.zeros(0, dtype=torch.int64),
        losses=torch.zeros(0),
        penalties=torch.zeros(0),
        gradient_norms=torch.zeros(0),
    )


def sample_nulls(shape: PathShape, n: int) -> Iterator[tuple[str, Tensor]]:
    """Kind and path, `n` of every kind."""
    for kind in KINDS:
        for seed in range(n):
            generator = torch.Generator().manual_seed(10_000 + seed)
            yield kind, sample_null_paths(shape, kind, n=1, generator=generator)[0]
    arc = torch.linspace(0, math.pi / 2, len(shape.lengths), dtype=torch.float64)
    for seed in range(n):
        yield "arc", sample_bent_path(arc, width=WIDTH, noise=NOISE, seed=seed)
    for noise in RUN_NOISES:
        for seed in range(n):
            yield f"run, noise {noise}", sample_run(len(shape.lengths), None, noise, seed)


def sample_run(moves: int, turn: int | None, noise: float, seed: int) -> Tensor:
    """Checkpoints of a run with momentum, that turns by a right angle about one of them or not."""
    steps = torch.arange(moves * EVERY, dtype=torch.float64)
    turned = torch.zeros_like(steps) if turn is None else (steps - turn * EVERY) / SPREAD + 0.5
    angles = turned.clamp(0, 1) * math.pi / 2
    return sample_momentum_path(angles, width=WIDTH, noise=noise, every=EVERY, seed=seed)


def find_turn(path: Tensor, window: int, seed: int, every: int = 1) -> PhaseTransition:
    """As a user calls it; every path is held against null paths of its own seed."""
    return measure_transition(
        wrap_paths(path, every=every), window=window * every, threshold=THRESHOLD, seed=seed
    )


def measure_false_alarms(shape: PathShape, n: int, window: int) -> list[dict[str, Any]]:
    """Share of paths without a turn on which one is declared."""
    found: dict[str, list[bool]] = {}
    for kind, path in sample_nulls(shape, n):
        place = len(found.setdefault(kind, []))
        every = EVERY if kind.startswith("run") else 1
        found[kind].append(find_turn(path, window, place, every).verdict == "turn")
    return [
        {"paths": kind, "window": window, "n": len(turns), "declared": sum(turns)}
        | dict(zip(("low", "high"), _limits(sum(turns), len(turns)), strict=True))
        for kind, turns in found.items()
    ]


def measure_hits(points: int, n: int, window: int) -> list[dict[str, Any]]:
    """Share of planted turns that are declared, and how far from where they are."""
    rows = []
    for name in (*ANGLES, *(f"run, noise {noise}" for noise in RUN_NOISES)):
        errors: list[float] = []
        every = 1 if name in ANGLES else EVERY
        for seed in range(n):
            # Anywhere but within two windows of an end.
            at = 2 * window + seed * (points - 4 * window) // n
            path = sample_turned(name, points, at, seed)
            step = find_turn(path, window, seed, every).step
            errors += [] if step is None else [abs(step / every - at)]
        row = {"paths": name, "window": window, "n": n, "declared": len(errors)}
        row |= dict(zip(("low", "high"), _limits(len(errors), n), strict=True))
        within = sum(error <= window for error in errors)
        row |= {"within the window": within, "largest error": max(errors, default=None)}
        rows.append(row | {"median error": statistics.median(errors) if errors else None})
    return rows


def sample_turned(name: str, points: int, at: int, seed: int) -> Tensor:
    """A path of a kind that turns about a point."""
    if name in ANGLES:
        return sample_turn(points, at=at, width=WIDTH, noise=NOISE, angle=ANGLES[name], seed=seed)
    return sample_run(points - 1, at, float(name.split()[-1]), seed)


def read_shape(source: str | None, points: int) -> PathShape:
    """Of a real run's B, or steps that shrink to a fifth, half straight."""
    if source is None:
        lengths = torch.linspace(1, 0.2, points - 1, dtype=torch.float64)
        return PathShape(
            lengths=lengths,
            steps=torch.arange(points),
            start=0.0,
            straightness=STRAIGHTNESS,
            dimension=DIMENSION,
        )
    trajectory = load_trajectory(source)
    width = sum(module.B[0].numel() for module in trajectory.modules)
    return shape_of_path(gram_of_trajectory(trajectory, "B"), trajectory.steps, width=width)


def _limits(count: int, n: int) -> tuple[float, float]:
    interval = wilson(count, n)
    return interval.low, interval.high


def main() -> None:
    """Measure every window, and print a line for every kind of path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--window", type=int, nargs="+", default=[5])
    parser.add_argument("--points", type=int, default=130)
    parser.add_argument("--trajectory")
    given = parser.parse_args()
    shape = read_shape(given.trajectory, given.points)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for window in given.window:
        for row in (
            *measure_false_alarms(shape, given.n, window),
            *measure_hits(given.points, given.n, window),
        ):
            rows.append(row)
            print(row, flush=True)
    kept = {"straightness": shape.straightness, "dimension": shape.dimension}
    seconds = time.perf_counter() - start
    print(json.dumps({"shape": kept, "threshold": THRESHOLD, "rows": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
