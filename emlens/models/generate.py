"""Greedy decoding over a preallocated key-value cache.

One chat, or rows of equal length: padding, sampling and interventions need the sampling loop.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.kv_cache import KeyValueCache
from emlens.models.unembed import compute_logits
from emlens.models.views import origin_of


def stop_tokens(model: HookedTransformer) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's own and the generation config's."""
    named = getattr(origin_of(model).generation_config, "eos_token_id", None)
    own = getattr(model.tokenizer, "eos_token_id", None)
    ids = [own, *(named if isinstance(named, list | tuple) else [named])]
    return tuple(sorted({i for i in ids if i is not None}))


@torch.inference_mode()
def generate_greedy(
    model: HookedTransformer,
    ids: Int[Tensor, "batch pos"],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> Int[Tensor, "batch new"]:
    """Decode the most likely continuation of rows of equal length.

    Args:
        model: a model loaded by emlens, with or without an adapter.
        ids: prompts without padding.
        max_new_tokens: the longest continuation, in tokens.
        stop_ids: a row ends with the first of these; afterwards it repeats that token.

    Returns:
        New tokens only; shorter than ``max_new_tokens`` if every row has ended.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the model's context.
    """
    batch, length = ids.shape
    if length == 0 or max_new_tokens < 1:
        raise ValueError(f"ids {tuple(ids.shape)}, max_new_tokens={max_new_tokens}: nothing to do")
    if length + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"prompt of {length} and {max_new_tokens} new tokens exceed the model's context of "
            f"{model.cfg.n_ctx}"
        )
    current = ids.to(model.W_E.device)
    cache = KeyValueCache(model, batch=batch, capacity=length + max_new_tokens)
    stops = torch.tensor(list(stop_ids), dtype=current.dtype, device=current.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=current.device)
    new: list[Tensor] = []
    for _ in range(max_new_tokens):
        chosen = _next_logits(model, current, cache).argmax(dim=-1)
        if new:
            chosen = torch.where(ended, new[-1], chosen)
        new.append(chosen)
        ended |= torch.isin(chosen, stops)
        if len(stops) and bool(ended.all()):
            break
        current = chosen[:, None]
    return torch.stack(new, dim=1).clone()


def _next_logits(
    model: HookedTransformer, ids: Int[Tensor, "batch pos"], cache: KeyValueCache
) -> Tensor:
    """Run new tokens through the cache; logits [batch d_vocab] of the last position only."""
    offset = cache[0].length
    resid = model.hook_embed(model.embed(ids))
    if model.cfg.positional_embedding_type == "standard":
        resid = resid + model.hook_pos_embed(model.pos_embed(ids, offset))
    for layer, block in enumerate(model.blocks):
        resid = block(resid, past_kv_cache_entry=cache[layer])
    return compute_logits(model, resid[:, -1])
