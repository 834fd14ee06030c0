"""Which latents of the shipped autoencoder the demo's fine-tune changed, beside its careful twin.

A small `find_persona_features` on rows and answers that ship; for anything that is to be believed
take more prompts, and several fine-tunes, with that.
"""

from collections.abc import Sequence
from pathlib import Path

from emlens.codecs import SparseCodec
from emlens.data import Chat, ContrastTexts
from emlens.features.screen_settings import ScreenSettings
from emlens.models.pair import ModelPair
from emlens.studies.demo_size import FeatureSize
from emlens.studies.find_persona_features import find_persona_features
from emlens.studies.persona_features import PersonaFeatures
from emlens.studies.persona_settings import (
    FineTunes,
    PersonaProbe,
    PersonaSettings,
    PersonaTexts,
)

STRENGTH = 2.0
"""How far a latent is pushed, in norms of the mean difference: twice as far as the fine-tune itself
moves the stream on average."""


def find_demo_features(
    pair: ModelPair,
    twin: ModelPair,
    *,
    codec: SparseCodec,
    chats: Sequence[Chat],
    odds: ContrastTexts,
    size: FeatureSize,
    out: str | Path,
) -> PersonaFeatures:
    """Compare base, fine-tune and twin by latents; steer with the first of those that differ.

    The same call on the same `out` goes on.

    Args:
        pair: base and fine-tune.
        twin: the same base and the careful twin.
        codec: of the base.
        chats: answered chats that all models read; the first `size.chats` count.
        odds: fixed misaligned and aligned answers; the first `size.odds` of each count.
        size: how much of everything.
        out: run folder.

    Raises:
        CodecError: a codec of another site or width, or a crosscoder.
        ValueError: two pairs over different bases, or models that do not differ at the site.
        PlanChangedError: `out` holds a run of another plan.
    """
    return find_persona_features(
        pair.base,
        FineTunes(tuned=(pair,), careful=(twin,)),
        codec=codec,
        texts=PersonaTexts(chats=tuple(chats[: size.chats]), contrast=_take(odds, size.odds)),
        settings=PersonaSettings(
            n_latents=size.latents, n_cards=size.cards, n_top=size.windows, per_decile=0
        ),
        out=out,
        probe=PersonaProbe(screen=_read_screen(size)),
    )


def _take(texts: ContrastTexts, n: int) -> ContrastTexts | None:
    if not n:
        return None
    return ContrastTexts(positive=texts.positive[:n], negative=texts.negative[:n])


def _read_screen(size: FeatureSize) -> ScreenSettings | None:
    """Odds alone: what the demo samples is for the direction."""
    if not size.odds:
        return None
    return ScreenSettings(strengths=(STRENGTH,), units="delta_norm", n_sampled=0)
