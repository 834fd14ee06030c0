"""Random numbers that are a function of key, counter and place: no state, no order, no device.

The numbers of a row do not depend on which other rows are drawn beside it, so a row sampled alone
and in a batch meets the same noise. Not for secrets: the function is fast and easily inverted.
"""

import hashlib
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: SplitMix64's step from one place to the next."""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's multipliers (variant 13 of Stafford's mixers)."""
_BLOCK = 1 << 16
"""Numbers that are made at once on a CPU, so that every pass over them stays in its cache."""


def derive_key(*parts: str | int | bytes) -> int:
    """Hash parts to a key of 63 bits; the order, type and border of the parts all count.

    Raises:
        TypeError: a part of another type.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int | bytes):
            raise TypeError(f"parts: got a {type(part).__name__}, expected str, int or bytes")
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{type(part).__name__}:{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest()[:8]) >> 1


def counter_bits(
    keys: Int[Tensor, " n"], counter: int | Int[Tensor, " n"], width: int
) -> Int[Tensor, "n width"]:
    """64 random bits for each key at places 0 .. width - 1; a longer row begins like a shorter one.

    Args:
        keys: int64, one a row; rows of one key and counter are equal.
        counter: which draw of each key, such as a step: one for all rows or one a row.
        width: numbers a row.

    Raises:
        ValueError: keys that are not int64, or a counter of another length.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators (SplitMix64).
    Differs: the state at place j is computed, not reached, and its start is the mix of key and
        counter, so that any number can be had at once.
    """
    _check(keys, counter)
    return _bits_at(_start(keys, counter), 0, width)


def counter_uniform(
    keys: Int[Tensor, " n"],
    counter: int | Int[Tensor, " n"],
    width: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n width"]:
    """Uniform numbers strictly between 0 and 1: (k + 1/2) / 2^52, or 2^23 in float32.

    Arguments as for `counter_bits`. The numbers are the same on every device.
    """
    digits = _digits(dtype)
    bits = _shift(counter_bits(keys, counter, width), 64 - digits)
    return (bits.to(dtype) + 0.5) * 2.0**-digits


def counter_normal(
    keys: Int[Tensor, " n"],
    counter: int | Int[Tensor, " n"],
    width: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n width"]:
    """Standard normal numbers, two from each two uniform ones; arguments as for `counter_bits`.

    Source: Box, Muller 1958, A note on the generation of random normal deviates.
    """
    uniform = counter_uniform(keys, counter, width + width % 2, dtype=dtype)
    radius = torch.sqrt(-2 * torch.log(uniform[:, 0::2]))
    angle = 2 * math.pi * uniform[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :width]


def counter_gumbel(
    keys: Int[Tensor, " n"], counter: int | Int[Tensor, " n"], width: int
) -> Float[Tensor, "n width"]:
    """Standard Gumbel numbers -log(-log u) in float32; arguments as for `counter_bits`.

    Drawn as -log(-log(1 - v)) with v of 63 bits: near the top, where a sample is decided, a
    float32 v has more digits than a float32 u next to 1.
    """
    _check(keys, counter)
    start = _start(keys, counter)
    step = width if keys.device.type != "cpu" else max(1, _BLOCK // max(1, len(keys)))
    found = torch.empty((len(keys), width), device=keys.device)
    for first in range(0, width, step):
        after = min(width, first + step)
        found[:, first:after] = _to_gumbel(_bits_at(start, first, after))
    return found


def _to_gumbel(bits: Tensor) -> Tensor:
    v = _shift(bits, 1).to(torch.float32)
    # Both ends are kept off: 0 would win over everything, 1 would be no number at all.
    v = v.add_(0.5).mul_(2.0**-63).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def _check(keys: Tensor, counter: int | Tensor) -> None:
    if keys.dtype != torch.int64 or keys.ndim != 1:
        raise ValueError(f"keys: got {keys.dtype} {tuple(keys.shape)}, expected int64 [n]")
    if isinstance(counter, Tensor) and counter.shape != keys.shape:
        raise ValueError(f"counter: got shape {tuple(counter.shape)}, keys {tuple(keys.shape)}")


def _start(keys: Tensor, counter: int | Tensor) -> Tensor:
    """State before place 0 of each row."""
    if isinstance(counter, int):
        counter = _signed(counter % 2**64)
    return _mix(_mix(keys + _signed(_GOLDEN)) + counter)


def _bits_at(start: Tensor, first: int, after: int) -> Tensor:
    places = torch.arange(first + 1, after + 1, device=start.device) * _signed(_GOLDEN)
    return _mix(start[:, None] + places)


def _digits(dtype: torch.dtype) -> int:
    """Bits such that k + 1/2 is exact in the dtype for every k."""
    known = {torch.float64: 52, torch.float32: 23}
    if dtype not in known:
        raise ValueError(f"dtype: got {dtype}, expected torch.float64 or torch.float32")
    return known[dtype]


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; torch fills with the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the input reaches every bit of the output."""
    x = (x ^ _shift(x, 30)).mul_(_signed(_FIRST))
    x = x.bitwise_xor_(_shift(x, 27)).mul_(_signed(_SECOND))
    return x.bitwise_xor_(_shift(x, 31))
