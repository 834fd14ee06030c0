"""What a fine-tune changed at one site without any codec: the baseline beside every latent.

The mean difference, the best single direction, the difference on the first tokens, and what the
adapter's update writes, each with the share of the squared change that lies along it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from emlens.activations import stream_activations
from emlens.artifacts import Result
from emlens.data import Batching, Chat, parse_positions
from emlens.data.positions import Positions
from emlens.features.logit_lens import read_logit_lens, writes_residual
from emlens.models.lora import Target, find_targets
from emlens.models.pair import ModelPair
from emlens.models.write_vectors import list_write_vectors
from emlens.numerics.lowrank import svd_product
from emlens.numerics.projection import cosine_similarity, orthonormal_basis
from emlens.sites import Site, parse_site

FIRST = 5
"""Tokens at the start that are looked at alone: there what a narrow fine-tune was about can be read
off the mean difference even on unrelated text (Minder et al. 2025, arXiv 2510.13900: the first
few)."""
N_WRITES = 6
"""Modules of the adapter that are listed, the largest updates first."""
_OUTPUTS = ("attn_out", "mlp_out")
"""What a block adds to the stream, in its order; as sites they hold their own module's alone."""
N_TOKENS = 8
"""Tokens of either end of the logit lens."""


class ModelsAlikeError(ValueError):
    """A base and its fine-tune that do not differ at a site."""


@dataclass(frozen=True, kw_only=True)
class PlainVector:
    """One direction, and how much of what the fine-tune changed lies along it."""

    name: str
    """`mean difference`, `best direction`, `first 5 tokens`, or a module of the adapter: the
    leading left singular vector of its update."""
    norm: float
    """Of the mean differences, in activation units; the root mean square along the best direction;
    the largest singular value of an update."""
    cosine: float
    """With the mean difference; singular vectors and the best direction are turned to be >= 0."""
    captured: float
    """Share of the squared change, over tokens, that lies along it."""
    leading_share: float | None
    """Of an update: its first squared singular value over the sum of all; None of the others."""
    promoted: tuple[str, ...]
    """Tokens by the logit lens; empty where the site is not in the residual stream."""
    suppressed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlainDifference(Result):
    """How base and fine-tune differ at one site, read on the same text."""

    kind: ClassVar[str] = "plain_difference"

    base: str
    """The base's source."""
    tuned: str
    """The fine-tune's source."""
    site: str
    positions: str
    """Tokens that were counted."""
    first_positions: str
    """The first of them."""
    n_tokens: int
    relative_rms: float
    """Root mean square norm of the change over that of the base's activations."""
    vectors: tuple[PlainVector, ...]
    """The mean difference first."""
    random_share: float
    """What one random direction captures on average: 1 / width."""
    n_writes: int
    """Dimensions of the span of the leading write vectors of all modules whose output is part of
    the vector at the site; 0 without an adapter."""
    captured_by_writes: float | None
    """Share of the squared change in that span; None without an adapter."""
    random_writes: float | None
    """What a random span of as many dimensions captures on average."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a vector."""
        return [
            {
                "tuned": self.tuned,
                "vector": one.name,
                "captured": one.captured,
                "random": self.random_share,
                "cosine": one.cosine,
                "norm": one.norm,
                "promoted": " ".join(map(repr, one.promoted[:5])),
            }
            for one in self.vectors
        ]


