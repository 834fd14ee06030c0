"""Cards of latents from a corpus: windows by strength, tokens promoted, cosines beside chance.

To see what a latent may mean. Whether it causes anything is a question for `screen_features`.
"""

from collections.abc import Sequence
from dataclasses import replace

from emlens.activations import ReadingPlan
from emlens.codecs.codec import SparseCodec
from emlens.data import Chat, as_chats
from emlens.data.prompts import hash_chats
from emlens.features.accumulate import PromptSums
from emlens.features.cards import FeatureCard, FeatureCards
from emlens.features.compare import average_activations
from emlens.features.explain_settings import ExplainSettings
from emlens.features.find_windows import LatentWindows, find_windows
from emlens.features.health import summarise_health
from emlens.features.logit_lens import LogitLens, read_logit_lens, writes_residual
from emlens.features.reading import plan_codes
from emlens.features.steering import check_latents, decoder_directions
from emlens.features.vector_cosines import (
    VectorCosine,
    compare_with_directions,
    compare_with_writes,
)
from emlens.models.lora import LoraAdapter
from emlens.models.reading import Readable, base_of, count_models, identify
from emlens.models.write_vectors import list_write_vectors
from emlens.vectors import Direction, Provenance


def explain_features(
    model: Readable,
    codec: SparseCodec,
    *,
    latents: Sequence[int],
    chats: Sequence[Chat | str],
    directions: Sequence[Direction] = (),
    adapter: LoraAdapter | None = None,
    settings: ExplainSettings = ExplainSettings(),  # noqa: B008 - frozen
) -> FeatureCards:
    """Look at a corpus through some latents, and at the output through what they write.

    The corpus is read once; the few texts that windows are cut from are read again. Of a pair both
    models read the same tokens, and the larger of their two codes decides. How well the codec fits
    the corpus comes with the cards (`health`): where it is `underpowered`, what a latent goes along
    with is little of what happens there.

    Args:
        model: one model, or a pair.
        codec: whose latents.
        latents: which, in any order.
        chats: prompts (str) or chats; the more various, the better.
        directions: at sites with the axes of the codec's; a pair's mean difference on these texts
            joins them.
        adapter: whose write vectors are compared with; by default that of a pair.
        settings: how much is kept.

    Raises:
        CodecError: a latent that the codec does not have, or a codec of another width.
        ValueError: a site or positions that model or chats do not have, or a direction at a site of
            other axes.

    Source: Bricken et al. 2023, Towards Monosemanticity (windows from every part of the activation
        distribution); Wang et al. 2025, arXiv 2506.19823, section 3 (latents by top windows).
    """
    chosen = check_latents(codec, latents)
    vectors = decoder_directions(codec, chosen)
    given = as_chats(chats)
    plan = plan_codes(model, codec, given, positions=settings.positions, batching=settings.batching)
    near = compare_with_directions(vectors, directions, site=codec.site)
    adapter = getattr(model, "adapter", None) if adapter is None else adapter
    base = base_of(model)
    residual = writes_residual(codec.site)
    writes = list_write_vectors(base, adapter) if adapter is not None and residual else ()
    written = compare_with_writes(vectors, writes)
    windows, fit = find_windows(plan, codec, chosen, settings=settings)
    sums = [part.result() for part in fit.models]
    plain = compare_with_directions(vectors, _mean_difference(plan, codec, sums), site=codec.site)
    lenses: Sequence[LogitLens | None] = (
        read_logit_lens(base, vectors.float(), n_tokens=settings.n_tokens)
        if residual
        else [None] * len(chosen)
    )
    near = [own + more for own, more in zip(near, plain, strict=True)]
    cards = [
        _make_card(codec, latent, windows[k], lens=lenses[k], directions=near[k], writes=written[k])
        for k, latent in enumerate(chosen)
    ]
    identity = identify(model)
    return FeatureCards(
        base=identity.base,
        base_fingerprint=identity.base_fingerprint,
        tuned=identity.tuned,
        tuned_fingerprint=identity.tuned_fingerprint,
        adapter_fingerprint=identity.adapter_fingerprint,
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        site=str(codec.site),
        positions=str(plan.positions[0]),
        models=("base", "tuned") if count_models(model) == 2 else ("model",),
        chats_sha256=hash_chats(given),
        n_chats=len(given),
        n_tokens=windows[0].n_tokens,
        seed=settings.seed,
        health=summarise_health(plan, codec, sums, fit.change()),
        cards=tuple(_explain(card, settings) for card in cards),
    )


def _make_card(
    codec: SparseCodec,
    latent: int,
    found: LatentWindows,
    *,
    lens: LogitLens | None,
    directions: tuple[VectorCosine, ...],
    writes: tuple[VectorCosine, ...],
) -> FeatureCard:
    return FeatureCard(
        latent=latent,
        link=codec.link(latent),
        active_share=found.active / found.n_tokens,
        decoder_norm=float(codec.W_dec[latent].double().norm()),
        top=found.top,
        sampled=found.sampled,
        lens=lens,
        directions=directions,
        writes=writes,
    )


def _explain(card: FeatureCard, settings: ExplainSettings) -> FeatureCard:
    if settings.explainer is None:
        return card
    return replace(card, explanation=settings.explainer(card))


def _mean_difference(
    plan: ReadingPlan, codec: SparseCodec, sums: Sequence[PromptSums]
) -> tuple[Direction, ...]:
    """What needs no codec, beside every card of a pair: none where the models do not differ."""
    if len(sums) != 2:
        return ()
    vector = average_activations(sums[1]) - average_activations(sums[0])
    if not bool(vector.any()):
        return ()
    provenance = Provenance(
        construction="model@positive",
        positions=str(plan.positions[0]),
        note="mean difference of the two models on these texts",
    )
    return (Direction(site=codec.site, vector=vector, provenance=provenance),)
