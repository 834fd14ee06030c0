"""How often random draws do at least as well: p-values by rank among controls; no distribution.

The p-value cannot fall below 1 / (controls + 1): draw more controls where a smaller one is wanted.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.numerics.validation import EmptyAccumulatorError


def rank_p_value(values: Float[Tensor, " k"], controls: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
    """One-sided p = (1 + number of controls that are at least the value) / (controls + 1).

    Args:
        values: larger is stronger; NaN gives NaN.
        controls: what chance gave, by the same procedure; NaN counts as weaker than any value.

    Raises:
        EmptyAccumulatorError: no control.

    Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, section 4.2.
    """
    if not len(controls):
        raise EmptyAccumulatorError("controls: got none, expected at least one to compare with")
    reached = (controls[None].double() >= values[:, None].double()).sum(1)
    p = (1 + reached).double() / (len(controls) + 1)
    return torch.where(values.isnan(), torch.nan, p)
