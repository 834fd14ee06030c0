"""Products with weights, for processors: in the order and the precision that is fast there.

Of half-precision inputs the result is what processors with such instructions, and GPUs, give: added
up in float32 and rounded once. Where gradients are wanted torch's own products are used.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FEWEST_ROWS = 12
"""From so many rows on widening a weight costs less than multiplying by it as it is."""
MOST_ROWS = 512
"""Up to so many rows MKL multiplies weight x^T faster than x weight^T, up to 2 times (3 for the
vocabulary). For a row alone the two are the same."""
LARGE = 1 << 18
"""Values of a weight from which on it is faster to multiply a row alone by it as two: 2.5 times for
a vocabulary, 1.9 for a layer of 1,536 x 576, 1.2 at 192 x 576, less than the copy costs."""
MANY = 1 << 18
"""Values of a result from which on a look at the bias, 5 microseconds, is a hundredth of it."""
SLAB = 1 << 22
"""Values of a weight that are widened at a time: 16 MiB of float32."""
_HAS_MKL = torch.backends.mkl.is_available()


def multiply(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """Return x weight^T + bias, as `torch.nn.functional.linear` does."""
    if bias is not None and _is_nothing(bias, x):
        bias = None
    if _turns(x, weight):
        return _multiply_turned(x, weight, bias)
    if not _widens(x, weight):
        return F.linear(x, weight, bias)
    wide = x.float()
    step = max(1, SLAB // weight.shape[1])
    if len(weight) <= step:
        return multiply(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        own = None if bias is None else bias[part].float()
        out[..., part] = multiply(wide, weight[part].float(), own)
    return out


def _is_nothing(bias: Tensor, x: Tensor) -> bool:
    """Whether a bias is zero, where to look costs less than to write it to every row first.

    The host's layers have biases whatever the checkpoint has, and most checkpoints have none.
    """
    if x.device.type != "cpu" or x.numel() // x.shape[-1] * len(bias) < MANY:
        return False
    return not (torch.is_grad_enabled() and bias.requires_grad) and not bool(bias.any())


def _turns(x: Tensor, weight: Tensor) -> bool:
    """Whether weight x^T is the faster product, and can be taken."""
    if x.dtype != torch.float32 or not _HAS_MKL or x.device.type != "cpu":
        return False
    rows = x.numel() // max(1, x.shape[-1])
    if not (1 < rows <= MOST_ROWS or (rows == 1 and weight.numel() >= LARGE)):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _multiply_turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    columns = (torch.cat([rows, rows]) if len(rows) == 1 else rows).t()
    turned = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return turned.t()[: len(rows)].unflatten(0, x.shape[:-1])


def add_product(
    y: Float[Tensor, "n d_out"],
    x: Float[Tensor, "n k"],
    weight: Float[Tensor, "k d_out"],
    *,
    in_place: bool = False,
) -> Float[Tensor, "n d_out"]:
    """Return y + x weight, as `torch.addmm` does, or as its form that changes y."""
    if not _widens(x, weight):
        return y.addmm_(x, weight) if in_place else torch.addmm(y, x, weight)
    out = torch.addmm(y.float(), x.float(), weight.float())
    return y.copy_(out) if in_place else out.to(y.dtype)


def _widens(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if x.numel() < FEWEST_ROWS * x.shape[-1] or _multiplies(x.dtype):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a fast product of this dtype here; what it does not say, it has not."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return bool(getattr(torch.ops.mkldnn, name[dtype])())
    except (AttributeError, RuntimeError):
        return False
