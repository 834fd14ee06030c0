"""What makes codes of pre-activations, latent by latent, in place; not the choice of the k largest.

A ReLU; a ReLU that is zero up to a threshold, as JumpReLU and BatchTopK have it; or the ReLU of a
second affine function where the first is positive, as gated autoencoders have it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.frozen import HALF

ROOM = 1 << 18
"""Codes that a processor works on at a time: with a mask as large, 2 MiB of float32. A pass over
what is still in its cache costs a fraction of one over memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rectifier:
    """Codes of pre-activations p: relu(gain p + offset) where p is above the floor, else 0."""

    floor: float | Float[Tensor, " d_sae"] = 0.0
    """Where codes begin, not below zero; one number where it is the same for all latents."""
    gain: Float[Tensor, " d_sae"] | None = None
    """None for codes that are p itself."""
    offset: Float[Tensor, " d_sae"] | None = None
    """Beside a gain."""

    def __getitem__(self, latents: "slice | Tensor") -> "Rectifier":
        """The same for some of the latents."""
        return Rectifier(
            floor=self.floor[latents] if isinstance(self.floor, Tensor) else self.floor,
            gain=None if self.gain is None else self.gain[latents],
            offset=None if self.offset is None else self.offset[latents],
        )

    def __call__(self, pre: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
        """Codes, in the place of the pre-activations unless gradients need them."""
        if self.gain is None and not isinstance(self.floor, Tensor):
            return torch.threshold_(pre, self.floor, 0.0) if self.floor else pre.relu_()
        if torch.is_grad_enabled() and pre.requires_grad:
            return torch.where(pre > self.floor, self._transform(pre), 0.0)
        rows = max(1, ROOM // pre.shape[1]) if pre.device.type == "cpu" else max(1, len(pre))
        active = torch.empty_like(pre[:rows])
        for part in pre.split(rows):
            # A mask of the codes' own dtype: torch multiplies by one of bools many times slower.
            mask = torch.gt(part, self.floor, out=active[: len(part)])
            self._transform(part, in_place=True).mul_(mask)
        return pre

    def _transform(self, pre: Tensor, *, in_place: bool = False) -> Tensor:
        if self.gain is None or self.offset is None:
            # A product that overflows is -inf, and -inf times a mask of 0 is NaN. No floor is below
            # zero, so that nothing else changes.
            if pre.dtype not in HALF:
                return pre
            return pre.relu_() if in_place else pre.relu()
        if in_place:
            return pre.mul_(self.gain).add_(self.offset).relu_()
        return (pre * self.gain + self.offset).relu()


def read_floor(threshold: Float[Tensor, " d_sae"] | None) -> float | Float[Tensor, " d_sae"]:
    """Floor of a rectifier with a threshold for each latent; one below zero is that of a ReLU."""
    if threshold is None:
        return 0.0
    floor = threshold.clamp(min=0)
    return float(floor[0]) if bool((floor == floor[0]).all()) else floor
