"""The paired forward: base and fine-tunes in one batch, the layers they share run once.

Cost (l0 + (1 + n)(L - l0)) / L base passes for n adapters that start at layer l0 of L. Full
checkpoints, and merged models whose adapters start at layer 0, take a pass of their own each.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.attach import adapter_on_rows, attached_adapter, is_hooked_by_user
from emlens.models.hooks import watch_sites
from emlens.models.lora import LoraAdapter, find_targets
from emlens.models.pair import ModelPair
from emlens.models.placed import PlacedAdapter, place_adapter
from emlens.models.tokens_in_flight import publish_tokens, tokens_in_flight
from emlens.sites import Site

Method = Literal["paired", "separate passes"]
Tuned = LoraAdapter | PlacedAdapter | HookedTransformer
Visitor = Callable[[Site, Float[Tensor, "models batch pos ..."]], None]


@dataclass(frozen=True, kw_only=True)
class PairedForward:
    """What a paired forward leaves: the last residual streams, and how they were made."""

    resid: Float[Tensor, "models batch pos d_model"]
    """After the last block, before the final norm; index 0 is the base."""
    shared_layers: int
    """Blocks run once for all models."""
    method: Method


def tuned_parts(pair: ModelPair) -> tuple[Tuned, ...]:
    """Choose how a pair is run: its adapter on batch rows, or the tuned model itself.

    A merged model whose adapter starts at layer 0 shares no layer: its own pass costs no more than
    the paired one and saves the adapter's multiplications. In half precision merging rounds, and
    the merged weights themselves are what is asked about. Models with hooks run as they are.
    """
    if pair.adapter is None or is_hooked_by_user(pair.base) or is_hooked_by_user(pair.tuned):
        return (pair.tuned,)
    merged = attached_adapter(pair.tuned) is None
    half = pair.base.cfg.dtype.itemsize < 4
    if merged and (half or first_layer(pair.base, pair.adapter) == 0):
        return (pair.tuned,)
    placed = pair.placed_adapter
    assert placed is not None
    return (placed,)


def first_layer(base: HookedTransformer, adapter: LoraAdapter) -> int:
    """Return the first block an adapter changes; 0 if it changes the embedding."""
    targets = find_targets(base, adapter)
    embeds = len(targets) < len(adapter.modules)
    return 0 if embeds or not targets else targets[0].layer


@torch.no_grad()
def forward_many(
    base: HookedTransformer,
    tuned: Sequence[Tuned],
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    sites: Sequence[Site],
    visit: Visitor,
) -> PairedForward:
    """Run a base and its fine-tunes over one batch.

    Args:
        base: the base model, without hooks of the user's.
        tuned: adapters, placed on the base if they are used again, or whole models over the same
            sizes.
        ids: token ids, padded on either side.
        mask: 1 for tokens, 0 for padding.
        sites: where ``visit`` is called, with the activations of all models stacked, base first.
        visit: called once a site; must not keep or change the tensor.

    Raises:
        HookNeverFiredError: a site that the forward pass does not reach.
    """
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(
            f"ids {tuple(ids.shape)} and mask {tuple(mask.shape)}: expected both [batch pos]"
        )
    device = base.W_E.device
    ids, mask = ids.to(device), mask.to(device)
    models = [item for item in tuned if isinstance(item, HookedTransformer)]
    if not models:
        placed = [_placed(item, base) for item in tuned if not isinstance(item, HookedTransformer)]
        return _forward_rows(base, placed, ids, mask, sites, visit)
    if len(models) < len(tuned):
        raise ValueError("tuned: give adapters only or models only, not both in one call")
    return _forward_separately([base, *models], ids, mask, sites, visit)


def _placed(adapter: LoraAdapter | PlacedAdapter, base: HookedTransformer) -> PlacedAdapter:
    return adapter if isinstance(adapter, PlacedAdapter) else place_adapter(adapter, base)


def _forward_rows(
    base: HookedTransformer,
    adapters: Sequence[PlacedAdapter],
    ids: Tensor,
    mask: Tensor,
    sites: Sequence[Site],
    visit: Visitor,
) -> PairedForward:
    n_layers, batch, n_models = base.cfg.n_layers, len(ids), 1 + len(adapters)
    tokens = tokens_in_flight(base)
    start = min((adapter.first_layer for adapter in adapters), default=n_layers)
    early = [site for site in sites if _is_before(site, start)]
    late = [site for site in sites if not _is_before(site, start)]

    def visit_shared(site: Site, value: Tensor) -> None:
        visit(site, value[None].expand(n_models, *value.shape))

    def visit_rows(site: Site, value: Tensor) -> None:
        visit(site, value.unflatten(0, (n_models, batch)))

    with watch_sites(base, early, visit_shared):
        resid = base(ids, attention_mask=mask, stop_at_layer=start)
    with ExitStack() as stack:
        for index, adapter in enumerate(adapters, start=1):
            rows = slice(index * batch, (index + 1) * batch)
            stack.enter_context(adapter_on_rows(base, adapter, rows))
        if tokens is not None:
            stack.enter_context(publish_tokens(base, tokens.repeat(n_models)))
        stack.enter_context(watch_sites(base, late, visit_rows))
        resid = base(
            resid.repeat(n_models, 1, 1),
            start_at_layer=start,
            stop_at_layer=n_layers,
            attention_mask=mask.repeat(n_models, 1),
        )
    return PairedForward(
        resid=resid.unflatten(0, (n_models, batch)), shared_layers=start, method="paired"
    )


def _is_before(site: Site, layer: int) -> bool:
    """Whether a site is reached before a block; the final norm is after all of them."""
    if site.layer is None:
        return site.stream in ("embed", "pos_embed")
    return site.layer < layer


def _forward_separately(
    models: Sequence[HookedTransformer],
    ids: Tensor,
    mask: Tensor,
    sites: Sequence[Site],
    visit: Visitor,
) -> PairedForward:
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    last = len(models) - 1
    tokens = tokens_in_flight(models[0])
    residuals = []
    for index, model in enumerate(models):

        def keep(site: Site, value: Tensor, index: int = index) -> None:
            if index < last:
                kept[site].append(value.detach())
            else:
                visit(site, torch.stack([*kept.pop(site), value.detach()]))

        with ExitStack() as stack:
            if tokens is not None:
                stack.enter_context(publish_tokens(model, tokens))
            stack.enter_context(watch_sites(model, sites, keep))
            residuals.append(model(ids, attention_mask=mask, stop_at_layer=model.cfg.n_layers))
    return PairedForward(resid=torch.stack(residuals), shared_layers=0, method="separate passes")
