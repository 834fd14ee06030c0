"""Interventions made of directions: add, ablate or cap them, where the caller says.

Nothing has a default that an experiment is about: where an ablation acts, the units of a
coefficient, the side of a cap.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from emlens.data import Positions
from emlens.interventions.intervention import WRITES, Intervention, MadeFor
from emlens.interventions.operators import Ablate, Add, Cap, Operator, PerLayer, Side
from emlens.sites import Site, SiteError, parse_site
from emlens.vectors import Direction, Directions

Units = Literal["raw", "delta_norm", "resid_norm"]
SiteLike = str | Site
At = str | Site | Sequence[SiteLike]
"""`site`: the direction's own; `writes`; a site, a bare stream, or several of these."""

_UNITS = ("raw", "delta_norm", "resid_norm")


def add_direction(
    direction: Direction | Directions,
    *,
    coefficient: float,
    units: Units,
    at: At = "site",
    positions: str | Positions = "all",
    allow_other_model: bool = False,
) -> tuple[Intervention, ...]:
    """Steer: x + coefficient * m * v^, with m what one unit is.

    Args:
        direction: one direction, or one for each layer.
        coefficient: how many units, of either sign.
        units: `raw`: m = 1, in activation units; `delta_norm`: m = |v|, the direction as it was
            estimated; `resid_norm`: m = the base's median activation norm at the direction's site.
        at: where; by default at the site that each direction was estimated at.
        positions: on which tokens.
        allow_other_model: also on weights, fine-tunes, tokenizers or processing that it was not
            made from; sites must have the axes of its own on any model.

    Raises:
        ValueError: unknown units; `resid_norm` for a direction without one, or elsewhere than at
            its own site; a site that no direction is meant for.
        ZeroVectorError: a direction of length zero, which would change nothing.

    Source: Turner et al. 2023, "Steering language models with activation engineering"
        (arXiv:2308.10248), section 3. Differs: the units of the coefficient are always named.
    """
    if units not in _UNITS:
        raise ValueError(f"units: got {units!r}, expected one of {', '.join(map(repr, _UNITS))}")

    def build(one: Direction) -> Operator:
        unit = one.direction  # which a zero vector does not have
        if units == "delta_norm":
            return Add(one.vector.double(), coefficient)
        if units == "raw":
            return Add(unit, coefficient)
        if one.resid_norm is None:
            raise ValueError(
                f"units: 'resid_norm' needs the base's median norm at {one.site}, and this "
                f"{one.provenance.construction} direction does not carry it; measure it (as "
                "fit_directions does), or give the coefficient in units='raw'"
            )
        return Add(unit * one.resid_norm, coefficient)

    if units == "resid_norm":
        _check_own_site(direction, at)
    return _place(direction, at, build, positions, allow_other_model)


def ablate_direction(
    direction: Direction | Directions,
    *,
    at: At,
    positions: str | Positions = "all",
    toward: Float[Tensor, " d"] | None = None,
    allow_other_model: bool = False,
) -> tuple[Intervention, ...]:
    """Take a direction out: x - v^ (v^ . x), or give it the component of a mean.

    Args:
        direction: one direction for all sites, or each layer's own.
        at: `site`, residual sites, or `writes`; these are different experiments, and only with
            `writes` is the direction gone from every residual stream.
        positions: on which tokens.
        toward: a mean activation; x - v^ (v^ . (x - toward)) instead.
        allow_other_model: also on weights, fine-tunes, tokenizers or processing that it was not
            made from; sites must have the axes of its own on any model.

    Raises:
        ValueError: one mean for directions of several layers, or a site that no direction is for.

    Source: Arditi et al. 2024, "Refusal in language models is mediated by a single direction"
        (arXiv:2406.11717), section 2.4 (`writes`); Soligo et al. 2025, "Convergent linear
        representations of emergent misalignment" (arXiv:2506.11618), section 3 (residual sites).
    """
    if toward is not None and isinstance(direction, Directions) and len(direction) > 1:
        raise ValueError(
            f"toward: one mean for the directions of {len(direction)} sites; give each its own: "
            "ablate_direction(directions[site], at='site', toward=mean) and join the results"
        )
    return _place(
        direction, at, lambda one: Ablate(one.direction, toward), positions, allow_other_model
    )


