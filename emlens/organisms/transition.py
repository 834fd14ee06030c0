"""When did a fine-tune turn? The sharpest bend of a LoRA's path, beside paths on which nothing is.

It sees weights alone: whether behaviour changes at the same step is a question for
`emlens.studies.trace_transition`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.numerics.null_paths import BendSettings, measure_bends, null_prominences
from emlens.numerics.paths import (
    LocalCosine,
    find_plane_turn,
    gram_of_path,
    noise_dimension,
    path_coordinates,
)
from emlens.organisms.trajectory import AdapterTrajectory

Verdict = Literal["turn", "none", "nothing measured", "too few checkpoints"]
Score = Literal["cross", "gram"]
Centring = Literal["none", "adapters", "steps"]
FEWEST = 100
"""Checkpoints: on fewer, no statement on the sharpest bend is made."""
NULLS = 200
"""Null paths of each kind."""
LEVEL = 0.95
"""A turn is sharper than this share of the null paths of every kind."""
COMPONENTS = 3
"""Principal components of the path that are kept."""


@dataclass(frozen=True, kw_only=True)
class PhaseTransition(Result):
    """Where the path of a LoRA bends most, and whether a path of noise would bend as much."""

    kind: ClassVar[str] = "phase_transition"

    source: str
    """Of the trajectory."""
    factor: str
    """`A` or `B`, all modules laid end to end."""
    normalised: bool
    """Whether each point was divided by its norm, which takes mere growth out."""
    window: int
    """k of the local cosine, in training steps."""
    threshold: float
    """Least movement over the window, as a share of the last point's norm."""
    verdict: Verdict
    step: int | None
    """Of the turn; None where there is none, or too few checkpoints to say so."""
    prominence: float
    """Largest local cosine minus the median; NaN where no point could be kept."""
    critical: float
    """What a turn's prominence must exceed: the largest of `null_quantiles`."""
    null_quantiles: dict[str, float]
    """95th percentile of the prominence of null paths, by kind."""
    sharpest: int | None
    """Step of the largest local cosine, turn or not."""
    steps: Int[Tensor, " n"]
    """At which the local cosine could be had."""
    local_cosine: Float64[Tensor, " n"]
    """-1 straight, 0 a right angle, 1 a reversal."""
    n_uneven: int
    """Checkpoints without neighbours k steps before and after."""
    n_small: int
    """Checkpoints left out because the path moves too little there."""
    dimension: int
    """Dimensions that the noise of the path's steps spreads over."""
    all_steps: Int[Tensor, " t"]
    """Of every checkpoint."""
    norms: Float64[Tensor, " t"]
    """Of the factor."""
    coordinates: Float64[Tensor, "t 3"]
    """Principal components of the path."""
    explained: Float64[Tensor, " 3"]
    """Share of the variance along each."""
    plane_turn: int | None = None
    """Step of the point farthest from the line between the path's ends, in the plane of the first
    two components; None where none leaves it. Noise has such a point too: see `verdict`."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each point with a local cosine."""
        return [
            {"step": int(step), "local_cosine": float(cosine)}
            for step, cosine in zip(self.steps, self.local_cosine, strict=True)
        ]


