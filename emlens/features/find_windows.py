"""Windows of a corpus for some latents: read once to choose tokens, and the chosen texts again.

The first reading also sums up how well the codec fits, of whose codes the windows are.

Not for what the windows mean, nor for latents in their thousands: every latent keeps tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.activations.reading import ReadingPlan, Selection, plan_reading
from emlens.codecs.codec import SparseCodec
from emlens.codecs.inputs import place_rows
from emlens.features.accumulate import FeatureAccumulator
from emlens.features.cards import TokenWindow
from emlens.features.encode import encode_models, pick_latents, split_rows
from emlens.features.explain_settings import ExplainSettings
from emlens.features.reading import TASK, group_by_prompt
from emlens.features.windows import NONE, KeptTokens, SampledTokens, TopTokens, split_by_decile
from emlens.models.reading import count_models
from emlens.sites import Site

DECILES = 10


@dataclass(frozen=True, kw_only=True)
class LatentWindows:
    """What was found for one latent."""

    active: int
    """Tokens at which it is active in any of the models."""
    n_tokens: int
    """Tokens that were looked at."""
    top: tuple[TokenWindow, ...]
    """The most active text first."""
    sampled: tuple[TokenWindow, ...]
    """The weakest part first."""


@dataclass(frozen=True)
class _Wanted:
    """A token that a window is to be about."""

    chat: int
    token: int
    decile: int | None = None


def find_windows(
    plan: ReadingPlan, codec: SparseCodec, latents: Sequence[int], *, settings: ExplainSettings
) -> tuple[list[LatentWindows], FeatureAccumulator]:
    """Read a corpus, choose tokens for each latent, and cut the windows around them.

    Args:
        plan: of the codec's site, at one name of positions.
        codec: whose latents.
        latents: which.
        settings: how many windows, and how wide.

    Returns:
        One for each latent, in the order given; and the sums from which follows how well the codec
        fits the corpus (`health.summarise_health`).
    """
    prompts, names = group_by_prompt(plan.chats)
    fit = FeatureAccumulator(
        count_models(plan.model),
        n_prompts=len(names),
        d_in=codec.d_in,
        d_sae=codec.d_sae,
        keep_codes=False,
    )
    top, sample = _choose_tokens(plan, codec, latents, settings, (fit, prompts))
    best = [_list_places(top.result(), k) for k in range(len(latents))]
    drawn = [_draw_deciles(sample.result(), k, settings.per_decile) for k in range(len(latents))]
    rows = sorted({one.chat for some in (*best, *drawn) for one in some})
    codes = _read_texts(plan, codec, latents, rows)

    def cut(wanted: Sequence[_Wanted], latent: int) -> tuple[TokenWindow, ...]:
        return tuple(
            _make_window(plan, codes[one.chat][:, :, latent], one, settings) for one in wanted
        )

    found = [
        LatentWindows(
            active=int(sample.active[k]),
            n_tokens=sample.n_tokens,
            top=cut(best[k], k),
            sampled=cut(drawn[k], k),
        )
        for k in range(len(latents))
    ]
    return found, fit


def _choose_tokens(
    plan: ReadingPlan,
    codec: SparseCodec,
    latents: Sequence[int],
    settings: ExplainSettings,
    fitted: tuple[FeatureAccumulator, Tensor],
) -> tuple[TopTokens, SampledTokens]:
    fit, prompts = fitted
    top = TopTokens(len(latents), kept=settings.n_top)
    sample = SampledTokens(len(latents), kept=settings.sample, seed=settings.seed)

    def count(_site: Site, x: Tensor, chosen: tuple[Selection, ...]) -> None:
        (selection,) = chosen
        values, own = selection.take(x), prompts[selection.rows]
        for part in split_rows(values.shape[1], codec.d_sae, device=codec.W_dec.device.type):
            rows = place_rows(values[:, part], codec)
            encoded = encode_models(codec, rows)
            fit.update(own[part], rows, encoded)
            largest = torch.stack([pick_latents(one, latents) for one in encoded]).amax(0)
            for kept in (top, sample):
                kept.update(largest, selection.rows[part], selection.tokens[part])

    for _ in plan.read(count, TASK):
        pass
    return top, sample


@torch.no_grad()
def _encode(
    codec: SparseCodec, x: Float[Tensor, "models n d"], latents: Sequence[int]
) -> Float[Tensor, "models n latent"]:
    rows = place_rows(x, codec)
    return torch.stack([codec.encode_latents(own, latents).double().cpu() for own in rows])


def _list_places(kept: KeptTokens, latent: int) -> list[_Wanted]:
    pairs = zip(kept.chats[latent].tolist(), kept.tokens[latent].tolist(), strict=True)
    return [_Wanted(chat, token) for chat, token in pairs if chat != NONE]


def _draw_deciles(kept: KeptTokens, latent: int, each: int) -> list[_Wanted]:
    """The first draws of each tenth of the sampled tokens, the weakest tenth first."""
    places = _list_places(kept, latent)
    parts = split_by_decile(kept.codes[latent, : len(places)], parts=DECILES)
    return [
        replace(places[place], decile=decile)
        for decile, part in enumerate(parts, start=1)
        for place in sorted(part.tolist())[:each]
    ]


def _read_texts(
    plan: ReadingPlan, codec: SparseCodec, latents: Sequence[int], rows: Sequence[int]
) -> dict[int, Float[Tensor, "models pos latent"]]:
    """Codes at every token of some texts; NaN where the codec does not look."""
    if not rows:
        return {}
    chats = [plan.chats[row] for row in rows]
    again = plan_reading(
        plan.model, chats, sites=codec.site, positions="all", batching=plan.batching
    )
    found: dict[int, Tensor] = {}

    def keep(_site: Site, x: Tensor, chosen: tuple[Selection, ...]) -> None:
        (selection,) = chosen
        values = selection.take(x)
        for own in selection.rows.unique().tolist():
            text = values[:, selection.rows == own]
            seen = plan.positions[0].mask(plan.tokenized[rows[own]])
            codes = torch.full((*text.shape[:2], len(latents)), math.nan, dtype=torch.float64)
            # Others are not encoded: a first token may be beyond what the codec can hold.
            codes[:, seen] = _encode(codec, text[:, seen], latents)
            found[rows[own]] = codes

    for _ in again.read(keep, TASK):
        pass
    return found


def _make_window(
    plan: ReadingPlan,
    codes: Float[Tensor, "models pos"],
    wanted: _Wanted,
    settings: ExplainSettings,
) -> TokenWindow:
    chat = plan.tokenized[wanted.chat]
    start = max(0, wanted.token - settings.before)
    stop = min(len(chat.ids), wanted.token + settings.after + 1)
    shown = codes[:, start:stop].tolist()
    return TokenWindow(
        chat=wanted.chat,
        chat_id=chat.id,
        token=wanted.token,
        start=start,
        pieces=chat.pieces[start:stop],
        codes=tuple(tuple(None if math.isnan(v) else v for v in row) for row in shown),
        code=float(codes[:, wanted.token].max()),
        decile=wanted.decile,
    )