def measure_plain_difference(
    pair: ModelPair,
    chats: Sequence[Chat | str],
    *,
    site: str | Site,
    positions: str,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> PlainDifference:
    """Read what differs between base and fine-tune at a site, without a codec, in one pass.

    Args:
        pair: the two models; both read the same tokens.
        chats: prompts (str) or chats.
        site: where.
        positions: which tokens; the first five of them are looked at alone, too.
        batching: tokens run at once, both models counted.

    Raises:
        ModelsAlikeError: the two models do not differ there.
        ValueError: a site or positions that model or chats do not have.

    Source: Minder et al. 2025, arXiv 2510.13900 (the difference on the first tokens).
    Differs: the logit lens alone, no patching and no steering.
    """
    place = parse_site(site) if isinstance(site, str) else site
    first = first_positions(parse_positions(positions))
    found = stream_activations(
        pair,
        chats,
        sites=place,
        positions=(positions, str(first)),
        statistics=("mean", "covariance"),
        batching=batching,
    )
    assert found.mean is not None
    assert found.covariance is not None
    change, own = (found.streams.index(name) for name in ("difference", "base"))
    mean = found.mean[:, 0, 0].double().cpu()
    moments = found.covariance[:, 0, 0].double().cpu() + mean[:, :, None] * mean[:, None, :]
    total, size = (float(moments[stream].trace()) for stream in (change, own))
    if not total > 0:
        raise ModelsAlikeError(
            f"pair: base and {pair.tuned_name} do not differ at {place} on these chats; is the "
            "fine-tune in effect below that site?"
        )
    updates = list(_list_updates(pair, place))
    vectors = {
        "mean difference": mean[change],
        "best direction": _best_direction(moments[change]),
        f"first {FIRST} tokens": found.mean[change, 0, 1].double().cpu(),
        **{one.name: one.vector * one.size for one in updates[:N_WRITES]},
    }
    span = [one.vector for one in updates if one.acts]
    basis = orthonormal_basis(torch.stack(span)) if span else mean.new_zeros(0, len(mean[0]))
    shares = {one.name: one.leading_share for one in updates}
    return PlainDifference(
        base=pair.base_name,
        tuned=pair.tuned_name,
        site=str(place),
        positions=found.positions[0],
        first_positions=str(first),
        n_tokens=int(found.n_tokens[0]),
        relative_rms=(total / size) ** 0.5,
        vectors=_describe(pair, place, vectors, moments[change], shares),
        random_share=1 / len(mean[0]),
        n_writes=len(basis),
        captured_by_writes=share_along(moments[change], basis) if span else None,
        random_writes=len(basis) / len(mean[0]) if span else None,
    )


def first_positions(positions: Positions) -> Positions:
    """The first five tokens of those that positions select."""
    start, stop = positions.start or 0, positions.stop
    if start < 0:
        end = start + FIRST
        return Positions(positions.span, start, end if end < 0 else stop)
    end = start + FIRST
    return Positions(positions.span, positions.start, end if stop is None or stop < 0 else stop)


def share_along(moments: Float64[Tensor, "d d"], basis: Float64[Tensor, "k d"]) -> float:
    """Share of the mean square of vectors that lies in a span.

    Args:
        moments: mean of x x^T.
        basis: orthonormal rows.
    """
    return float(((basis @ moments) * basis).sum() / moments.trace())


@dataclass(frozen=True, kw_only=True)
class _Update:
    """The leading left singular vector of one module's update, where it joins the stream."""

    name: str
    vector: Float64[Tensor, " d"]
    size: float
    leading_share: float
    acts: bool
    """Whether what it writes is part of the vector at the site."""


def _list_updates(pair: ModelPair, site: Site) -> Iterator[_Update]:
    """Of the modules that write to the residual stream, the largest first."""
    if pair.adapter is None or not writes_residual(site):
        return
    targets = {one.name: one for one in find_targets(pair.base, pair.adapter)}
    found = []
    for name, rows in list_write_vectors(pair.base, pair.adapter):
        svd = svd_product(rows.mT, targets[name].lora.A.double().cpu())
        squares = svd.S.square()
        found.append(
            _Update(
                name=name,
                vector=svd.U[:, 0],
                size=float(svd.S[0]),
                leading_share=float(squares[0] / squares.sum()),
                acts=_acts_on(targets[name], site),
            )
        )
    yield from sorted(found, key=lambda one: -one.size)


def _acts_on(target: Target, site: Site) -> bool:
    """Whether what a module writes is part of the vector at a site."""
    if site.layer is None:
        return False
    write = target.place.writes[0].removeprefix("hook_")
    if site.stream in _OUTPUTS:
        return target.layer == site.layer and write == site.stream
    own = {"resid_mid": ("attn_out",), "resid_post": _OUTPUTS}.get(site.stream, ())
    return target.layer < site.layer or (target.layer == site.layer and write in own)


def _best_direction(moments: Float64[Tensor, "d d"]) -> Float64[Tensor, " d"]:
    """First eigenvector, as long as the root mean square along it."""
    values, vectors = torch.linalg.eigh(moments)
    return vectors[:, -1] * values[-1].clamp(min=0).sqrt()


def _describe(
    pair: ModelPair,
    site: Site,
    vectors: dict[str, Tensor],
    moments: Float64[Tensor, "d d"],
    leading: dict[str, float],
) -> tuple[PlainVector, ...]:
    mean = vectors["mean difference"]
    turned, cosines = {}, {}
    for name, vector in vectors.items():
        cosine = _cosine(vector, mean)
        # A singular vector has no sign of its own; a mean has.
        sign = -1.0 if cosine < 0 and "tokens" not in name else 1.0
        turned[name], cosines[name] = sign * vector, sign * cosine
    lenses: list[Any] = [None] * len(turned)
    if writes_residual(site):
        rows = torch.stack(list(turned.values())).float()
        lenses = list(read_logit_lens(pair.base, rows, n_tokens=N_TOKENS))
    return tuple(
        PlainVector(
            name=name,
            norm=float(vector.norm()),
            cosine=cosines[name],
            captured=_captured(moments, vector),
            leading_share=leading.get(name),
            promoted=() if lens is None else tuple(w.text for w in lens.promoted),
            suppressed=() if lens is None else tuple(w.text for w in lens.suppressed),
        )
        for (name, vector), lens in zip(turned.items(), lenses, strict=True)
    )


def _captured(moments: Tensor, vector: Tensor) -> float:
    return share_along(moments, orthonormal_basis(vector)) if bool(vector.any()) else 0.0


def _cosine(vector: Tensor, mean: Tensor) -> float:
    if not bool(vector.any()) or not bool(mean.any()):
        return 0.0
    return float(cosine_similarity(vector[None], mean[None])[0])
