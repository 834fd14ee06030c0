"""Teacher-forced scores under many steering vectors at one site: what lies below it is run once.

For fixed responses under vectors added at every token; for anything else that acts on a model, or
for what it says itself, use `score_responses` or generation under `emlens.interventions`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.data import Batch, Batching, TokenizedChat, plan_batches, track
from emlens.models.attach import acts_on_rows
from emlens.models.hooks import HookNeverFiredError
from emlens.models.identity import foreign_hooks
from emlens.models.score import check_response, count_read, read_responses
from emlens.models.shared_prompts import pad_texts
from emlens.models.tokens_in_flight import TokensInFlight, frame_batch, publish_tokens
from emlens.numerics.validation import WidthError, check_finite
from emlens.sites import Site, SiteError, check_sites

_AFTER_ITS_BLOCK = "resid_post"
"""The stream that is nothing but the next block's input: its own block is below it as a whole."""


def score_steered(
    model: HookedTransformer,
    chats: Sequence[TokenizedChat],
    *,
    site: Site,
    vectors: Float[Tensor, "directions d"],
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> Float[Tensor, "directions chats"]:
    """Score every chat's response as log p(response | prompt), each vector added at every token.

    The same as one pass a vector under `Add`; adapters attached and interventions in effect act as
    they do there, before the vector where they meet it. Blocks below the site are run once a batch
    of chats, those above it once a vector, several vectors in one batch: with the site in layer l
    of L, N vectors cost 1 + N (L - l - 1) / L passes after `resid_post.l`, and 1 + N (L - l) / L
    at sites inside a block.

    Args:
        model: a model loaded by emlens, its context free of hooks that are not emlens's.
        chats: each with an assistant turn, in any order.
        site: in a block, one vector a token.
        vectors: what is added, one a row; a row of zeros gives the scores of the model as it is.
        batching: rows times positions of one pass, all vectors of the pass counted.

    Returns:
        Sums over the tokens of each response, in nats, in float64 on the CPU.

    Raises:
        SiteError: a site outside the blocks, without one vector a token, or that the model lacks.
        WidthError: no vectors, or vectors of another width than the site.
        ValueError: a chat without a response; hooks of others, which might tell rows apart.
        BatchError: no chats, or one too long for the batching or the model.
        HookNeverFiredError: a site that the model does not use.
    """
    _check(model, site, vectors)
    for row, chat in enumerate(chats):
        check_response(row, chat)
    lengths = [count_read(chat) for chat in chats]
    plan = plan_batches(lengths, batching, n_ctx=model.cfg.n_ctx)
    found = torch.empty((len(vectors), len(chats)), dtype=torch.float64)
    parts = [
        (rows, part)
        for rows in plan
        for part in _split(len(vectors), lengths[rows[0]] * len(rows), batching)
    ]
    sizes = [len(rows) * (part.stop - part.start) for rows, part in parts]
    entered: tuple[tuple[int, ...], _Entered] | None = None
    with torch.no_grad():
        placed = vectors.to(model.W_E.device)
        for rows, part in track(parts, "scoring (responses)", sizes=sizes):
            if entered is None or entered[0] != rows:
                entered = None  # the batch before it leaves the memory first
                entered = (rows, _enter(model, chats, rows, site))
            found[part, list(rows)] = _finish(model, entered[1], site, placed[part])
    return found


@dataclass(frozen=True, kw_only=True)
class _Entered:
    """One batch of chats as it stands before the first block that a vector changes."""

    chats: tuple[TokenizedChat, ...]
    resid: Float[Tensor, "batch pos d_model"]
    tokens: TokensInFlight
    layer: int
    """The block that runs next."""


def _check(model: HookedTransformer, site: Site, vectors: Tensor) -> None:
    if site.layer is None or not site.is_positional:
        raise SiteError(
            f"site: {site} is not in a block with one vector a token; expected one such as "
            f"resid_post.{model.cfg.n_layers // 2}"
        )
    check_sites([site], model.hook_dict)
    width = site.width(model.cfg)
    if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
        raise WidthError(
            f"vectors: got shape {tuple(vectors.shape)}, expected [directions, {width}], at least "
            f"one: {site} is {width} wide"
        )
    check_finite("vectors", vectors)
    if acts_on_rows(model):
        raise ValueError(
            "model: an adapter acts on some rows of its batches, and rows are repeated here; "
            "attach it to all of them (attach_adapter)"
        )
    if hooked := list(foreign_hooks(model)):
        raise ValueError(
            f"model has hooks that are no Interventions, at {', '.join(hooked[:3])}: they would "
            "see each row once a vector; remove them, or use score_responses under intervene"
        )


def _split(n: int, columns: int, batching: Batching) -> Iterator[slice]:
    """The vectors of each pass: as many as fit beside one another, one at least."""
    step = max(1, batching.tokens // columns)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _enter(
    model: HookedTransformer, chats: Sequence[TokenizedChat], rows: tuple[int, ...], site: Site
) -> _Entered:
    """Run the blocks below a site. No mask: what pads comes after all that counts."""
    assert site.layer is not None
    texts = [chats[row].ids[: count_read(chats[row])] for row in rows]
    ids, mask = pad_texts(texts, side="right")
    tokens = frame_batch(Batch(rows=rows, ids=ids, mask=mask), chats)
    layer = site.layer + (site.stream == _AFTER_ITS_BLOCK)
    ids = ids.to(model.W_E.device)
    with publish_tokens(model, tokens):
        resid = model.hook_embed(model.embed(ids))
        if model.cfg.positional_embedding_type == "standard":
            resid = resid + model.hook_pos_embed(model.pos_embed(ids, 0, None))
        for block in model.blocks[:layer]:
            resid = block(resid)
    kept = tuple(chats[row] for row in rows)
    return _Entered(chats=kept, resid=resid, tokens=tokens, layer=layer)


def _finish(
    model: HookedTransformer, entered: _Entered, site: Site, vectors: Float[Tensor, "n d"]
) -> Float[Tensor, "n batch"]:
    """Run the rest, the rows of the first vector before those of the second."""
    n, chats = len(vectors), entered.chats
    spread = vectors.repeat_interleave(len(chats), dim=0)[:, None]
    resid = entered.resid.repeat(n, 1, 1)
    if site.stream == _AFTER_ITS_BLOCK:
        resid = _add(resid, spread)
    with publish_tokens(model, entered.tokens.repeat(n)), _added(model, site, spread):
        for block in model.blocks[entered.layer :]:
            resid = block(resid)
    spans = [chat.response for chat in chats]
    sizes = [0 if span is None else span[1] - span[0] for span in spans]
    firsts = [0 if span is None else span[0] - 1 for span in spans]
    whole = read_responses(model, resid, chats * n, firsts * n).double()
    return torch.stack([part.sum(1) for part in whole.view(n, -1).split(sizes, dim=1)], dim=1)


def _add(x: Tensor, vectors: Tensor) -> Tensor:
    """In float32 at least, rounded once: as interventions do it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + vectors.to(wide)).to(x.dtype)


@contextmanager
def _added(model: HookedTransformer, site: Site, vectors: Float[Tensor, "rows 1 d"]):
    """Add each row's vector inside a block; after a whole block that has been done already."""
    if site.stream == _AFTER_ITS_BLOCK:
        yield
        return
    fired: list[bool] = []

    def steer(_module: object, _args: object, output: Tensor) -> Tensor:
        fired.append(True)
        flat = output if output.ndim == 3 else output.flatten(2)
        return _add(flat, vectors).view(output.shape)

    handle = model.hook_dict[site.hook_name].register_forward_hook(steer)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise HookNeverFiredError(f"site: {site} was never reached; the model does not use it")
