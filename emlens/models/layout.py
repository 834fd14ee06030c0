"""Where each Hugging Face weight lives in a HookedTransformer, as views of the same storage.

Everything that reads or writes weights (loading, adapters, merging, proof, export) goes through
these functions; do not use them for weights that TransformerLens processed (folded or centred).
"""

from collections.abc import Iterator
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


def split_rows(value: Float[Tensor, "d_out ..."], place: Place) -> tuple[Float[Tensor, "..."], ...]:
    """Split the output rows of a fused projection into those of its parts, as views."""
    return value.chunk(len(place.parameters), dim=0)


def part_rows(d_out: int, place: Place) -> tuple[Int[Tensor, " rows"], ...]:
    """Return, for each TransformerLens part of a module, its rows of the module's output."""
    return torch.arange(d_out).chunk(len(place.parameters))


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