def measure_transition(
    trajectory: AdapterTrajectory,
    *,
    window: int,
    threshold: float,
    factor: Literal["A", "B"] = "B",
    normalised: bool = False,
    seed: int = 0,
) -> PhaseTransition:
    """Find the sharpest bend of a LoRA's path, and whether chance explains it.

    The local cosine is lc(t) = cos(v[t-k] - v[t], v[t+k] - v[t]), with v a factor of every module
    laid end to end. A turn is declared where the largest lc stands out of the median by more than
    in 95 % of 200 null paths of each kind with the run's own step lengths: straight with noise, a
    random walk, growth alone, steps that shrink, noise that momentum has averaged since step 0.

    Args:
        trajectory: its checkpoints.
        window: k, in training steps; 5, 10 and 15 are usual.
        threshold: points whose neighbours are both nearer than this share of the last point's norm
            are left out; .03 is usual.
        factor: whose path.
        normalised: divide each point by its norm first.
        seed: of the null paths.

    Raises:
        ValueError: a window below 1 or that no checkpoints are apart, a negative threshold or
            another factor.

    Source: Turner et al. 2025, arXiv 2506.11613, section 4.
    Differs: the threshold is relative, and the peak is judged by its prominence over null paths
        (a random walk of many dimensions has local cosines near 0, like a right angle). The noise
        of null paths spreads over as many dimensions as that of the run.
    """
    if factor not in ("A", "B"):
        raise ValueError(f"factor: got {factor!r}, expected 'A' or 'B'")
    steps = trajectory.steps
    check_window(steps, window)
    gram = gram_of_trajectory(trajectory, factor)
    settings = BendSettings(window=window, threshold=threshold, normalised=normalised)
    bends = measure_bends(gram, steps, settings)
    width = sum(getattr(module, factor)[0].numel() for module in trajectory.modules)
    nulls = null_prominences(gram, steps, settings, width=width, n=NULLS, seed=seed)
    quantiles = {kind: float(found.quantile(LEVEL)) for kind, found in nulls.items()}
    critical = max(quantiles.values())
    sharpest = _sharpest(bends, steps)
    verdict = _judge(len(steps), bends, critical)
    points, shares = path_coordinates(gram, n=COMPONENTS)
    widest = find_plane_turn(gram)
    return PhaseTransition(
        source=trajectory.source,
        factor=factor,
        normalised=normalised,
        window=window,
        threshold=threshold,
        verdict=verdict,
        step=sharpest if verdict == "turn" else None,
        prominence=bends.prominence,
        critical=critical,
        null_quantiles=quantiles,
        sharpest=sharpest,
        steps=steps[bends.index],
        local_cosine=bends.cosine,
        n_uneven=bends.n_uneven,
        n_small=bends.n_small,
        dimension=noise_dimension(gram, largest=width),
        all_steps=steps,
        norms=gram.diagonal().clamp(min=0).sqrt(),
        coordinates=points,
        explained=shares,
        plane_turn=None if widest is None else int(steps[widest]),
    )


def check_window(steps: Int[Tensor, " t"], window: int) -> None:
    """Refuse a window at which no local cosine could be had.

    Args:
        steps: of the checkpoints.
        window: k, in training steps.

    Raises:
        ValueError: no checkpoint has others that many steps before and after it.
    """
    known = set(steps.tolist())
    if known and not any({step - window, step + window} <= known for step in known):
        raise ValueError(
            f"window: no checkpoint has others {window} steps before and after it; they are at "
            f"steps {steps[:4].tolist()} ...: choose a multiple of their spacing"
        )


def gram_of_trajectory(
    trajectory: AdapterTrajectory, factor: Literal["A", "B"]
) -> Float64[Tensor, "t t"]:
    """Inner products of the checkpoints of a factor, all modules together."""
    size = len(trajectory)
    found = torch.zeros(size, size, dtype=torch.float64)
    for module in trajectory.modules:
        found += gram_of_path(getattr(module, factor).flatten(1))
    return found


_SCORES: tuple[tuple[Score, Centring], ...] = (
    ("cross", "none"),  # of one adapter alone the others are 1, whatever it does
    ("gram", "none"),
    ("gram", "adapters"),
    ("gram", "steps"),
)


@dataclass(frozen=True, kw_only=True)
class LastScore:
    """How like its last step a stack of adapters is along a training, by one score."""

    score: Score
    centring: Centring
    """What was taken off first: nothing, each step's mean over the adapters (the paper), or each
    adapter's mean over the steps (the published code)."""
    steps: Int[Tensor, " t"]
    values: Float64[Tensor, " t"]
    """NaN where there is nothing to compare, as at a step whose B is zero."""


