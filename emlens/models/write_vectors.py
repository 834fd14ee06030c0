"""What a LoRA can write to the residual stream: the columns of B of every module that writes there.

Not what it does write on a text: that takes the scalars A x as well.
"""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.lora import LoraAdapter, architecture_of, find_targets

_NORM_AFTER = {"hook_attn_out": "ln1_post", "hook_mlp_out": "ln2_post"}


def list_write_vectors(
    model: HookedTransformer, adapter: LoraAdapter
) -> Iterator[tuple[str, Float[Tensor, "rank d_model"]]]:
    """Yield each writing module's name and the vectors that it writes, in layer order.

    Where the architecture norms what a module puts out before it joins the stream (Gemma), the
    vectors are multiplied by the norm's weight: so they point where they do in the stream.

    Args:
        model: a model that the adapter fits.
        adapter: its modules that write elsewhere (queries, gates) are left out.
    """
    post_norms = architecture_of(model).post_norms
    for target in find_targets(model, adapter):
        write = target.place.writes[0]
        if write not in _NORM_AFTER or not bool(target.lora.B.any()):
            continue
        rows = (target.lora.scale * target.lora.B.mT).double().cpu()
        if post_norms:
            block: Any = model.blocks[target.layer]
            rows = rows * getattr(block, _NORM_AFTER[write]).w.detach().double().cpu()
        yield target.name, rows
