"""Fine-tunes told apart by mean differences alone: the baseline of doing so by latents."""

from collections.abc import Sequence

import torch

from emlens.features import FeatureDiff
from emlens.features.classify import make_folds
from emlens.features.signature import (
    area_in_folds,
    bootstrap_area,
    deal_labels,
    score_held_out,
)
from emlens.studies.persona_features import PlainClassification


def why_not_told_apart(labels: Sequence[bool], leave_out: Sequence[str] | None) -> str:
    """Why fine-tunes are too few to be told apart; empty where they are enough.

    Args:
        labels: whether each is misaligned.
        leave_out: the domain of each, where domains are left out in turn.
    """
    n = sum(labels)
    if min(n, len(labels) - n) < 2:
        return (
            f"{n} misaligned and {len(labels) - n} aligned fine-tunes; two of each are needed, and "
            "three domains to leave one out"
        )
    try:
        make_folds(torch.tensor(labels), leave_out)
    except ValueError as error:
        return str(error)
    return ""


def classify_plainly(
    diffs: Sequence[FeatureDiff],
    labels: Sequence[bool],
    *,
    leave_out: Sequence[str] | None,
    seed: int = 0,
) -> PlainClassification:
    """Tell misaligned from aligned fine-tunes as `classify_models` does, by mean differences.

    Every coordinate of the mean difference takes part, weighted by the models outside the fold.

    Args:
        diffs: comparisons of one base with each fine-tune, on the same prompts.
        labels: whether each is misaligned.
        leave_out: the domain of each; None is in sample.
        seed: of resamples and relabellings.

    Raises:
        ValueError: too few models, see `classify_models`.
    """
    truth = torch.tensor([bool(label) for label in labels])
    rows = torch.stack([own.mean_difference.double() for own in diffs])
    folds = make_folds(truth, leave_out)
    dealt, _ = deal_labels(truth, folds, seed=seed)
    scores, _ = score_held_out(rows, dealt, folds, n_latents=rows.shape[1])
    areas = area_in_folds(scores, dealt, folds)
    return PlainClassification(
        auc=bootstrap_area(scores[0], truth, folds, seed=seed),
        p_value=int((areas >= areas[0] - 1e-12).sum()) / len(areas),
    )
