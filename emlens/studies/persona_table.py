"""Comparisons of all latents cut down to the chosen ones and to a line a model; nothing is run."""

from collections.abc import Sequence

import torch

from emlens.features import FeatureContrast, FeatureDiff, FeatureRanking
from emlens.features.results import value_or_none
from emlens.studies.choose_latents import ChosenLatent
from emlens.studies.persona_features import (
    SIGNIFICANT,
    ComparedModel,
    LatentInModel,
    PersonaFeature,
)
from emlens.studies.persona_settings import FineTune


def describe_models(
    members: Sequence[FineTune], diffs: Sequence[FeatureDiff]
) -> tuple[ComparedModel, ...]:
    """One line for each fine-tune."""
    return tuple(
        ComparedModel(
            tuned=diff.tuned,
            misaligned=one.misaligned,
            domain=one.domain,
            n_prompts=diff.n_prompts,
            n_tested=diff.n_tested,
            n_significant=int((diff.q_value <= SIGNIFICANT).sum()),
            why_untested=diff.why_untested,
        )
        for one, diff in zip(members, diffs, strict=True)
    )


def describe_features(
    chosen: Sequence[ChosenLatent],
    diffs: Sequence[FeatureDiff],
    *,
    n_harmful: int,
    contrast: FeatureContrast | None,
    by: FeatureRanking | None,
) -> tuple[PersonaFeature, ...]:
    """What comparisons say of the chosen latents.

    Args:
        chosen: in the order of the table.
        diffs: those with the behaviour first.
        n_harmful: how many these are.
        contrast: with the careful twins, where there are any.
        by: attribution of all latents, where it was asked for.
    """
    delta, cosine = (
        torch.stack([getattr(own, name).double() for own in diffs[:n_harmful]]).mean(0)
        for name in ("delta", "decoder_cosine")
    )
    return tuple(
        PersonaFeature(
            latent=one.latent,
            chosen_by=one.chosen_by,
            ranks=one.ranks,
            delta=float(delta[one.latent]),
            contrast=None if contrast is None else float(contrast.contrast[one.latent]),
            contrast_p=None if contrast is None else value_or_none(contrast.p_value[one.latent]),
            contrast_q=None if contrast is None else value_or_none(contrast.q_value[one.latent]),
            pairs_agreeing=None if contrast is None else int(contrast.pairs_agreeing[one.latent]),
            decoder_cosine=float(cosine[one.latent]),
            attribution=None if by is None else float(by.scores[by.rank_of(one.latent) - 1]),
            models=tuple(_describe_latent(one.latent, own) for own in diffs),
        )
        for one in chosen
    )


def _describe_latent(latent: int, diff: FeatureDiff) -> LatentInModel:
    return LatentInModel(
        tuned=diff.tuned,
        delta=float(diff.delta[latent]),
        mean_base=float(diff.mean_base[latent]),
        mean_tuned=float(diff.mean_tuned[latent]),
        frequency_base=float(diff.frequency_base[latent]),
        frequency_tuned=float(diff.frequency_tuned[latent]),
        prompts_fired=int(diff.prompts_fired[latent]),
        q_value=value_or_none(diff.q_value[latent]),
    )
