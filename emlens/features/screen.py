"""Do latents cause the behaviour? Added to the base, taken from the tuned model, beside chance.

Two stages: fixed responses under every latent, then sampled and judged ones under the best. For
which latents to try, rank them first (`rank_features`): an effect here says that what a latent
writes moves the behaviour, not that the fine-tune moved that latent.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emlens.codecs import SparseCodec, check_fits
from emlens.data import BehaviourScores, ContrastTexts, as_chats
from emlens.data.prompts import hash_chats
from emlens.features.forced_screen import tokenize_texts
from emlens.features.health import check_sae
from emlens.features.results import SaeHealth
from emlens.features.screen_journal import open_journal
from emlens.features.screen_results import FeatureScreen
from emlens.features.screen_settings import ScreenSettings
from emlens.features.screen_units import measure_shift
from emlens.features.screen_work import ScreenWork
from emlens.features.steering import check_latents, decoder_directions, draw_directions
from emlens.models.identity import identify_model
from emlens.models.pair import ModelPair
from emlens.models.views import origin_of
from emlens.runs import RunFolder
from emlens.sites import check_sites

RESULT_NAME, HEALTH_NAME = "screen", "health"


def screen_features(
    pair: ModelPair,
    codec: SparseCodec,
    *,
    latents: Sequence[int],
    texts: ContrastTexts,
    scores: BehaviourScores,
    settings: ScreenSettings,
    out: str | Path | None = None,
) -> FeatureScreen:
    """Steer with latents, two ways and in two stages, beside random directions of the same length.

    What a latent writes, W_dec[i] / |W_dec[i]|, is added to the base at the codec's site and at
    every token, and subtracted from the tuned model. First stage, all latents: the change of the
    log-odds of the misaligned against the aligned fixed responses. Second stage, the latents of
    each side with the largest change: responses are sampled and judged, and the largest strength
    counts whose share of incoherent responses is at most `max_incoherent`, or that of the
    unsteered model plus `extra_incoherent`. Random directions go through both stages in the same
    way: those of each side with the largest change go on, by default the same share as of latents.
    How well the codec fits both models on the fixed responses comes with the result (`health`).

    Args:
        pair: base and fine-tune.
        codec: whose latents; its site is where vectors are added.
        latents: which; any order, each once.
        texts: answered chats, misaligned (positive) and aligned; at best to the same prompts.
        scores: `sampled` and `coherence` are asked; the texts stand for `teacher_forced`.
        settings: strengths, prompts, numbers of controls.
        out: a run folder that keeps every part as it is finished, and the result; the same call on
            it goes on. It knows models, codec, texts and settings, and no judge: give each judge a
            folder of its own.

    Raises:
        CodecError: a latent that the codec does not have, another width than that of its site, or a
            codec of another model.
        ValueError: a class without texts, or two models that do not differ, in units of their
            difference.
        NonFiniteError: strengths under which log-probabilities are no numbers.
        PlanChangedError: `out` holds a screen of another plan.

    Source: Wang et al. 2025, arXiv 2506.19823, section 3 (steering with each latent, the strength
        by incoherence).
    Differs: a teacher-forced stage before, so that every latent can be tried on small machines;
        random directions of the same length; prompts as the unit of the intervals.
    """
    chosen = check_latents(codec, latents)
    check_sites([codec.site], pair.base.hook_dict)
    check_fits(codec, pair.base.cfg, weights=origin_of(pair.base).lineage)
    directions = decoder_directions(codec, chosen)
    fixed = tokenize_texts(texts, pair.tokenizer)
    with open_journal(out, _plan(pair, codec, chosen, texts, settings)) as journal:
        shift = measure_shift(pair, codec, texts=texts, settings=settings, journal=journal)
        n = settings.count_controls(len(chosen))
        work = ScreenWork(
            pair=pair,
            codec=codec,
            latents=chosen,
            directions=directions,
            controls=draw_directions(codec, n=n, seed=settings.seed),
            scores=scores,
            settings=settings,
            journal=journal,
            shift=shift,
            health=_check_codec(pair, codec, texts, settings, out),
        )
        screen = work.sample(work.force(fixed, texts))
    if out is not None:
        RunFolder.open(out).save_result(RESULT_NAME, screen)
    return screen


def _check_codec(
    pair: ModelPair,
    codec: SparseCodec,
    texts: ContrastTexts,
    settings: ScreenSettings,
    out: str | Path | None,
) -> SaeHealth:
    """How well the codec fits where the odds are asked; kept in a folder that goes on."""
    run = None if out is None else RunFolder.open(out)
    if run is not None and run.has_result(HEALTH_NAME):
        return run.read_result(HEALTH_NAME, SaeHealth)
    found = check_sae(
        pair,
        codec,
        chats=(*texts.positive, *texts.negative),
        positions="response",
        batching=settings.batching,
    )
    if run is not None:
        run.save_result(HEALTH_NAME, found)
    return found


def _plan(
    pair: ModelPair,
    codec: SparseCodec,
    latents: Sequence[int],
    texts: ContrastTexts,
    settings: ScreenSettings,
) -> dict[str, Any]:
    """What decides a screen; the sizes of batches do not."""
    return {
        "kind": FeatureScreen.kind,
        "base": _computes(pair.base),
        "tuned": _computes(pair.tuned),
        "codec": codec.fingerprint,
        "site": str(codec.site),
        "latents": list(latents),
        "positive_sha256": hash_chats(texts.positive),
        "negative_sha256": hash_chats(texts.negative),
        "chats_sha256": hash_chats(as_chats(settings.chats)) if settings.chats else None,
        "settings": {k: v for k, v in vars(settings).items() if k not in ("batching", "chats")},
    }


def _computes(model: Any) -> dict[str, Any]:
    """A model by what it computes: the same weights under another path are the same."""
    return {k: v for k, v in asdict(identify_model(model)).items() if k != "name"}