def list_last_scores(
    trajectory: AdapterTrajectory, *, factor: Literal["A", "B"] = "B"
) -> tuple[LastScore, ...]:
    """Every score of `score_against_last` that says something about a trajectory.

    Args:
        trajectory: its checkpoints.
        factor: whose.

    Returns:
        `cross`; for several adapters `gram` too, plain and with either centring. None for a rank
        above 1 or modules of several widths, which cannot be stacked.
    """
    if _find_problem(trajectory, factor, "none"):
        return ()
    kinds = _SCORES if len(trajectory.modules) > 1 else _SCORES[:1]
    return tuple(
        LastScore(
            score=score,
            centring=centring,
            steps=trajectory.steps,
            values=score_against_last(trajectory, score=score, centring=centring, factor=factor),
        )
        for score, centring in kinds
    )


def score_against_last(
    trajectory: AdapterTrajectory,
    *,
    score: Score = "cross",
    centring: Centring = "none",
    factor: Literal["A", "B"] = "B",
) -> Float64[Tensor, " t"]:
    """Compare the factors of all modules at each checkpoint with those of the last.

    With M [adapters d] the factors as rows: `cross` is <M, M'> / (||M|| ||M'||), signed; `gram` is
    ||M^T M'|| / (||M|| ||M'||), which is 1 for one adapter alone whatever it does, and which no
    rotation of M' changes. NaN at a checkpoint where M is zero.

    Args:
        trajectory: of rank 1, every module of one width.
        score: which of the two.
        centring: take off each adapter's mean over `steps`, or each step's mean over `adapters`.
        factor: whose.

    Raises:
        ValueError: a rank above 1, modules of several widths, or one adapter centred over adapters.

    Source: Turner et al. 2025, arXiv 2506.11613, section 4 (`gram`, centred over adapters; the
        published code centres over steps).
    """
    if problem := _find_problem(trajectory, factor, centring):
        raise ValueError(problem)
    parts = [getattr(module, factor).flatten(1).double() for module in trajectory.modules]
    stacked = torch.stack(parts, dim=1)  # [t adapters d]
    if centring != "none":
        stacked = stacked - stacked.mean(dim=1 if centring == "adapters" else 0, keepdim=True)
    last = stacked[-1]
    norms = stacked.flatten(1).square().sum(1).sqrt() * last.square().sum().sqrt()
    if score == "cross":
        return (stacked * last).flatten(1).sum(1) / norms
    # ||M^T M'||^2 = <M M^T, M' M'^T>: adapters by adapters instead of d by d.
    inner = stacked @ stacked.transpose(1, 2)
    return (inner * inner[-1]).flatten(1).sum(1).clamp(min=0).sqrt() / norms


def _find_problem(
    trajectory: AdapterTrajectory, factor: Literal["A", "B"], centring: Centring
) -> str:
    """Why the factors cannot be stacked; empty where they can."""
    ranks = {module.A.shape[1] for module in trajectory.modules}
    if ranks != {1}:
        return f"trajectory: ranks {sorted(ranks)}; factors are compared at rank 1"
    widths = {getattr(module, factor)[0].numel() for module in trajectory.modules}
    if len(widths) > 1:
        return (
            f"trajectory: modules of widths {sorted(widths)} cannot be stacked; expected one, as "
            "where down_proj alone is adapted"
        )
    if centring == "adapters" and len(trajectory.modules) == 1:
        return "centring: one adapter less its own mean is zero; expected 'steps'"
    return ""


def _sharpest(bends: LocalCosine, steps: Tensor) -> int | None:
    if not len(bends.cosine):
        return None
    return int(steps[bends.index[bends.cosine.argmax()]])


def _judge(n_checkpoints: int, bends: LocalCosine, critical: float) -> Verdict:
    if n_checkpoints < FEWEST:
        return "too few checkpoints"
    if not len(bends.cosine):
        return "nothing measured"
    return "turn" if bends.prominence > critical else "none"
