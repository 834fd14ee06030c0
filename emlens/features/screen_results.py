"""What steering latents did, beside random directions of the same length.

It computes nothing but changes and ranks: `screen_features` makes one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.features.results import SaeHealth, value_or_none
from emlens.numerics.intervals import Interval
from emlens.numerics.rank_test import rank_p_value

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")
"""Latents are added to the base (does it induce?) and taken from the tuned (does it repair?)."""
SIGNS = (1.0, -1.0)
"""What a strength is multiplied by on each side; also the sign of the change hoped for."""


@dataclass(frozen=True, kw_only=True)
class SampledPoint:
    """Responses sampled at one strength, or without any steering."""

    strength: float
    """In the screen's units, before the side's sign; 0 where nothing was steered."""
    n_responses: int
    n_scored: int
    """Those that both judges gave a score."""
    incoherent: float
    """Share of the scored ones; NaN where none was scored."""
    behaviour: float
    """Mean score of the coherent ones, every prompt counted the same; NaN where there is none."""
    effect: Interval | None
    """Behaviour beside the unsteered model's, mean over prompts, positive as hoped for: more on the
    base, less on the tuned; None with fewer than two prompts to compare."""


@dataclass(frozen=True, kw_only=True)
class SampledCurve:
    """One direction on one model, at every strength that was sampled."""

    side: Side
    latent: int | None
    """None for any other direction."""
    control: int | None
    """Number of the random direction; None for a latent. Neither: the mean difference."""
    points: tuple[SampledPoint, ...]
    chosen: int | None
    """Place of the largest strength, by size, whose incoherence is within the budget; of two
    equally large the one with the larger effect. None where all are out of it."""
    p: float | None
    """By rank among the controls of this stage: (1 + those at least as strong) / (controls + 1),
    each at its own largest strength. None for a control."""

    @property
    def effect(self) -> float:
        """At the chosen strength; minus infinity where none is within the budget."""
        found = None if self.chosen is None else self.points[self.chosen].effect
        return -math.inf if found is None else found.value


@dataclass(frozen=True, kw_only=True)
class FeatureScreen(Result):
    """Latents by what adding them to the base, and taking them from the tuned model, does.

    An effect is positive where it is as hoped for: misaligned responses become likelier on the
    base, less likely on the tuned model. `side` axes are base, tuned; `class` axes the misaligned
    and the aligned responses.
    """

    kind: ClassVar[str] = "feature_screen"

    base: str
    """Source of the base."""
    base_fingerprint: str
    tuned: str
    """Source of the fine-tune."""
    tuned_fingerprint: str | None
    """Of a full checkpoint."""
    adapter_fingerprint: str | None
    codec: str
    """Source of the codec."""
    codec_fingerprint: str
    site: str
    """Where the vectors were added, at every token."""
    health: SaeHealth
    """How well the codec fits both models at the response tokens of the fixed texts: where it is
    `underpowered`, what its latents write is little of what happens there."""
    latents: Int[Tensor, " latent"]
    """In the order given."""
    strengths: Float[Tensor, " strength"]
    """In units."""
    units: str
    """`delta_norm` or `resid_norm`."""
    unit_norm: float
    """What one unit is, in activation units."""
    n_texts: tuple[int, int]
    """Fixed responses: misaligned, aligned."""
    before: Float[Tensor, "side class"]
    """Mean log-probability a token of the fixed responses without steering, in nats; every response
    counts the same."""
    steered: Float[Tensor, "side class latent strength"]
    """The same under each latent."""
    controls: Float[Tensor, "side class control strength"]
    """The same under random directions of the same lengths."""
    mean_difference: Float[Tensor, "side class strength"] | None
    """The same under the mean difference of the two models, of the same lengths: what needs no
    codec. None where their means are equal."""
    sampled: tuple[SampledCurve, ...]
    """Second stage: latents, best of the first stage first, then controls, chosen by it in the same
    way; the base's first."""
    sampled_plainly: tuple[SampledCurve, ...]
    """Second stage under the mean difference, which needs no codec: base, tuned; empty where their
    means are equal or nothing was sampled."""
    sampled_before: tuple[SampledPoint, ...]
    """Second stage without steering: base, tuned; empty where there was none."""
    most_incoherent: tuple[float, ...]
    """Share of incoherent responses up to which a strength counts: on the base, on the tuned model;
    empty where none were sampled."""
    n_prompts: int
    """Prompts that responses were sampled to."""
    n_shared_prompts: int
    """Those among them that the fixed texts answer too: there latents were chosen and judged on the
    same prompts."""
    seed: int
    """Of the random directions."""

    def forced_curves(self, side: Side) -> Float[Tensor, "latent strength"]:
        """First stage: change of the log-odds of misaligned responses, in nats a token."""
        return self._change(self.steered, side)

    def control_curves(self, side: Side) -> Float[Tensor, "control strength"]:
        """The same of the random directions."""
        return self._change(self.controls, side)

    def mean_difference_curve(self, side: Side) -> Float[Tensor, " strength"] | None:
        """The same of the mean difference: latents that do less say less than it does."""
        found = self.mean_difference
        return None if found is None else self._change(found, side)

    def forced_effect(self, side: Side) -> Float[Tensor, " latent"]:
        """First stage: the largest change over the strengths."""
        return self.forced_curves(side).amax(1)

    def forced_p(self, side: Side) -> Float[Tensor, " latent"]:
        """First stage: p by rank among the controls, each at its own best strength."""
        return rank_p_value(self.forced_effect(side), self.control_curves(side).amax(1))

    def top(self, n: int, *, side: Side) -> tuple[int, ...]:
        """Return the latents with the largest effects of the first stage, largest first."""
        order = self.forced_effect(side).sort(descending=True, stable=True).indices
        return tuple(int(self.latents[place]) for place in order[:n])

    def top_controls(self, n: int, *, side: Side) -> tuple[int, ...]:
        """Return the numbers of the random directions with the largest effects of the first stage.

        What chose the latents of the second stage chooses these, or the best of many would be held
        against some of few.
        """
        effects = self.control_curves(side).amax(1)
        return tuple(effects.sort(descending=True, stable=True).indices[:n].tolist())

    @property
    def favours_latents(self) -> bool:
        """Whether a smaller share of latents than of controls went on to the second stage."""
        chance = sum(one.latent is None for one in self.sampled)
        chosen = len(self.sampled) - chance
        return chosen * self.controls.shape[2] < chance * len(self.latents)

    def curve(self, latent: int, *, side: Side) -> SampledCurve:
        """Return the second stage of a latent.

        Raises:
            KeyError: it was not sampled on that side.
        """
        for found in self.sampled:
            if found.latent == latent and found.side == side:
                return found
        raise KeyError(f"latent {latent} was not sampled on the {side}; see `sampled`")

    def rows(self) -> list[dict[str, Any]]:
        """One row a latent and side, with both stages and what the controls reached."""
        return [row for side in SIDES for row in self._rows(side)]

    def trials(self) -> list[dict[str, Any]]:
        """What was tried and what of it counts: one row a side and kind of direction.

        A trial is a direction at one strength. The first stage knows no incoherence; numbers of the
        second are None where no responses were sampled.
        """
        kinds = (
            ("latents", len(self.latents), [c for c in self.sampled if c.latent is not None]),
            ("random", self.controls.shape[2], [c for c in self.sampled if c.latent is None]),
            ("mean difference", int(self.mean_difference is not None), self.sampled_plainly),
        )
        return [
            {
                "side": side,
                "directions": kind,
                "forced": n,
                "forced_trials": n * len(self.strengths),
            }
            | self._count_trials(side, [c for c in curves if c.side == side])
            for side in SIDES
            for kind, n, curves in kinds
            if n
        ]

    def plain_rows(self) -> list[dict[str, Any]]:
        """The second stage under the mean difference, in the columns of `rows`: one row a side."""
        return [
            {"side": c.side, "latent": "mean difference", **_describe(c)}
            for c in self.sampled_plainly
        ]

    def _count_trials(self, side: Side, own: Sequence[SampledCurve]) -> dict[str, Any]:
        """What the second stage made of directions of one kind."""
        names = ("sampled", "trials", "coherent", "incoherent", "never_coherent")
        names += ("responses", "unscored", "allowed", "unsteered")
        if not self.sampled_before:
            return dict.fromkeys(names)
        place = SIDES.index(side)
        most, plain = self.most_incoherent[place], self.sampled_before[place]
        points = [point for curve in own for point in curve.points]
        coherent = sum(is_coherent(point, most_incoherent=most) for point in points)
        return {
            "sampled": len(own),
            "trials": len(points),
            "coherent": coherent,
            "incoherent": len(points) - coherent,
            "never_coherent": sum(curve.chosen is None for curve in own),
            "responses": sum(point.n_responses for point in points),
            "unscored": sum(point.n_responses - point.n_scored for point in points),
            "allowed": most,
            "unsteered": value_or_none(plain.incoherent),
        }

    def _rows(self, side: Side) -> list[dict[str, Any]]:
        effects, p = self.forced_effect(side), self.forced_p(side)
        best = self.forced_curves(side).argmax(1)
        chance, plain = self.control_curves(side).amax(1), self.mean_difference_curve(side)
        found = {c.latent: c for c in self.sampled if c.side == side and c.latent is not None}
        return [
            {
                "side": side,
                "latent": int(latent),
                "forced_effect": float(effects[k]),
                "forced_strength": float(self.strengths[best[k]]),
                "forced_p": float(p[k]),
                "controls_median": float(chance.median()),
                "controls_max": float(chance.max()),
                "mean_difference": None if plain is None else float(plain.max()),
                **_describe(found.get(int(latent))),
            }
            for k, latent in enumerate(self.latents)
        ]

    def _change(self, log_probs: Tensor, side: Side) -> Tensor:
        place = SIDES.index(side)
        now = log_probs[place, 0] - log_probs[place, 1]
        return SIGNS[place] * (now - (self.before[place, 0] - self.before[place, 1]))