def cap_direction(
    direction: Direction | Directions,
    *,
    threshold: float,
    side: Side,
    at: At,
    positions: str | Positions = "all",
    allow_other_model: bool = False,
) -> tuple[Intervention, ...]:
    """Keep the component along a direction from passing a threshold.

    Args:
        direction: one direction for all sites, or each layer's own.
        threshold: of v^ . x, in activation units.
        side: `above` cuts what exceeds the threshold, `below` fills up what falls short of it.
        at: `site`, residual sites, or `writes`.
        positions: on which tokens.
        allow_other_model: also on weights, fine-tunes, tokenizers or processing that it was not
            made from; sites must have the axes of its own on any model.

    Raises:
        ValueError: an unknown side, or a site that no direction is for.
    """
    return _place(
        direction,
        at,
        lambda one: Cap(one.direction, threshold, side),
        positions,
        allow_other_model,
    )


def _place(
    direction: Direction | Directions,
    at: At,
    build: Callable[[Direction], Operator],
    positions: str | Positions,
    allow_other_model: bool,
) -> tuple[Intervention, ...]:
    """One intervention for each place named, or for each direction at its own site."""
    given = tuple(direction) if isinstance(direction, Directions) else (direction,)

    def put(
        site: SiteLike, operator: Operator | PerLayer, sources: Sequence[Direction]
    ) -> Intervention:
        # On any model a vector stays one of its own space.
        own = _made_for(sources[0])
        made_for = MadeFor(axes=own.axes) if allow_other_model else own
        return Intervention(
            site if isinstance(site, Site) or site == WRITES else _read(site),
            operator,
            positions,
            made_for=made_for,
            label=sources[0].provenance.construction,
            fit_prompts=tuple(sorted({name for one in sources for name in one.fit_prompts})),
        )

    if at == "site":
        return tuple(put(one.site, build(one), (one,)) for one in given)
    places = (at,) if isinstance(at, str | Site) else tuple(at)
    if not places:
        raise SiteError("at: got no place; expected 'site', 'writes' or at least one site")
    operator = build(given[0]) if len(given) == 1 else _per_layer(given, build)
    return tuple(put(site, operator, given) for site in places)


def _read(site: str) -> Site | str:
    """A site where one is spelt out; a bare stream stays a text until there is a model."""
    try:
        return parse_site(site)
    except SiteError:
        Site(0, site)  # a stream of the blocks, or an error that names the nearest
        return site


def _per_layer(given: Sequence[Direction], build: Callable[[Direction], Operator]) -> PerLayer:
    operators: dict[int, Operator] = {}
    for one in given:
        if one.site.layer is None or one.site.layer in operators:
            raise SiteError(
                f"at: which of the directions acts where is not clear, because of {one.site}; "
                "expected at most one a layer (or at='site', each at its own)"
            )
        operators[one.site.layer] = build(one)
    if len({_made_for(one) for one in given}) > 1:
        raise ValueError(
            "directions: they were made from different models, or at sites of different axes; "
            "place them one by one"
        )
    return PerLayer(operators)


def _made_for(direction: Direction) -> MadeFor:
    """What a direction describes; a base that is not known is one that no model has."""
    made = direction.provenance
    tuned = () if made.tuned_fingerprint is None else (made.tuned_fingerprint,)
    return MadeFor(
        weights=(made.base_fingerprint, *tuned),
        tokenizer=made.tokenizer_fingerprint,
        processing=made.processing,
        adapter=made.adapter_fingerprint or "",
        axes=direction.site.axes,
    )


def _check_own_site(direction: Direction | Directions, at: At) -> None:
    if at == "site":
        return
    places = (at,) if isinstance(at, str | Site) else tuple(at)
    own = {direction.site} if isinstance(direction, Direction) else set(direction.sites)
    elsewhere = [str(site) for site in places if site == WRITES or _read_site(site) not in own]
    if elsewhere:
        raise ValueError(
            f"units: 'resid_norm' is the median norm at a direction's own site, not at "
            f"{', '.join(elsewhere[:3])}; use at='site', or units='raw'"
        )
    if len(own) > 1:
        raise ValueError(
            f"at: got {', '.join(map(str, places))}, where each of {len(own)} directions would act "
            "in units of 'resid_norm' that belong to one; use at='site', each at its own, or pass "
            "one of them, directions[site]"
        )


def _read_site(site: SiteLike) -> Site | str:
    return site if isinstance(site, Site) else _read(site)
