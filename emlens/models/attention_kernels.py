"""Fused attention, asked for in the form that a device has a fast kernel for.

For whoever wants scores or the pattern it is of no use: they are never made here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from emlens.models.rotary import AttentionMask


def repeats_heads(kind: str, dtype: torch.dtype, *, grouped: bool, masked: bool) -> bool:
    """Whether keys and values are repeated for every query head before attention is asked for.

    Of torch's kernels for CUDA the flash one takes no bias and half precision only, the
    memory-efficient one no grouped heads, and what neither takes is done in float32 with all
    scores [batch head query key] in memory. The memory-efficient one does take repeated heads,
    which are the smaller of the two from query = 2 d_head on. Neither takes float64.

    Args:
        kind: of the device.
        dtype: of queries, keys and values.
        grouped: whether several query heads share a key head.
        masked: whether a bias is added to the scores.

    Source: torch 2.13, ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if kind != "cuda" or not grouped or dtype == torch.float64:
        return False
    return masked or dtype == torch.float32


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep torch from asking cuDNN for attention: it plans anew for each number of keys.

    A decode brings another one at each step. The switch is the process's own and is put back.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attend(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    *,
    v: Float[Tensor, "batch kv_head key d_head"],
    mask: AttentionMask,
    scale: float,
    kind: str,
) -> Float[Tensor, "batch head query d_head"]:
    """Return softmax(scale q k^T + bias) v, each group of query heads with its own key head.

    Args:
        q: queries; query head h reads key head h // (head / kv_head).
        k: keys.
        v: values.
        mask: which keys a query sees.
        scale: of the scores.
        kind: of the device.
    """
    batch, n_heads, length, d_head = q.shape
    n_kv = k.shape[1]
    if length == 1 and n_kv != n_heads:
        # One query: the heads of a group become its query axis, and no key is repeated.
        together = q.reshape(batch, n_kv, n_heads // n_kv, d_head)
        z = _ask(together, k, v, bias=mask.bias, is_causal=False, scale=scale, kind=kind)
        return z.reshape(q.shape)
    grouped, masked = n_kv != n_heads, mask.bias is not None
    if repeats_heads(kind, q.dtype, grouped=grouped, masked=masked):
        k, v = (_repeat(x, n_heads // n_kv) for x in (k, v))
    return _ask(q, k, v, bias=mask.bias, is_causal=mask.is_causal, scale=scale, kind=kind)


def _repeat(x: Tensor, n: int) -> Tensor:
    """Each key head n times, one after the other."""
    return x[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2)


def _ask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    kind: str,
) -> Tensor:
    settings = {"is_causal": is_causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if kind != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **settings)
    with without_cudnn():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **settings)