def choose_point(points: tuple[SampledPoint, ...], *, most_incoherent: float) -> int | None:
    """Place of the largest strength within a budget of incoherence; None where there is none.

    Args:
        points: of one direction.
        most_incoherent: share of the scored responses.
    """
    within = [
        k for k, one in enumerate(points) if is_coherent(one, most_incoherent=most_incoherent)
    ]
    return max(within, key=lambda place: _size(points[place]), default=None)


def is_coherent(point: SampledPoint, *, most_incoherent: float) -> bool:
    """Whether responses at a strength are within a budget of incoherence; not where none is scored.

    Args:
        point: of one direction.
        most_incoherent: share of the scored responses.
    """
    # Shares of small whole numbers: rounding must not put 1 of 10 beyond .1.
    return point.incoherent <= most_incoherent + 1e-9


def rank_curves(curves: tuple[SampledCurve, ...]) -> tuple[float | None, ...]:
    """P-values of all but the controls among curves, by rank among those of the same side."""
    found: list[float | None] = []
    for curve in curves:
        chance = [c.effect for c in curves if c.side == curve.side and c.control is not None]
        if curve.control is not None or not chance:
            found.append(None)
            continue
        value = torch.tensor([curve.effect], dtype=torch.float64)
        found.append(float(rank_p_value(value, torch.tensor(chance, dtype=torch.float64))))
    return tuple(found)


def _size(point: SampledPoint) -> tuple[float, float]:
    effect = -math.inf if point.effect is None else point.effect.value
    return abs(point.strength), effect


def _describe(curve: SampledCurve | None) -> dict[str, Any]:
    names = ("strength", "incoherent", "behaviour", "effect", "effect_low", "effect_high")
    p = None if curve is None else curve.p
    empty: dict[str, Any] = {"sampled": curve is not None} | dict.fromkeys(names) | {"p": p}
    if curve is None or curve.chosen is None:
        return empty
    point = curve.points[curve.chosen]
    shown = {name: value_or_none(getattr(point, name)) for name in names[:3]}
    if point.effect is None:
        return empty | shown
    ends = ("value", "low", "high")
    found = [getattr(point.effect, end) for end in ends]
    return empty | shown | dict(zip(names[3:], found, strict=True))
