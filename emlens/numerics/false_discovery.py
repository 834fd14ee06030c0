"""Which of many tests to believe: the share of false ones among those called true.

Not for the family-wise error, where one false call among all is too many.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def adjust_p_values(p_values: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Benjamini-Hochberg q-values: calling all tests with q <= a true keeps false ones to a.

    q_(i) = min over j >= i of m p_(j) / j, for the i-th smallest of m p-values. Tests may depend on
    one another positively, as latents that fire together do.

    Source: Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57, 289; Benjamini and Yekutieli 2001,
        Ann. Stat. 29, 1165 (positive dependence).

    Args:
        p_values: NaN where nothing was tested; those count in nothing and stay NaN.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    p = p_values.double()
    tested = ~p.isnan()
    chosen = p[tested]
    if bool(((chosen < 0) | (chosen > 1)).any()):
        raise ValueError(
            f"p_values: got {float(chosen.min())} to {float(chosen.max())}, expected 0 to 1, or NaN"
        )
    order = chosen.argsort(descending=True)
    m = len(chosen)
    ranks = torch.arange(m, 0, -1, dtype=torch.float64, device=p.device)
    falling = (chosen[order] * m / ranks).cummin(0).values if m else chosen
    q = torch.full_like(p, torch.nan)
    q[tested] = torch.empty_like(chosen).index_copy_(0, order, falling)
    return q
