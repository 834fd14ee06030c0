"""Paths with a bend planted into them, to see what a detector of turns makes of it.

Not for paths on which nothing happens: see `null_paths`.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor


def sample_bent_path(
    angles: Float64[Tensor, " n"], *, width: int, noise: float, seed: int
) -> Float64[Tensor, "t width"]:
    """Steps of length one in a plane drawn at random, each at its own angle, with noise.

    Args:
        angles: of each step, radians; a path has a point more than steps, the first at zero.
        width: numbers in a point.
        noise: length of what is added to each step in all dimensions, about, in steps.
        seed: of plane and noise.
    """
    moves = _draw_moves(angles, width, noise, seed)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), moves.cumsum(0)])


def sample_momentum_path(
    angles: Float64[Tensor, " n"],
    *,
    width: int,
    noise: float,
    every: int,
    momentum: float = 0.9,
    warmup: int = 5,
    seed: int = 0,
) -> Float64[Tensor, "t width"]:
    """Steps along a running mean of gradients, at a rate that rises and then falls to nothing.

    Args:
        angles: of each gradient without its noise, in a plane drawn at random, radians.
        width: numbers in a point.
        noise: length of what is added to each gradient in all dimensions, about, in gradients.
        every: steps from one point to the next; the first is at zero.
        momentum: share of the running mean that a step keeps.
        warmup: steps until the rate is at its largest, from which it falls in a straight line.
        seed: of plane and noise.
    """
    gradients = _draw_moves(angles, width, noise, seed)
    mean = torch.zeros(width, dtype=torch.float64)
    points = torch.zeros(len(angles) + 1, width, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        mean = momentum * mean + (1 - momentum) * gradient
        rate = min((step + 1) / max(1, warmup), (len(angles) - step) / (len(angles) - warmup))
        points[step + 1] = points[step] + rate * mean
    return points[::every]


def sample_turn(
    points: int, *, at: int, width: int, noise: float, angle: float = math.pi / 2, seed: int = 0
) -> Float64[Tensor, "points width"]:
    """A path that goes straight on until a point, turns there by an angle, and goes straight on.

    Args:
        points: of the path.
        at: point of the turn.
        width: numbers in a point.
        noise: as in `sample_bent_path`.
        angle: radians.
        seed: of plane and noise.
    """
    angles = angle * (torch.arange(points - 1) >= at).double()
    return sample_bent_path(angles, width=width, noise=noise, seed=seed)


def _draw_moves(angles: Tensor, width: int, noise: float, seed: int) -> Tensor:
    """Vectors of length one at their angles, with noise [n width]."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=torch.float64))[0]
    moves = torch.stack([angles.cos(), angles.sin()], dim=1) @ plane.T
    spread = torch.randn(len(angles), width, generator=generator, dtype=torch.float64)
    return moves + noise * spread / math.sqrt(width)
