"""Directions: vectors at sites, each with how it was made; not for weights or for activations.

Fitted, imported and random vectors are all `Direction`s, so that a control goes everywhere that
the estimate goes.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.numerics.projection import unit_vectors
from emlens.numerics.validation import WidthError, ZeroVectorError, check_finite
from emlens.prompt_sets import check_prompt_sets
from emlens.sites import Site, SiteError, parse_site

CONSTRUCTIONS = (
    "data",
    "data@tuned",
    "data@base",
    "model@positive",
    "model@negative",
    "both",
    "imported",
    "trained",
    "random:isotropic",
    "random:covariance",
    "shuffled",
)
"""How a vector can have been made; the first six are differences of means, a `trained` one is what
a fine-tune learnt to add at its site."""
UNPROCESSED = "unprocessed"
"""Weights as the checkpoint holds them."""

ControlKind = Literal["covariance", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a vector was made.

    Raises:
        ValueError: a construction that is not one of `CONSTRUCTIONS`.
    """

    construction: str
    """One of `CONSTRUCTIONS`."""
    positions: str | None = None
    """Which tokens were averaged, such as `response`; None where none were."""
    weighting: Literal["token", "response"] | None = None
    """Whether every token or every response counted the same."""
    n_positive: int = 0
    """Texts of the positive class (misaligned, where that is the question)."""
    n_negative: int = 0
    """Texts of the negative class."""
    n_tokens_positive: int = 0
    """Tokens averaged in the positive class."""
    n_tokens_negative: int = 0
    """Tokens averaged in the negative class."""
    base_fingerprint: str = ""
    """Of the base's weights; of the only model's for `data`. Empty where it is not known."""
    tuned_fingerprint: str | None = None
    """Of a fully fine-tuned model's weights."""
    adapter_fingerprint: str | None = None
    """Of the LoRA that makes the tuned model, or was attached to the only one."""
    tokenizer_fingerprint: str = ""
    """Of vocabulary and chat template; empty where it is not known."""
    processing: str = UNPROCESSED
    """Of the weights: emlens never folds norms or centres weights on loading."""
    dtype: str = ""
    """In which the models ran; empty where it is not known."""
    interventions: tuple[str, ...] = ()
    """What acted on the models meanwhile, one JSON object each; vectors by their hashes, `model`
    is `base` or `tuned` of a pair."""
    seed: int | None = None
    """Of a random vector."""
    note: str = ""
    """What a reader should know: where an imported vector came from, names of models."""

    def __post_init__(self) -> None:
        if self.construction not in CONSTRUCTIONS:
            near = difflib.get_close_matches(self.construction, CONSTRUCTIONS, n=3, cutoff=0.0)
            raise ValueError(
                f"construction: {self.construction!r} is not known; nearest: {', '.join(near)}"
            )

    @property
    def is_control(self) -> bool:
        """Whether the vector is random, made to be compared with."""
        return self.construction.startswith("random:") or self.construction == "shuffled"


@dataclass(frozen=True, kw_only=True)
class Direction(Result):
    """A vector at a site, of the norm it was estimated with, and how it was made.

    Raises:
        WidthError: the vector has not exactly one axis, or no entry.
        NonFiniteError: it holds NaN or infinity.
        ValueError: `resid_norm` is not positive.
    """

    kind: ClassVar[str] = "direction"

    site: Site
    """Where it lives."""
    vector: Float[Tensor, " d"]
    """The raw estimate, in activation units."""
    resid_norm: float | None = None
    """Median norm of the base's activations at the site; None where nobody measured it."""
    split_half_cosine: float | None = None
    """Cosine between the estimates from two halves of the texts; None where there are none."""
    fit_prompts: tuple[str, ...] = field(default=(), repr=False)
    """Sorted hashes of the prompts that it was fitted on, if any; `evaluate` asks none of them."""
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or not len(self.vector):
            raise WidthError(
                f"vector at {self.site} has shape {tuple(self.vector.shape)}, expected [d]: "
                "one direction is one row"
            )
        check_finite(f"vector at {self.site}", self.vector)
        if self.resid_norm is not None and not self.resid_norm > 0:
            raise ValueError(f"resid_norm: got {self.resid_norm}, expected a positive norm or None")

    @property
    def width(self) -> int:
        """Number of entries."""
        return len(self.vector)

    @property
    def norm(self) -> float:
        """Norm of the raw estimate."""
        return float(torch.linalg.vector_norm(self.vector.double()))

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """The unit vector, in float64.

        Raises:
            ZeroVectorError: the estimate is zero, so that it points nowhere.
        """
        if not bool(self.vector.any()):
            raise ZeroVectorError(
                f"the vector at {self.site} ({self.provenance.construction}) is zero and has no "
                "direction: the two means it was made from are the same there"
            )
        return unit_vectors(self.vector.double())

    def __eq__(self, other: object) -> bool:
        """Same site, vector and everything else; tensors entry by entry."""
        if not isinstance(other, Direction):
            return NotImplemented
        return self._labels == other._labels and torch.equal(self.vector, other.vector)

    def __hash__(self) -> int:
        return hash(self._labels)

    @property
    def _labels(self) -> tuple[object, ...]:
        known = (self.resid_norm, self.split_half_cosine, self.fit_prompts)
        return (self.site, *known, self.provenance)

    def rows(self) -> list[dict[str, Any]]:
        """One row: site, norms, split-half cosine, how it was made."""
        made = dataclasses.asdict(self.provenance)
        return [
            {
                "site": str(self.site),
                "norm": self.norm,
                "resid_norm": self.resid_norm,
                "relative_norm": None if self.resid_norm is None else self.norm / self.resid_norm,
                "split_half_cosine": self.split_half_cosine,
                **{name: made[name] for name in ("construction", "positions", "weighting")},
                **{name: made[name] for name in ("n_positive", "n_negative")},
            }
        ]


