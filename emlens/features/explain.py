"""Cards of latents from a corpus: windows by strength, tokens promoted, cosines beside chance.

To see what a latent may mean. Whether it causes anything is a question for `screen_features`.
"""

from collections.abc import Sequence
from dataclasses import replace

from emlens.codecs.codec import SparseCodec
from emlens.data import Chat, as_chats
from emlens.data.prompts import hash_chats
from emlens.features.cards import FeatureCard, FeatureCards
from emlens.features.explain_settings import ExplainSettings
from emlens.features.find_windows import find_windows
from emlens.features.health import finish_health
from emlens.features.logit_lens import read_logit_lens, writes_residual
from emlens.features.reading import plan_codes
from emlens.features.steering import check_latents, decoder_directions
from emlens.features.vector_cosines import compare_with_directions, compare_with_writes
from emlens.models.lora import LoraAdapter
from emlens.models.reading import Readable, base_of, count_models, identify
from emlens.models.write_vectors import list_write_vectors
from emlens.vectors import Direction


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
        directions: such as mean differences, at sites with the axes of the codec's.
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
    lenses = (
        read_logit_lens(base, vectors.float(), n_tokens=settings.n_tokens) if residual else None
    )
    cards = [
        FeatureCard(
            latent=latent,
            link=codec.link(latent),
            active_share=windows[k].active / windows[k].n_tokens,
            decoder_norm=float(codec.W_dec[latent].double().norm()),
            top=windows[k].top,
            sampled=windows[k].sampled,
            lens=None if lenses is None else lenses[k],
            directions=near[k],
            writes=written[k],
        )
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
        health=finish_health(plan, codec, fit),
        cards=tuple(_explain(card, settings) for card in cards),
    )


def _explain(card: FeatureCard, settings: ExplainSettings) -> FeatureCard:
    if settings.explainer is None:
        return card
    return replace(card, explanation=settings.explainer(card))
