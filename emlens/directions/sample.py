"""Isotropic random directions: the weakest control, beside the ones that a fit brings along.

An isotropic vector hardly overlaps with activations, so ablating it always "does nothing"; use
`Directions.controls("covariance")` wherever the directions were fitted.
"""

import dataclasses

import torch

from emlens.numerics.counter import counter_normal, derive_key
from emlens.vectors import Direction, Directions


def sample_directions(like: Direction | Directions, *, n: int, seed: int) -> tuple[Directions, ...]:
    """Draw random directions of no structure, as long as some estimates and at the same sites.

    Args:
        like: whose sites, widths, norms and residual norms they get; zero vectors are matched by
            vectors of norm 1.
        n: how many for each site.
        seed: they are a function of seed, site and number alone.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least 1")
    own = (like,) if isinstance(like, Direction) else like.directions
    prompts = {} if isinstance(like, Direction) else like.prompt_sets
    return tuple(
        Directions(directions=tuple(_draw(d, k, seed) for d in own), prompt_sets=prompts)
        for k in range(n)
    )


def _draw(like: Direction, number: int, seed: int) -> Direction:
    key = torch.tensor([derive_key("emlens.isotropic", seed, str(like.site))])
    vector = counter_normal(key, number, like.width)[0]
    made = dataclasses.replace(like.provenance, construction="random:isotropic", seed=seed)
    return Direction(
        site=like.site,
        vector=vector * ((like.norm or 1.0) / vector.norm()),
        resid_norm=like.resid_norm,
        fit_prompts=like.fit_prompts,
        provenance=made,
    )
