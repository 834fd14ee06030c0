"""Telling misaligned fine-tunes from aligned ones by what they changed in a few latents.

Latents that are chosen on the very models they then tell apart do so perfectly even among noise, if
there are enough of them. Only models that had no part in the choice say something.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.features.rank import leave_models_out
from emlens.features.results import FeatureDiff, check_different
from emlens.features.signature import (
    Fold,
    area_in_folds,
    bootstrap_area,
    deal_labels,
    score_held_out,
)
from emlens.numerics.intervals import Interval
from emlens.numerics.validation import check_finite

Validation = Literal["leave one domain out", "in sample"]


@dataclass(frozen=True, kw_only=True)
class PlainClassification:
    """How well fine-tunes are told apart by their mean differences, without any codec."""

    auc: Interval
    """As that of the latents, in the same folds."""
    p_value: float
    """Share of relabellings that give at least this area."""


@dataclass(frozen=True, kw_only=True)
class ModelClassification(Result):
    """How well fine-tunes are told apart by their deltas at a few latents, their signature."""

    kind: ClassVar[str] = "model_classification"

    models: tuple[str, ...]
    """Fine-tunes, one a row."""
    labels: Bool[Tensor, " model"]
    """Whether each is misaligned."""
    domains: tuple[str, ...] | None
    """What was left out together; None in sample."""
    validation: Validation
    """Whether the models that are told apart had a part in choosing latents and weights."""
    scores: Float[Tensor, " model"]
    """Higher for misaligned. Scores of different domains are on different scales: only those of
    one domain may be put in order."""
    auc: Interval
    """P(a misaligned model scores higher than an aligned one of the same fold)."""
    p_value: float
    """Share of relabellings that give at least this area. Latents are chosen anew for each; the
    choice of given ones is not counted."""
    p_method: str
    """How many relabellings, whether those were all, and whether the choice of latents counts."""
    by_mean_difference: PlainClassification
    """The baseline: every coordinate of the mean difference of activations takes part, weighted in
    the same way. Latents that do no better say nothing that plain activations do not."""
    folds: tuple[str, ...]
    """Domains left out in turn; one entry, `all`, in sample."""
    latents: Int[Tensor, "fold latent"]
    """Latents used in each fold."""
    chosen: bool
    """Whether they were chosen by the labels of the models not left out, or given."""
    training_only: tuple[str, ...]
    """Domains with models of one kind only: nothing in them can be told apart."""
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    seed: int
    """Of resamples and relabellings."""
    underpowered: bool
    """Whether the codec explains too little of one of the models."""

    claim: str
    """What the area may be called."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a fine-tune."""
        nothing = ("",) * len(self.models)
        return [
            {"model": name, "domain": domain, "misaligned": bool(label), "score": float(score)}
            | {"auc": self.auc.value, "p_value": self.p_value, "claim": self.claim}
            for name, domain, label, score in zip(
                self.models, self.domains or nothing, self.labels, self.scores, strict=True
            )
        ]


def classify_models(
    diffs: Sequence[FeatureDiff],
    labels: Sequence[bool],
    *,
    leave_out: Sequence[str] | None,
    latents: Sequence[int] | None = None,
    n_signature: int = 1,
    seed: int = 0,
) -> ModelClassification:
    """Tell misaligned from aligned fine-tunes by one latent, or by a signature of several.

    The score of a model is sum_i w_i delta_i over the latents used, w_i the difference of the two
    kinds' mean delta_i over their pooled variance (for one latent, a sign and a scale). Latents are
    those with the largest difference of means in pooled standard deviations. Both come from the
    models outside the fold. The area counts pairs inside one fold, since scores of different folds
    are not comparable.

    Args:
        diffs: comparisons of one base with each fine-tune, on the same prompts.
        labels: whether each is misaligned.
        leave_out: the domain of each fine-tune: each domain in turn is left out and told apart by
            latents chosen without it. None is in sample, and the result says so.
        latents: used instead of chosen ones. Nothing here knows what chose them: unless other
            models did, area and p-value flatter them, left-out domains or not.
        n_signature: how many are chosen.
        seed: of resamples and relabellings.

    Raises:
        ValueError: fewer than two of a kind, no domain that has both kinds, too few models to
            choose by when a domain is left out, comparisons that do not go together, a fine-tune
            that comes twice, or unknown latents.
        NonFiniteError: a delta is NaN or infinite.

    Source: Wang et al. 2025, arXiv 2506.19823, section 3 (one latent tells all models apart).
    Differs: left-out domains; theirs is in sample.
    """
    truth = torch.tensor([bool(label) for label in labels])
    _check_models(diffs, truth, leave_out)
    aligned = leave_models_out(diffs, ())
    deltas = torch.stack([own.delta.double() for own in aligned])
    check_finite("delta", deltas)
    given = None if latents is None else _check_latents(latents, deltas.shape[1])
    if given is None and not 1 <= n_signature <= deltas.shape[1]:
        raise ValueError(f"n_signature: got {n_signature}, expected 1 to {deltas.shape[1]}")
    folds = make_folds(truth, leave_out)
    used = len(given) if given is not None else n_signature
    dealt, exact = deal_labels(truth, folds, seed=seed)
    scores, chosen = score_held_out(deltas, dealt, folds, latents=given, n_latents=used)
    areas = area_in_folds(scores, dealt, folds)
    beyond = int((areas >= areas[0] - 1e-12).sum())
    which = "all" if exact else "random"
    counted = "latents chosen for each" if given is None else "the choice of latents not counted"
    return ModelClassification(
        models=tuple(own.tuned for own in diffs),
        labels=truth,
        domains=None if leave_out is None else tuple(leave_out),
        validation="in sample" if leave_out is None else "leave one domain out",
        scores=scores[0],
        auc=bootstrap_area(scores[0], truth, folds, seed=seed),
        p_value=beyond / len(areas),
        p_method=f"{which} {len(areas)} relabellings within folds, {counted}",
        by_mean_difference=_classify_plainly(aligned, dealt, folds, seed=seed),
        folds=tuple(fold.name for fold in folds),
        latents=chosen[0],
        chosen=given is None,
        training_only=_one_sided(truth, leave_out),
        codec=diffs[0].codec,
        codec_fingerprint=diffs[0].codec_fingerprint,
        seed=seed,
        underpowered=any(own.health.underpowered for own in diffs),
        claim=_name_claim(leave_out is not None, given is None),
    )


