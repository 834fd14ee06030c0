"""Does a latent change before the behaviour does, as the share of bad data or the training grows?

Not a finding by itself: among many latents some lead by chance, so name the latent beforehand or
confirm it on other fine-tunes. And any fine-tune moves latents: where you can, give the codes of
the careful twin at the same points as the base, or harmless changes leave the band, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.features.results import SaeHealth
from emlens.numerics.bands import Band, Lead, measure_lead, simultaneous_band


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """What was measured at every point, unit by unit, beside the base."""

    name: str
    """Such as `latent 10` or `misaligned share`."""
    units: str
    """What a unit is, such as `prompts` or `questions`."""
    base: Float[Tensor, "unit point"]
    """Of the base, or of the careful twin; one that stays is repeated at every point."""
    values: Float[Tensor, "unit point"]
    """Of the fine-tunes, for the same units."""


@dataclass(frozen=True, kw_only=True)
class EarlyWarning(Result):
    """Where a latent and a behaviour leave the base, and which does so first.

    It is made of two series and knows no codec. How well the one fits whose latent this is, whoever
    made the series may say (`health`); a search does.
    """

    kind: ClassVar[str] = "early_warning"

    axis: str
    """What the points are, such as `share of bad data` or `step`."""
    points: tuple[float, ...]
    """Where was measured, rising."""
    latent: str
    """Name of the series that may warn."""
    latent_units: str
    n_latent_units: int
    latent_band: Band
    """Mean of the latent, and where it would lie were it the base's."""
    behaviour: str
    """Name of the series that is warned of."""
    behaviour_units: str
    n_behaviour_units: int
    behaviour_band: Band
    """The same of the behaviour."""
    departures: Lead
    """First of two consecutive points outside the band, of both; and the lead of the latent."""
    level: float
    """Of bands and interval."""
    seed: int
    health: SaeHealth | None
    """How well the codec fits where the latent was read; None where nobody has looked."""

    verdict: str
    """What was seen, in words."""

    @property
    def underpowered(self) -> bool | None:
        """Whether the codec explains too little to say much; None where nobody has looked."""
        return None if self.health is None else self.health.underpowered

    def rows(self) -> list[dict[str, Any]]:
        """One row a point."""
        bands = {"latent": self.latent_band, "behaviour": self.behaviour_band}
        return [
            {self.axis: point}
            | {
                f"{name}_{what}": float(getattr(band, what)[k])
                for name, band in bands.items()
                for what in ("mean", "low", "high")
            }
            | {f"{name}_outside": bool(band.outside()[k]) for name, band in bands.items()}
            | {"underpowered": self.underpowered}
            for k, point in enumerate(self.points)
        ]


def measure_early_warning(
    latent: Series,
    behaviour: Series,
    *,
    points: Sequence[float],
    axis: str,
    level: float = 0.95,
    seed: int = 0,
    health: SaeHealth | None = None,
) -> EarlyWarning:
    """Find where a latent and a behaviour leave the base's band, and the lead with its interval.

    A series leaves at the first of two consecutive points outside a band that one no other than the
    base stays inside at all points at once, with probability `level`.

    Args:
        latent: such as mean codes by prompt (`read_latents`).
        behaviour: such as misaligned shares by question.
        points: shares of bad data or steps, rising; the same for both.
        axis: what the points are.
        level: of bands and interval.
        seed: of exchanges and resamples.
        health: how well the latent's codec fits where the latent was read (`check_sae`), at best on
            the base and the last point's fine-tune; kept beside the verdict.

    Raises:
        ValueError: points that do not rise, or not one for each column; fewer than two points; so
            few units that no series could leave its band.
        NonFiniteError: a value is NaN or infinite.
    """
    if len(points) < 2:
        raise ValueError(f"points: got {len(points)}, expected at least two, as one proves nothing")
    pairs = [(series.base, series.values) for series in (latent, behaviour)]
    departures = measure_lead(pairs[0], pairs[1], points=points, level=level, seed=seed)
    bands = [simultaneous_band(*pair, level=level, seed=seed) for pair in pairs]
    return EarlyWarning(
        axis=axis,
        points=tuple(float(point) for point in points),
        latent=latent.name,
        latent_units=latent.units,
        n_latent_units=len(latent.values),
        latent_band=bands[0],
        behaviour=behaviour.name,
        behaviour_units=behaviour.units,
        n_behaviour_units=len(behaviour.values),
        behaviour_band=bands[1],
        departures=departures,
        level=level,
        seed=seed,
        health=health,
        verdict=_decide(departures, latent.name, behaviour.name, axis=axis, last=points[-1]),
    )


def _decide(departures: Lead, latent: str, behaviour: str, *, axis: str, last: float) -> str:
    early, late, lead = departures.early, departures.late, departures.lead
    if early is None:
        return f"{latent} does not leave its band: it warns of nothing"
    if late is None or lead is None:
        return (
            f"{latent} leaves its band at {early:g}, {behaviour} not up to {last:g}: there was "
            "nothing to warn of, or it comes later"
        )
    said = f"a lead of {lead.value:g} [{lead.low:g}, {lead.high:g}] of {axis}"
    if lead.low > 0:
        return f"{said}: the latent warns"
    return f"{said}: " + ("it warns too late" if lead.high < 0 else "undecided")
