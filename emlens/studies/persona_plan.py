"""What a search for persona features needs before it begins, and all that decides what it finds."""

from typing import Any

from emlens.codecs import SparseCodec, check_fits
from emlens.data.prompts import hash_chats
from emlens.features import pair_by_prompt
from emlens.features.steering import require_autoencoder
from emlens.models.protocol import HookedModel
from emlens.models.views import origin_of
from emlens.models.weight_hash import hash_tensors
from emlens.studies.compare_by_latents import plan_comparison
from emlens.studies.follow_latents import FollowedTexts
from emlens.studies.persona_features import PersonaFeatures
from emlens.studies.persona_settings import (
    FineTunes,
    PersonaProbe,
    PersonaSettings,
    PersonaTexts,
)


def check_search(
    base: HookedModel,
    codec: SparseCodec,
    texts: PersonaTexts,
    settings: PersonaSettings,
    probe: PersonaProbe,
) -> None:
    """Refuse a codec that does not fit, and what lacks its texts, before a folder is begun.

    Raises:
        CodecError: a codec of another site, width or model, or a crosscoder.
        ValueError: a signature of more latents than there are; fixed responses are missing, too
            few, or not to the same prompts.
    """
    require_autoencoder(codec)
    check_signature(settings, codec.d_sae)
    loaded: Any = base
    check_fits(codec, base.cfg, weights=origin_of(loaded).lineage)
    needs = {
        "probe.screen": probe.screen is not None,
        "settings.attribute": settings.attribute,
        "probe.path": probe.path is not None,
    }
    missing = [name for name, wanted in needs.items() if wanted and texts.contrast is None]
    if missing:
        raise ValueError(
            f"texts.contrast: got none, and {' and '.join(missing)} needs fixed misaligned and "
            "aligned responses"
        )
    if settings.attribute:
        assert texts.contrast is not None
        pair_by_prompt(texts.contrast)
    if probe.path is not None:
        assert texts.contrast is not None
        FollowedTexts(chats=texts.chats, contrast=texts.contrast)


def check_signature(settings: PersonaSettings, d_sae: int | None) -> None:
    """Refuse more latents to tell models apart by than a codec has.

    Args:
        settings: of a search.
        d_sae: latents of the codec; None where nobody knows.

    Raises:
        ValueError: it has fewer.
    """
    if d_sae is not None and settings.n_signature > d_sae:
        raise ValueError(
            f"settings.n_signature: got {settings.n_signature}, but the codec has {d_sae} latents"
        )


def plan_search(
    base: HookedModel,
    fine_tunes: FineTunes,
    codec: SparseCodec,
    texts: PersonaTexts,
    settings: PersonaSettings,
    probe: PersonaProbe,
) -> dict[str, Any]:
    """All that decides a run, models and texts by what they hold."""
    contrast, screen, path = texts.contrast, probe.screen, probe.path
    asked = ("batching", "chats")
    return {
        "kind": PersonaFeatures.kind,
        **plan_comparison(base, fine_tunes, codec, settings.comparison),
        "settings": {k: v for k, v in vars(settings).items() if k != "comparison"},
        "chats": hash_chats(texts.chats),
        "corpus": hash_chats(texts.corpus) if texts.corpus else None,
        "positive": None if contrast is None else hash_chats(contrast.positive),
        "negative": None if contrast is None else hash_chats(contrast.negative),
        "screen": screen and {k: v for k, v in vars(screen).items() if k not in asked},
        "screen_chats": hash_chats(screen.chats) if screen and screen.chats else None,
        "judge": None if probe.judge is None else probe.judge.id,
        "path": None if path is None else path.trajectory.fingerprint(),
        "path_twin": path.twin.fingerprint() if path and path.twin else None,
        "path_every": None if path is None else path.every,
        "path_latents": None if path is None else path.n_latents,
        "directions": hash_tensors((str(one.site), one.vector) for one in probe.directions),
    }
