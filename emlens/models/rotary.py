"""Rotary tables and attention masks, computed once per forward pass and shared by all layers.

Angles come from the checkpoint's own rotary module, so that rope scaling is right by construction.
Not for learned position embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TableMaker = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Positions [1 pos] and any tensor -> (cos, sin), each [1 pos rotary_dim], in that one's dtype."""

FIRST_TABLE = 2048
"""Positions tabulated at first; longer sequences double it."""


class RotaryTables:
    """Cosine and sine tables that grow with the longest sequence seen.

    Args:
        make: the checkpoint's rotary module, as (positions, like) -> (cos, sin).
        n_ctx: the longest sequence the tables may serve, in tokens.
        like: any tensor of the model's dtype, on the device of the checkpoint's rotary module.
    """

    def __init__(self, make: TableMaker, *, n_ctx: int, like: Tensor):
        self._make = make
        self.n_ctx = n_ctx
        self._device = like.device
        self.cos, self.sin = self._tabulate(min(n_ctx, FIRST_TABLE), like.dtype)

    def _tabulate(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Tables outlive the call: made in inference mode, they could never enter a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(length, device=self._device)[None]
            cos, sin = self._make(positions, torch.zeros(1, dtype=dtype, device=self._device))
        return cos[0], sin[0]

    def get(
        self, length: int, like: Tensor
    ) -> tuple[Float[Tensor, "pos rotary_dim"], Float[Tensor, "pos rotary_dim"]]:
        """Return (cos, sin) for at least ``length`` positions, as and where the model is by now.

        Raises:
            ValueError: the sequence is longer than the model's context.
        """
        if length > self.n_ctx:
            raise ValueError(
                f"a sequence of {length} tokens exceeds the model's context of {self.n_ctx}; "
                "shorten the prompt or generate fewer tokens"
            )
        if length > len(self.cos) or self.cos.dtype != like.dtype:
            longer = max(length, 2 * len(self.cos)) if length > len(self.cos) else len(self.cos)
            self.cos, self.sin = self._tabulate(min(self.n_ctx, longer), like.dtype)
        if self.cos.device != like.device:
            self.cos, self.sin = self.cos.to(like.device), self.sin.to(like.device)
        return self.cos, self.sin


@dataclass(frozen=True)
class Rotation:
    """Cosines and sign-carrying sines of one forward pass, [batch|1 pos 1 rotary_dim]."""

    cos: Tensor
    sin: Tensor

    def rotate(
        self, x: Float[Tensor, "batch pos head d_head"], *, own: bool = False
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Rotate the first ``rotary_dim`` channels of each head, pairing i with i + half.

        Args:
            x: queries or keys.
            own: whether x may be overwritten.
        """
        width = self.cos.shape[-1]
        if width < x.shape[-1]:
            return torch.cat((self.rotate(x[..., :width]), x[..., width:]), dim=-1)
        first, second = x.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        if own:
            return x.mul_(self.cos).addcmul_(swapped, self.sin)
        return torch.addcmul(x * self.cos, swapped, self.sin)


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see, in the forms that the attention paths want."""

    allowed: Tensor | None
    """Bool [batch|1 1 query key]; None if every key is allowed."""
    bias: Tensor | None
    """The same as an additive bias; None where the fused kernel's own causal mask serves."""

    @property
    def is_causal(self) -> bool:
        """Whether the fused kernel's own causal mask says it all."""
        return self.allowed is not None and self.bias is None


class SharedTables:
    """The rotations and masks of the forward pass in progress, shared between layers.

    An entry is valid for one attention-mask object and one (offset, query, key) shape. The mask is
    held so that its identity cannot be reused, and its version is compared, so that an edit in
    place is seen (tensors made in inference mode have no version: do not edit those in place).
    """

    def __init__(self) -> None:
        self._rotations: dict[int, tuple[tuple, Rotation]] = {}
        self._masks: dict[int | None, tuple[tuple, AttentionMask]] = {}
        self._asked: tuple[tuple, Tensor | None] | None = None

    def rotation(
        self, tables: RotaryTables, *, offset: int, like: Tensor, mask: Tensor | None
    ) -> Rotation:
        """Return the rotation of queries ``like`` [batch query ...] under a padding mask."""
        length, mask = like.shape[1], self._hiding(mask, offset)
        mode = torch.is_inference_mode_enabled()
        key = (mask, _version(mask), mode, offset, length, like.dtype, like.device)
        found = self._rotations.get(id(tables))
        if found is not None and _same(found[0], key):
            return found[1]
        cos, sin = tables.get(offset + length, like)
        if mask is None:
            cos, sin = cos[None, offset : offset + length], sin[None, offset : offset + length]
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, offset:]
            cos, sin = cos[positions], sin[positions]
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        rotation = Rotation(cos[:, :, None], signed[:, :, None])
        self._rotations[id(tables)] = (key, rotation)
        return rotation

    def mask(
        self, padding: Tensor | None, *, offset: int, like: Tensor, n_keys: int, window: int | None
    ) -> AttentionMask:
        """Return the causal (and sliding-window) mask for queries ``like`` [batch query ...]."""
        length, padding = like.shape[1], self._hiding(padding, offset)
        mode = torch.is_inference_mode_enabled()
        key = (padding, _version(padding), mode, offset, length, n_keys, like.dtype, like.device)
        found = self._masks.get(window)
        if found is not None and _same(found[0], key):
            return found[1]
        mask = _build_mask(padding, offset=offset, like=like, n_keys=n_keys, window=window)
        self._masks[window] = (key, mask)
        return mask

    def _hiding(self, mask: Tensor | None, offset: int) -> Tensor | None:
        """A padding mask, or None for one that hides nothing: kernels do less without one.

        Asked once a mask, as it waits for the device, and of whole texts alone: while a model
        generates every step brings a mask of its own.
        """
        if mask is None or offset:
            return mask
        key = (mask, _version(mask))
        if self._asked is None or not _same(self._asked[0], key):
            self._asked = (key, None if bool(mask.all()) else mask)
        return self._asked[1]


def _version(mask: Tensor | None) -> int:
    return 0 if mask is None or mask.is_inference() else mask._version


def _same(first: tuple, second: tuple) -> bool:
    return first[0] is second[0] and first[1:] == second[1:]


def _build_mask(
    padding: Tensor | None, *, offset: int, like: Tensor, n_keys: int, window: int | None
) -> AttentionMask:
    length, device = like.shape[1], like.device
    if length == 1 and padding is None and (window is None or n_keys <= window):
        return AttentionMask(None, None)
    queries = torch.arange(offset, offset + length, device=device)[:, None]
    keys = torch.arange(n_keys, device=device)[None]
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    allowed = allowed[None, None]
    if padding is None and window is None and length == n_keys:
        return AttentionMask(allowed, None)
    if padding is not None:
        allowed = allowed & padding.to(device).bool()[:, None, None]
    # The lowest finite number, not -inf: the row of a padding query has nothing to attend to and
    # would turn into NaN; as it is, its output is finite and ignored.
    lowest = torch.finfo(like.dtype).min
    bias = torch.zeros(allowed.shape, dtype=like.dtype, device=device)
    return AttentionMask(allowed, bias.masked_fill_(~allowed, lowest))
