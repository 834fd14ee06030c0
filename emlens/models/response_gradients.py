"""Gradients of what a model makes of a response, with respect to its activations at one site.

For attributions to first order, which hold near the activations as they are. What a change does in
full is a question for a pass with the change in it (`suffix`).
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.data import Batch, Batching, TokenizedChat, plan_batches, track
from emlens.models.hooks import HookNeverFiredError
from emlens.models.kv_cache import run_cached
from emlens.models.score import check_response, pick_log_probs
from emlens.models.shared_prompts import pad_texts
from emlens.models.tokens_in_flight import frame_batch, publish_tokens
from emlens.numerics.blocks import slice_rows
from emlens.sites import Site, SiteError, check_sites

GradientVisitor = Callable[[int, Float[Tensor, "n d"], Float[Tensor, "n d"]], None]
"""Called with a chat's index, the activations at its response tokens, and the gradients there."""


def read_response_gradients(
    model: HookedTransformer,
    chats: Sequence[TokenizedChat],
    *,
    site: Site,
    visit: GradientVisitor,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> None:
    """Show d(cross-entropy of the response) / d(activation) at the response tokens of each chat.

    The cross-entropy is the sum over the response's tokens, in nats. Only what lies above the site
    is differentiated. The last token of a response has a gradient of zero: nothing that is scored
    comes after it.

    Args:
        model: a model loaded by emlens; adapters and interventions act, and what an intervention
            leaves at the site is the activation.
        chats: each with an assistant turn.
        site: in a block, one vector a token.
        visit: called once a chat, batch by batch; heads are laid end to end.
        batching: tokens run at once; graphs take several times the memory of a plain pass.

    Raises:
        SiteError: a site outside the blocks, without one vector a token, or that the model lacks.
        ValueError: a chat without a response.
        HookNeverFiredError: a site that the model does not use.
    """
    if site.layer is None or not site.is_positional:
        raise SiteError(f"site: {site} is not in a block with one vector a token")
    check_sites([site], model.hook_dict)
    for row, chat in enumerate(chats):
        check_response(row, chat)
    lengths = [len(chat.ids) for chat in chats]
    plan = plan_batches(lengths, batching, n_ctx=model.cfg.n_ctx)
    sizes = [sum(lengths[row] for row in rows) for rows in plan]
    for rows in track(plan, "differentiating (tokens)", sizes=sizes):
        _run(model, chats, rows, site, visit)


def _run(
    model: HookedTransformer,
    chats: Sequence[TokenizedChat],
    rows: tuple[int, ...],
    site: Site,
    visit: GradientVisitor,
) -> None:
    ids, mask = pad_texts([chats[row].ids for row in rows], side="right")
    tokens = frame_batch(Batch(rows=rows, ids=ids, mask=mask), chats)
    with torch.enable_grad(), publish_tokens(model, tokens), _cut_graph(model, site) as leaves:
        resid = run_cached(model, ids.to(model.W_E.device), None)
        _differentiate(model, resid, [chats[row] for row in rows])
    if not leaves:
        raise HookNeverFiredError(f"site: {site} was never reached; the model does not use it")
    (leaf,) = leaves
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    for place, row in enumerate(rows):
        start, stop = chats[row].response or (0, 0)
        part = slice(start, stop)
        visit(row, leaf.detach()[place, part].flatten(1), gradient[place, part].flatten(1))


@contextmanager
def _cut_graph(model: HookedTransformer, site: Site):
    """Make the activation at a site a leaf, so that nothing below it is differentiated."""
    leaves: list[Tensor] = []

    def cut(_module: object, _args: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf

    handle = model.hook_dict[site.hook_name].register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _differentiate(
    model: HookedTransformer,
    resid: Float[Tensor, "batch pos d_model"],
    chats: Sequence[TokenizedChat],
) -> None:
    """Run backwards; logits are made, and let go, slice by slice."""
    spans = [chat.response or (0, 0) for chat in chats]
    flat = torch.cat([resid[k, a - 1 : b - 1] for k, (a, b) in enumerate(spans)])
    targets = torch.cat([c.ids[a:b] for c, (a, b) in zip(chats, spans, strict=True)])
    if not flat.requires_grad:
        return
    top = flat.detach().requires_grad_()
    for part in slice_rows(len(flat), model.cfg.d_vocab, copies=4):
        (-pick_log_probs(model, top[part], targets[part].to(flat.device)).sum()).backward()
    if top.grad is not None:
        flat.backward(top.grad)
