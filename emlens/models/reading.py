"""Reading activations of one model, or of a pair at the same moment, one batch at a time.

The one way in for whoever measures on teacher-forced chats: it publishes which tokens run, makes no
logits, and stops after the last site that is asked for or that anybody's hook acts on.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.data import Batch
from emlens.models.acting import describe_acting
from emlens.models.attach import attached_adapter, hooked_by_user, is_hooked_by_user
from emlens.models.hooks import watch_sites
from emlens.models.pair import ModelPair
from emlens.models.paired import forward_many, tuned_parts
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.tokens_in_flight import TokensInFlight, publish_tokens
from emlens.models.views import origin_of
from emlens.sites import Site, block_of

Readable = HookedTransformer | ModelPair
"""One model, or a base and its fine-tune read together."""
Visitor = Callable[[Site, Float[Tensor, "models batch pos ..."]], None]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which weights and which texts: what a measurement must name to be repeated."""

    base: str
    """The base's source as the user wrote it; the only model's where there is one."""
    base_fingerprint: str
    """Of its weights as they are: whatever was merged or folded into them makes them others."""
    tuned: str | None
    """The fine-tune's source, of a pair."""
    tuned_fingerprint: str | None
    """Of a full checkpoint's weights."""
    adapter_fingerprint: str | None
    """Of the LoRA that makes the fine-tune, or is attached to the only model."""
    tokenizer_fingerprint: str
    dtype: str
    """In which the models run."""
    interventions: tuple[str, ...]
    """What acts on the models right now, one JSON object each; `model` is `base` or `tuned` of a
    pair."""
    hooked: bool
    """Whether hooks other than adapters', such as interventions, act on a model right now."""


def base_of(model: Readable) -> HookedTransformer:
    """The base of a pair, or the model itself."""
    return model.base if isinstance(model, ModelPair) else model


def count_models(model: Readable) -> int:
    """How many models are read at once."""
    return 2 if isinstance(model, ModelPair) else 1


def identify(model: Readable) -> Identity:
    """Name the weights, adapter and tokenizer of what is read."""
    base = base_of(model)
    pair = model if isinstance(model, ModelPair) else None
    adapter = pair.adapter if pair else attached_adapter(base)
    full = pair is not None and pair.adapter is None
    return Identity(
        base=origin_of(base).name,
        base_fingerprint=origin_of(base).fingerprint,
        tuned=pair.tuned_name if pair else None,
        tuned_fingerprint=origin_of(pair.tuned).fingerprint if pair and full else None,
        adapter_fingerprint=adapter.fingerprint if adapter else None,
        tokenizer_fingerprint=fingerprint_tokenizer(base.tokenizer),
        dtype=str(base.cfg.dtype).removeprefix("torch."),
        interventions=_list_acting(model),
        hooked=is_hooked_by_user(base) or (pair is not None and is_hooked_by_user(pair.tuned)),
    )


def _list_acting(model: Readable) -> tuple[str, ...]:
    """What acts on each model, as JSON: equal for equal effects."""
    if isinstance(model, ModelPair):
        sides = {"base": model.base, "tuned": model.tuned}
        found = [{"model": n, **one} for n, side in sides.items() for one in describe_acting(side)]
    else:
        found = describe_acting(model)
    return tuple(json.dumps(one, sort_keys=True) for one in found)


@torch.no_grad()
def read_sites(
    model: Readable,
    batch: Batch,
    tokens: TokensInFlight,
    *,
    sites: Sequence[Site],
    visit: Visitor,
) -> None:
    """Run one batch and show the activations at each site to a visitor.

    Args:
        model: one model, hooks and interventions of the user's included, or a pair.
        batch: padded ids.
        tokens: the same batch framed by `frame_batch`, so that named positions have a meaning.
        sites: where to read, each once.
        visit: called once a site with the activations of all models, base first; must not keep or
            change the tensor.

    Raises:
        HookNeverFiredError: a site that the forward pass does not reach.
    """
    base = base_of(model)
    with publish_tokens(base, tokens):
        if isinstance(model, ModelPair):
            parts = tuned_parts(model)
            forward_many(base, parts, batch.ids, batch.mask, sites=sites, visit=visit)
            return
        device = base.embed.W_E.device
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        # A hook that the pass stops before would have seen, or changed, nothing.
        last = _first_unneeded([*(site.hook_name for site in sites), *hooked_by_user(base)])
        with watch_sites(base, sites, lambda site, x: visit(site, x.detach()[None])):
            base(ids, attention_mask=mask, return_type=None, stop_at_layer=last)


def _first_unneeded(hook_names: Sequence[str]) -> int | None:
    """The first block that no hook point needs; None where one lies behind all blocks."""
    blocks = [block_of(name) for name in hook_names]
    known = [block for block in blocks if block is not None]
    return max(known, default=-1) + 1 if len(known) == len(blocks) else None
