"""Checks of tensors before they are used, with the errors they raise; not for files or settings."""

import torch
from torch import Tensor


class WidthError(ValueError):
    """A tensor has another rank or width than the calculation needs."""


class NonFiniteError(ValueError):
    """A tensor holds NaN or infinity, or values whose squares overflow its dtype."""


class ZeroVectorError(ValueError):
    """A direction was asked of something that has none: its norm is zero."""


class EmptyAccumulatorError(ValueError):
    """A result was asked of an accumulator that has seen no sample."""


def check_samples(name: str, x: Tensor, width: int) -> None:
    """Raise unless x is a floating-point matrix [n width]."""
    if x.ndim != 2 or x.shape[1] != width:
        raise WidthError(
            f"{name} has shape {tuple(x.shape)}, expected [n, {width}]: flatten batch and position "
            "into one axis of samples, and check that it was captured at the site meant"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}, expected a floating-point dtype")


def check_matrix(name: str, x: Tensor) -> None:
    """Raise unless x has exactly two axes."""
    if x.ndim != 2:
        raise WidthError(f"{name} has shape {tuple(x.shape)}, expected a matrix with two axes")


def check_same(name: str, got: int, other: str, expected: int) -> None:
    """Raise unless two sizes that must agree do."""
    if got != expected:
        raise WidthError(
            f"{name} is {got} but {other} is {expected}; they must be equal: "
            "the two tensors probably come from different models or sites"
        )


def check_finite(name: str, *tensors: Tensor) -> None:
    """Raise if any of the tensors holds NaN or infinity.

    A device is asked once for all that lie on it: every answer waits for what it still has to do.
    """
    finite: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        finite.setdefault(tensor.device, []).append(tensor.isfinite().all())
    # One flag is asked as it is: to stack it would be a launch more.
    if not all(bool(torch.stack(own).all() if own[1:] else own[0]) for own in finite.values()):
        raise NonFiniteError(
            f"{name} holds NaN or infinity, or values too large to square in its dtype: "
            "look for padding positions that were not masked out, or pass float64"
        )