def _classify_plainly(
    diffs: Sequence[FeatureDiff],
    dealt: Bool[Tensor, "labelling model"],
    folds: Sequence[Fold],
    *,
    seed: int,
) -> PlainClassification:
    """The same by mean differences of activations, under the same labellings."""
    rows = torch.stack([own.mean_difference.double() for own in diffs])
    check_finite("mean_difference", rows)
    scores, _ = score_held_out(rows, dealt, folds, n_latents=rows.shape[1])
    areas = area_in_folds(scores, dealt, folds)
    return PlainClassification(
        auc=bootstrap_area(scores[0], dealt[0], folds, seed=seed),
        p_value=int((areas >= areas[0] - 1e-12).sum()) / len(areas),
    )


def _name_claim(left_out: bool, chosen: bool) -> str:
    if left_out and chosen:
        return "separation in domains that had no part in it"
    if left_out:
        return (
            "separation in domains that had no part in the weights; latents were given, and prove "
            "something only if other models chose them"
        )
    if chosen:
        return "in-sample separation: latents were chosen on the models they tell apart"
    return "separation by latents that were given, weighted in sample"


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


def make_folds(labels: Bool[Tensor, " model"], domains: Sequence[str] | None) -> tuple[Fold, ...]:
    """One fold for each domain that has models of both kinds; one of all models without domains.

    Raises:
        ValueError: no domain has both kinds, or leaving one out leaves fewer than two of a kind.
    """
    every = torch.arange(len(labels))
    if domains is None:
        return (Fold(name="all", test=every, train=every),)
    folds = []
    for name in dict.fromkeys(domains):
        inside = torch.tensor([own == name for own in domains])
        if bool(labels[inside].any()) and not bool(labels[inside].all()):
            folds.append(Fold(name=name, test=every[inside], train=every[~inside]))
    if not folds:
        raise ValueError(
            "leave_out: no domain has both misaligned and aligned models, so that the kind cannot "
            "be told from the domain; add the careful twin of each harmful fine-tune"
        )
    for fold in folds:
        n = int(labels[fold.train].sum())
        if min(n, len(fold.train) - n) < 2:
            raise ValueError(
                f"leave_out: without {fold.name!r} there are {n} misaligned and "
                f"{len(fold.train) - n} aligned models; two of each are needed to choose by"
            )
    return tuple(folds)


def _one_sided(labels: Tensor, domains: Sequence[str] | None) -> tuple[str, ...]:
    if domains is None:
        return ()
    kinds: dict[str, set[bool]] = {}
    for name, label in zip(domains, labels.tolist(), strict=True):
        kinds.setdefault(name, set()).add(label)
    return tuple(name for name, found in kinds.items() if len(found) == 1)


def _check_models(
    diffs: Sequence[FeatureDiff], labels: Tensor, domains: Sequence[str] | None
) -> None:
    for name, values in (("labels", labels), ("leave_out", domains)):
        if values is not None and (isinstance(values, str) or len(values) != len(diffs)):
            raise ValueError(f"{name}: got {len(values)}, expected one for each of {len(diffs)}")
    n = int(labels.sum())
    if min(n, len(labels) - n) < 2:
        raise ValueError(
            f"labels: {n} misaligned and {len(labels) - n} aligned models; expected two of each"
        )
    check_different("diffs", diffs)
    for own in diffs[1:]:
        if own.prompts != diffs[0].prompts:
            raise ValueError(
                f"diffs: {own.tuned} was compared on other prompts than {diffs[0].tuned}; models "
                "must not be told apart by their prompts"
            )


def _check_latents(latents: Sequence[int], d_sae: int) -> Int[Tensor, " latent"]:
    found = torch.tensor(list(latents), dtype=torch.long)
    if not len(found) or len(found.unique()) != len(found) or not _inside(found, d_sae):
        raise ValueError(
            f"latents: got {list(latents)[:10]}, expected different numbers from 0 to {d_sae - 1}"
        )
    return found


def _inside(latents: Tensor, d_sae: int) -> bool:
    return bool(((latents >= 0) & (latents < d_sae)).all())
