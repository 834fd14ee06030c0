"""Products with weights, for processors: in the order and the precision that is fast there.

Of half-precision inputs the result is what processors with such instructions, and GPUs, give: added
up in float32 and rounded once. Where gradients are wanted torch's own products are used.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from emlens.models.packed_weights import packed_weights_in_use

FEWEST_ROWS = 12
"""From so many rows on widening a weight costs less than multiplying by it as it is."""
LARGE = 1 << 16
"""Values of a weight from which on oneDNN's product is the faster one in float32: .4 to .8 of the
time of MKL's on AMD's processors; a call costs 13 microseconds more, and a new shape .7 ms."""
LONGEST = 1 << 10
"""Values of an input up to which oneDNN is asked in float32. It rounds farther, most where large
values nearly cancel, as in what an MLP of 1,536 writes: up to 17 times as far in the logits."""
MANY = 1 << 18
"""Values of a result from which on a look at the bias, 5 microseconds, is a hundredth of it."""
SLAB = 1 << 22
"""Values of a weight that are widened at a time: 16 MiB of float32."""


def multiply(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
    *,
    loose: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    """Return x weight^T + bias, as `torch.nn.functional.linear` does.

    Args:
        x: inputs.
        weight: as a checkpoint stores it.
        bias: added to every row.
        loose: whether float32 may be rounded farther than torch does, for speed; it is, too, while
            `PackedWeights` are in use.
    """
    if bias is not None and _is_nothing(bias, x):
        bias = None
    if _widens(x, weight):
        return _multiply_widened(x, weight, bias)
    packed = packed_weights_in_use()
    if packed is not None and _takes_onednn(x, weight):
        weight = packed.pack(weight, rows=max(1, x.numel() // x.shape[-1]))
        return _multiply_by_onednn(x, weight, bias)
    return _multiply_once(x, weight, bias) if loose else F.linear(x, weight, bias)


def multiply_together(
    x: Float[Tensor, "*batch d_in"],
    weights: Sequence[Float[Tensor, "_ d_in"]],
    biases: Sequence[Float[Tensor, " _"]],
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Return x weight^T + bias for each; one product, and views of it, where that is faster.

    A call for few rows costs as much as 200 more columns do: `PackedWeights` lay them side by side.
    """
    packed, whole = packed_weights_in_use(), None
    if packed is not None and all(
        _takes_onednn(x, weight) and not _widens(x, weight) for weight in weights
    ):
        whole = packed.pack_together(weights, rows=max(1, x.numel() // x.shape[-1]))
    if whole is not None:
        bias = torch.cat(list(biases))
        out = _multiply_by_onednn(x, whole, None if _is_nothing(bias, x) else bias)
        return out.split([len(weight) for weight in weights], dim=-1)
    return tuple(multiply(x, *pair) for pair in zip(weights, biases, strict=True))


def _multiply_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With a weight that need not be there again."""
    if _takes_onednn(x, weight):
        return _multiply_by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _multiply_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.float()
    step = max(1, SLAB // weight.shape[1])
    if len(weight) <= step:
        bias = None if bias is None else bias.float()
        return _multiply_once(wide, weight.float(), bias).to(x.dtype)
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        own = None if bias is None else bias[part].float()
        out[..., part] = _multiply_once(wide, weight[part].float(), own)
    return out


def _is_nothing(bias: Tensor, x: Tensor) -> bool:
    """Whether a bias is zero, where to look costs less than to write it to every row first.

    The host's layers have biases whatever the checkpoint has, and most checkpoints have none.
    """
    if x.device.type != "cpu" or x.numel() // x.shape[-1] * len(bias) < MANY:
        return False
    return not (torch.is_grad_enabled() and bias.requires_grad) and not bool(bias.any())


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may be asked by name; of half precision torch asks it where it is fast."""
    if weight.numel() < LARGE or x.device.type != "cpu" or weight.dtype != x.dtype:
        return False
    if weight.shape[1] > LONGEST if x.dtype == torch.float32 else not _multiplies(x.dtype):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return not torch.is_autocast_enabled("cpu") and _has_onednn()


def _multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's product of plain tensors; tried, as no public name says so."""
    x, weight = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, weight.t())


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
    except (AttributeError, KeyError, RuntimeError):
        return False
