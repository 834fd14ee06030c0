"""Where each Hugging Face weight lives in a HookedTransformer, as views of the same storage.

Everything that reads or writes weights (loading, adapters, merging, proof, export) goes through
these functions; do not use them for weights that TransformerLens processed (folded or centred).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.sites import SiteConfig

Kind = Literal["heads_out", "heads_in", "plain"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One linear module of a Hugging Face block and its TransformerLens counterparts."""

    module: str
    """Name below the block, for instance ``self_attn.q_proj``."""
    parameters: tuple[str, ...]
    """TransformerLens weight names below the block; more than one for fused projections."""
    biases: tuple[str, ...]
    """TransformerLens bias names, aligned with ``parameters``."""
    kind: Kind
    """``heads_out`` [head d_model d_head], ``heads_in`` [head d_head d_model] or [d_in d_out]."""
    reads: Literal["attn", "mlp", "z", "post"]
    """The module's input: what enters ``attn`` or ``mlp``, or the hook points z and post."""
    writes: tuple[str, ...]
    """Hook points below the block that carry the output, aligned with ``parameters``."""
    conv1d: bool = False
    """Whether the checkpoint stores the weight as [d_in d_out] (GPT-2's Conv1D)."""
    by_head: bool = False
    """Whether a fused projection's rows go head by head, each head's parts together (GPT-NeoX)."""

    @property
    def suffix(self) -> str:
        """The last part of the module's name, by which adapters target it."""
        return self.module.rsplit(".", 1)[-1]


def to_matrix(parameter: Float[Tensor, "..."], kind: Kind) -> Float[Tensor, "d_out d_in"]:
    """Read a TransformerLens weight as the matrix W of y = W x; a view where strides permit."""
    if kind == "heads_out":
        return parameter.mT.flatten(0, 1)
    if kind == "heads_in":
        return parameter.permute(2, 0, 1).flatten(1, 2)
    return parameter.mT


def from_matrix(
    matrix: Float[Tensor, "d_out d_in"], kind: Kind, d_head: int
) -> Float[Tensor, "..."]:
    """Lay a TransformerLens weight over the matrix W [d_out d_in]; always a view."""
    if kind == "heads_out":
        return matrix.unflatten(0, (-1, d_head)).mT
    if kind == "heads_in":
        return matrix.unflatten(1, (-1, d_head)).permute(1, 2, 0)
    return matrix.mT


def part_rows(d_out: int, place: Place, d_head: int) -> tuple[Int[Tensor, " rows"], ...]:
    """Return, for each TransformerLens part of a module, its rows of the module's output."""
    n_parts = len(place.parameters)
    if not place.by_head:
        return torch.arange(d_out).chunk(n_parts)
    return tuple(r.flatten() for r in torch.arange(d_out).view(-1, n_parts, d_head).unbind(1))


def split_rows(
    matrix: Float[Tensor, "d_out n"], place: Place, d_head: int
) -> tuple[Float[Tensor, "rows n"], ...]:
    """Return a module's rows for each of its TransformerLens parts; the matrix itself for one."""
    if len(place.parameters) == 1:
        return (matrix,)
    return tuple(matrix[rows] for rows in part_rows(len(matrix), place, d_head))


def split_weight(
    matrix: Float[Tensor, "d_out d_in"], place: Place, d_head: int
) -> tuple[Float[Tensor, "..."], ...]:
    """Lay a module's TransformerLens weights over its matrix; always views."""
    n_parts = len(place.parameters)
    if place.by_head:
        return tuple(part.mT for part in matrix.unflatten(0, (-1, n_parts, d_head)).unbind(1))
    return tuple(from_matrix(rows, place.kind, d_head) for rows in matrix.chunk(n_parts))


def split_bias(
    bias: Float[Tensor, " d_out"], place: Place, d_head: int
) -> tuple[Float[Tensor, "..."], ...]:
    """Lay a module's TransformerLens biases over its bias; always views."""
    n_parts = len(place.parameters)
    if place.by_head:
        return bias.view(-1, n_parts, d_head).unbind(1)
    shape = (-1, d_head) if place.kind == "heads_out" else (-1,)
    return tuple(part.view(shape) for part in bias.chunk(n_parts))


def join_parts(
    parts: Sequence[Float[Tensor, "rows ..."]], place: Place, d_head: int
) -> Float[Tensor, "d_out ..."]:
    """Put the rows of a module's parts back into the order of its output."""
    if not place.by_head:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return torch.stack([part.unflatten(0, (-1, d_head)) for part in parts], dim=1).flatten(0, 2)


def weight_matrix(weight: Float[Tensor, "a b"], place: Place) -> Float[Tensor, "d_out d_in"]:
    """Read a Hugging Face weight as W [d_out d_in], whatever way its class stores it."""
    return weight.mT if place.conv1d else weight


def place_shape(place: Place, cfg: SiteConfig) -> tuple[int, int]:
    """Return (d_out, d_in) of the Hugging Face module."""
    d_heads = cfg.n_heads * cfg.d_head
    d_key = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    widths = {"hook_q": d_heads, "hook_k": d_key, "hook_v": d_key}
    d_mlp = cfg.d_mlp or 0
    widths |= {"hook_pre": d_mlp, "hook_pre_linear": d_mlp}
    d_out = sum(widths.get(name.rsplit(".", 1)[-1], cfg.d_model) for name in place.writes)
    d_in = {"attn": cfg.d_model, "mlp": cfg.d_model, "z": d_heads, "post": d_mlp}
    return d_out, d_in[place.reads]


def iterate_parts(place: Place) -> Iterator[tuple[int, str, str, str]]:
    """Yield (index, weight name, bias name, hook point) for each part of a module."""
    for index, names in enumerate(zip(place.parameters, place.biases, place.writes, strict=True)):
        yield index, *names
