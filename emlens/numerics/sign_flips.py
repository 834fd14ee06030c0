"""Permutation tests of paired differences by flipping their signs, many columns at once.

A unit (a prompt, or a pair of fine-tunes) gives one difference a column; if the two sides of a unit
could as well have been named the other way round, its signs may be flipped. Not for units that are
not exchangeable, and not a correction for the number of columns (`false_discovery`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int8
from torch import Tensor

from emlens.numerics.pareto_tail import fit_pareto_tail
from emlens.numerics.validation import check_finite, check_matrix, check_same

FLIPS = 10_000
"""Sign vectors drawn: a p-value of .01 is then known to a tenth of itself."""
TAIL_BELOW = 1e-3
"""p-values below it come from the tail's fit: of 10,000 flips fewer than ten exceed them."""
EXCEEDANCES = 250
"""Largest flipped sums that the tail is fitted to. Source: Knijnenburg et al. 2009, section 2.3."""
METHODS = ("untested", "no difference", "exact", "sampled", "generalised Pareto tail")
"""How a p-value came about, by its number."""
_UNTESTED, _NONE, _EXACT, _SAMPLED, _TAIL = range(len(METHODS))
_TIE = 1e-12
"""Share of a column's absolute sum by which sums that are equal may differ in float64."""
_VALUES = 1 << 22
"""Flipped sums held at a time: 32 MiB."""


@dataclass(frozen=True, kw_only=True)
class SignFlips:
    """Two-sided p-values of the columns' mean differences."""

    mean: Float64[Tensor, " column"]
    """Mean difference over units."""
    t: Float64[Tensor, " column"]
    """Mean over its standard error; 0 where all differences are 0, NaN for a unit alone."""
    p_value: Float64[Tensor, " column"]
    """Share of sign vectors that give a mean at least as far from 0."""
    method: Int8[Tensor, " column"]
    """Index into `METHODS`."""


def draw_signs(n_units: int, *, seed: int, flips: int = FLIPS) -> Int8[Tensor, "flip unit"]:
    """Draw sign vectors, +1 or -1 with equal chance.

    Raises:
        ValueError: no unit or no flip.
    """
    if n_units < 1 or flips < 1:
        raise ValueError(f"n_units is {n_units} and flips {flips}, expected at least one of each")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (flips, n_units), generator=generator, dtype=torch.int8)
    return drawn.mul_(2).sub_(1)


def smallest_p(n_units: int) -> float:
    """The smallest two-sided p-value that n units can give, all differences of one sign."""
    return 2.0 ** (1 - n_units)


def flip_signs(
    differences: Float[Tensor, "unit column"], signs: Int8[Tensor, "flip unit"]
) -> SignFlips:
    """Test whether mean differences are 0, column by column.

    p = P(|sum s_u d_u| >= |sum d_u|) over signs s. Every column is given the same sign vectors.

    - All 2^k sign vectors are tried where they are no more than the flips drawn, k being the
      column's differences that are not 0 (those that are change no sum).
    - Otherwise p = (1 + exceeding flips) / (1 + flips).
    - Where that is below `TAIL_BELOW`, and flips are many enough, p is taken from a generalised
      Pareto distribution fitted to the largest flipped sums, and is at least 2^(1 - k).
    - A column without any difference has p = 1.

    Source: Knijnenburg, Wessels, Reinders and Shmulevich 2009, Bioinformatics 25, i161 (the tail);
        Phipson and Smyth 2010, arXiv 1603.05766 (the one that is added).
    Differs: the tail's shape is bounded, as the largest possible sum is known; see `pareto_tail`.

    Args:
        differences: one a unit and column.
        signs: what `draw_signs` drew; the same for blocks of columns that are tested in turn.

    Raises:
        WidthError: differences are no matrix, or signs are of another number of units.
        NonFiniteError: a difference is NaN or infinite.
    """
    check_matrix("differences", differences)
    check_same("width of signs", signs.shape[1], "number of units", len(differences))
    check_finite("differences", differences)
    d = differences.double()
    n, columns = d.shape
    p = torch.ones(columns, dtype=torch.float64, device=d.device)
    method = torch.full((columns,), _NONE, dtype=torch.int8, device=d.device)
    nonzero = (d != 0).sum(0)
    small = int(math.log2(len(signs)))  # 2^k <= flips
    for chosen in _blocks((nonzero > 0) & (nonzero <= small), 1 << small):
        p[chosen], method[chosen] = _enumerate(d[:, chosen], small), _EXACT
    for chosen in _blocks(nonzero > small, len(signs)):
        p[chosen], method[chosen] = _sample(d[:, chosen], signs.to(d.device))
    mean = d.mean(0)
    error = ((d - mean).square().sum(0) / max(1, n - 1) / n).sqrt()
    t = torch.where(nonzero > 0, mean / error, 0.0) if n > 1 else torch.full_like(mean, math.nan)
    return SignFlips(mean=mean, t=t, p_value=p, method=method)


def _blocks(wanted: Tensor, rows: int) -> Iterator[Tensor]:
    """Numbers of the wanted columns, as many at a time as there is room for."""
    found = wanted.nonzero()[:, 0]
    if len(found):  # what is empty splits into one part
        yield from found.split(max(1, _VALUES // rows))


def _enumerate(d: Tensor, most: int) -> Tensor:
    """Exact p-values of columns with at most so many differences that are not 0."""
    order = (d == 0).byte().sort(dim=0, stable=True).indices[:most]
    kept = d.gather(0, order)
    # The other half of the sign vectors are these turned round, with the same absolute sums.
    n = len(kept)
    codes = torch.arange(1 << (n - 1), device=d.device)[:, None]
    bits = codes >> torch.arange(n, device=d.device) & 1
    sums = ((1 - 2 * bits).double() @ kept).abs_()
    return (sums >= _least(kept)).double().mean(0)


def _sample(d: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """p-values and methods of columns with more differences than can be enumerated."""
    sums = torch.cat([(part.double() @ d).abs_() for part in signs.split(1024)])
    n = len(sums)
    p = ((sums >= _least(d)).sum(0) + 1).double() / (n + 1)
    method = torch.full(p.shape, _SAMPLED, dtype=torch.int8, device=d.device)
    far = (p < TAIL_BELOW).nonzero()[:, 0]
    if len(far) and n >= 10 * EXCEEDANCES:
        chosen = d[:, far]
        tail = fit_pareto_tail(
            sums[:, far].topk(EXCEEDANCES + 1, dim=0).values, n=n, largest=chosen.abs().sum(0)
        )
        floor = 2.0 ** (1 - (chosen != 0).sum(0).double())
        fitted = tail.survival(chosen.sum(0).abs()).maximum(floor)
        spread = tail.scale > 0  # sums that are all equal have no tail to fit
        p[far] = torch.where(spread, fitted, p[far])
        method[far] = torch.where(spread, _TAIL, _SAMPLED).to(torch.int8)
    return p, method


def _least(d: Tensor) -> Tensor:
    """The absolute sum of each column, less what rounding may have taken from an equal one."""
    return d.sum(0).abs() - _TIE * d.abs().sum(0)
