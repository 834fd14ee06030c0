"""Which latents are looked at closely: from both ends of several orderings in turn; tensors alone.

An ordering's largest score need not be the latent that acts, so none of them decides alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

ONE_ENDED = frozenset({"abs_delta", "attribution"})
"""Orderings whose lowest scores say nothing: no change, or nothing that rests on the latent."""


@dataclass(frozen=True, kw_only=True)
class ChosenLatent:
    """A latent and why it was chosen."""

    latent: int
    chosen_by: str
    """The ordering and its end."""
    ranks: dict[str, int]
    """Its place in each ordering, 1 for the highest score."""


def choose_latents(
    scores: Mapping[str, Float[Tensor, " d_sae"]], *, n: int
) -> tuple[ChosenLatent, ...]:
    """Take the next latent of each end of each ordering in turn, until there are n.

    A latent with a score of 0 is not taken by that ordering: it says nothing of it.

    Args:
        scores: of all latents, by the name of the ordering; the first is asked first.
        n: how many; fewer come where fewer have any score.
    """
    orders = {name: own.argsort(descending=True, stable=True) for name, own in scores.items()}
    places = {name: _invert(order) for name, order in orders.items()}
    lines = [line for name in scores for line in _list_ends(name, scores[name], orders[name])]
    chosen: dict[int, str] = {}
    while lines and len(chosen) < n:
        left = []
        for name, line in lines:
            latent = next((latent for latent in line if latent not in chosen), None)
            if latent is not None:
                left.append((name, line))
                if len(chosen) < n:
                    chosen[latent] = name
        lines = left
    return tuple(
        ChosenLatent(
            latent=latent,
            chosen_by=why,
            ranks={name: int(place[latent]) + 1 for name, place in places.items()},
        )
        for latent, why in chosen.items()
    )


def _list_ends(
    name: str, scores: Tensor, order: Int[Tensor, " d_sae"]
) -> list[tuple[str, Iterator[int]]]:
    """Latents from each end that has any, without those whose score lies on the other side of 0."""
    ranked = scores[order]
    highest = order[ranked > 0].tolist()
    found = [(f"{name}, highest", iter(highest))]
    if name not in ONE_ENDED:
        found.append((f"{name}, lowest", iter(order[ranked < 0].flip(0).tolist())))
    return found


def _invert(order: Int[Tensor, " d_sae"]) -> Int[Tensor, " d_sae"]:
    """Place of each latent."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places