@dataclass(frozen=True, kw_only=True)
class Directions(Result):
    """One direction a site, with the random ones that every use of them is compared with.

    Looked up by site: `directions["resid_post.14"]`; iterating yields them in order.

    Raises:
        ValueError: no direction, a site twice, or tensors that do not fit the directions.
        OverlappingPromptsError: one prompt in two of the prompt sets.
    """

    kind: ClassVar[str] = "directions"

    directions: tuple[Direction, ...]
    """In the model's order."""
    covariance_matched: Float[Tensor, "site k d"] | None = None
    """Random vectors with the activations' own covariance at each site."""
    shuffled: Float[Tensor, "site m d"] | None = None
    """The same estimates with labels dealt at random; their norms are those of chance."""
    top3_share: Float[Tensor, " site"] | None = None
    """Share of each squared direction in the three dimensions of largest variance."""
    prompt_sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Use (`fit`, `choose`, `evaluate`) -> sorted hashes of its prompts; no two share one."""

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("directions: got none, expected at least one")
        for index, site in enumerate(self.sites):
            if site in self.sites[:index]:
                raise ValueError(f"directions: {site} is there twice, expected one a site")
        self._check_controls("covariance_matched", self.covariance_matched)
        self._check_controls("shuffled", self.shuffled)
        if self.top3_share is not None and self.top3_share.shape != (len(self.directions),):
            raise WidthError(
                f"top3_share has shape {tuple(self.top3_share.shape)}, expected "
                f"[{len(self.directions)}]: one value a site"
            )
        check_prompt_sets(self.prompt_sets)
        if "fit" in self.prompt_sets:  # known to each that is taken out, too
            linked = _with_fit_prompts(self.directions, self.prompt_sets["fit"])
            object.__setattr__(self, "directions", linked)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the directions live, in order."""
        return tuple(direction.site for direction in self.directions)

    def __len__(self) -> int:
        return len(self.directions)

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.directions)

    def __contains__(self, site: object) -> bool:
        return any(site in (own, str(own), own.hook_name) for own in self.sites)

    def __getitem__(self, site: str | Site) -> Direction:
        """Return the direction at a site.

        Raises:
            SiteError: there is none; the nearest three sites that have one are listed.
        """
        return self.directions[self.index(site)]

    def index(self, site: str | Site) -> int:
        """Return a site's place in `directions` and on the first axis of the tensors.

        Raises:
            SiteError: there is no direction there; the nearest three sites that have one are
                listed.
        """
        try:
            wanted = parse_site(site) if isinstance(site, str) else site
            return self.sites.index(wanted)
        except ValueError as error:  # a SiteError is one
            names = [str(own) for own in self.sites]
            near = ", ".join(difflib.get_close_matches(str(site), names, n=3, cutoff=0.0))
            raise SiteError(f"site: there is no direction at {site}; nearest: {near}") from error

    def share_in_large_dimensions(self, site: str | Site) -> float | None:
        """Share of a squared direction in the three dimensions of largest variance, if known."""
        return None if self.top3_share is None else float(self.top3_share[self.index(site)])

    def controls(self, kind: ControlKind) -> tuple["Directions", ...]:
        """Return the random directions, each as long as the estimate at its site.

        Sites whose estimate is zero are left out: nothing is as long, and nothing to compare with.

        Args:
            kind: `covariance`: drawn with the activations' covariance; `shuffled`: fitted on
                labels dealt at random.

        Raises:
            ValueError: an unknown kind, or directions that carry none of it.
            ZeroVectorError: every estimate is zero; or a random vector is zero although the
                estimate is not: the activations do not vary at its site.
        """
        made = {"covariance": "random:covariance", "shuffled": "shuffled"}
        if kind not in made:
            raise ValueError(f"kind: got {kind!r}, expected 'covariance' or 'shuffled'")
        rows = self.covariance_matched if kind == "covariance" else self.shuffled
        if rows is None:
            raise ValueError(
                f"kind: these directions carry no {kind} controls: fit_directions makes them, "
                "imported directions have none"
            )
        alive = [index for index, own in enumerate(self.directions) if bool(own.vector.any())]
        if not alive:
            raise ZeroVectorError(
                f"directions: all {len(self)} are zero, and no control is as long; what they were "
                "made from is the same at every site"
            )
        return tuple(
            Directions(
                directions=tuple(
                    _as_control(self.directions[index], rows[index, k], made[kind])
                    for index in alive
                ),
                prompt_sets=self.prompt_sets,
            )
            for k in range(rows.shape[1])
        )

    def with_prompts(self, role: str, prompts: Sequence[str]) -> "Directions":
        """Return the same directions with the hashes of the prompts of another use listed.

        Raises:
            ValueError: an unknown use, or one that has its prompts already and gets others.
            OverlappingPromptsError: a prompt that serves another use already.
        """
        hashes = tuple(sorted(set(prompts)))
        if self.prompt_sets.get(role, hashes) != hashes:
            raise ValueError(
                f"role: {len(self.prompt_sets[role])} prompts to {role} with are listed already, "
                f"and {len(hashes)} others were given"
            )
        return dataclasses.replace(self, prompt_sets={**self.prompt_sets, role: hashes})

    def without_prompts(self, role: str) -> "Directions":
        """Return the same directions without the record of one use of prompts.

        Without that of `fit`, `evaluate` also asks what they were fitted on: say so where you show
        the result.

        Raises:
            ValueError: an unknown use, or one whose prompts are not listed.
        """
        if role not in self.prompt_sets:
            raise ValueError(
                f"role: no prompts to {role} with are listed, only {sorted(self.prompt_sets)}"
            )
        rest = {name: hashes for name, hashes in self.prompt_sets.items() if name != role}
        directions = _with_fit_prompts(self.directions, ()) if role == "fit" else self.directions
        return dataclasses.replace(self, directions=directions, prompt_sets=rest)

    def rows(self) -> list[dict[str, Any]]:
        """One row a site; `shuffled_norm` is the largest norm that shuffled labels gave."""
        nothing = [None] * len(self)
        shares = nothing if self.top3_share is None else self.top3_share.tolist()
        norms = nothing if self.shuffled is None else self.shuffled.norm(dim=2).amax(1).tolist()
        return [
            direction.rows()[0] | {"shuffled_norm": norm, "top3_share": share}
            for direction, norm, share in zip(self.directions, norms, shares, strict=True)
        ]

    def _check_controls(self, name: str, rows: Tensor | None) -> None:
        if rows is None:
            return
        widths = {direction.width for direction in self.directions}
        if rows.ndim != 3 or len(rows) != len(self) or widths != {rows.shape[-1]}:
            raise WidthError(
                f"{name} has shape {tuple(rows.shape)}, expected [{len(self)}, k, d] with d in "
                f"{sorted(widths)}: as many sites as directions, all of one width"
            )
        check_finite(name, rows)


def _as_control(own: Direction, row: Tensor, construction: str) -> Direction:
    made = dataclasses.replace(own.provenance, construction=construction)
    control = Direction(
        site=own.site,
        vector=row,
        resid_norm=own.resid_norm,
        fit_prompts=own.fit_prompts,
        provenance=made,
    )
    return dataclasses.replace(control, vector=control.direction * own.norm)


def _with_fit_prompts(
    directions: Sequence[Direction], prompts: tuple[str, ...]
) -> tuple[Direction, ...]:
    return tuple(
        own if own.fit_prompts == prompts else dataclasses.replace(own, fit_prompts=prompts)
        for own in directions
    )
