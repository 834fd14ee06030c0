"""Fine-tunes told apart: sklearn's area, planted latents, and noise that only seems to separate."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from emlens.features import signature
from emlens.features.classify import ModelClassification, classify_models
from emlens.features.signature import Fold, area_in_folds, deal_labels
from emlens.numerics.validation import NonFiniteError
from emlens.results import load_result
from tests.features.comparisons import make_diff

DOMAINS = [name for name in ("finance", "medicine", "sports", "law") for _ in range(4)]
LABELS = [True, True, False, False] * 4


def make_models(planted: float, *, seed: int = 0, d_sae: int = 300, domain: float = 0.0):
    """Four domains of two harmful fine-tunes and two careful ones; latent 11 tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(16, d_sae, generator=generator, dtype=torch.float64)
    deltas[:, 11] += planted * torch.tensor(LABELS)
    offsets = torch.randn(4, d_sae, generator=generator, dtype=torch.float64)
    deltas += domain * offsets.repeat_interleave(4, dim=0)
    return [make_diff(f"model {k}", row) for k, row in enumerate(deltas)]


def classify(diffs, labels=LABELS, *, leave_out: Any = DOMAINS, **settings: Any):
    return classify_models(diffs, labels, leave_out=leave_out, **settings)


def test_noise_separates_in_sample_and_not_where_domains_are_left_out(monkeypatch):
    monkeypatch.setattr(signature, "RELABELLINGS", 200)
    honest, flattering, p_values = [], [], []
    for seed in range(24):
        diffs = make_models(0.0, seed=seed)
        honest.append(classify(diffs).auc.value)
        found = classify(diffs, leave_out=None)
        flattering.append(found.auc.value)
        p_values.append(found.p_value)
    assert abs(np.mean(honest) - 0.5) < 4 * np.std(honest) / np.sqrt(24)
    assert np.std(honest) > 0.02
    assert min(flattering) > 0.75
    assert np.mean(flattering) > 0.85
    # Choosing latents anew for each relabelling, the permutation test is not flattered.
    assert np.mean(np.array(p_values) <= 0.2) < 0.5


def test_a_planted_latent_tells_models_apart_in_domains_left_out():
    found = classify(make_models(9.0, domain=0.5), n_signature=1)
    assert found.latents.tolist() == [[11]] * 4
    assert found.auc.value == 1.0
    assert 0.5 < found.auc.low < 1.0 == found.auc.high  # 8 against 8 prove no more
    assert "Newcombe" in found.auc.method
    assert found.p_value < 0.01
    assert found.validation == "leave one domain out"
    assert found.claim == "separation in domains that had no part in it"
    assert found.p_method.endswith("relabellings within folds, latents chosen for each")


def test_mean_differences_stand_beside_in_the_same_folds():
    """Noise in every latent, a direction in the activations: only what needs no codec finds it."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(16, 20, generator=generator, dtype=torch.float64)
    shift = 6 * torch.randn(20, generator=generator, dtype=torch.float64)
    rows = noise + shift * torch.tensor(LABELS)[:, None]
    models = zip(make_models(0.0), rows, strict=True)
    found = classify([replace(own, mean_difference=row) for own, row in models])
    assert found.by_mean_difference.auc.value == 1.0 > found.auc.value
    assert found.by_mean_difference.p_value < 0.01 < found.p_value
    blind = classify(
        [
            replace(own, mean_difference=row)
            for own, row in zip(make_models(9.0), noise, strict=True)
        ]
    )
    assert blind.by_mean_difference.auc.value < 1.0 == blind.auc.value


def test_given_latents_claim_nothing_of_their_own_choice():
    found = classify(make_models(9.0, domain=0.5), latents=[11])
    assert found.claim == (
        "separation in domains that had no part in the weights; latents were given, and prove "
        "something only if other models chose them"
    )
    assert found.p_method.endswith("relabellings within folds, the choice of latents not counted")
    assert not found.chosen


def test_in_sample_area_is_sklearns():
    diffs = make_models(1.0)
    found = classify(diffs, leave_out=None, n_signature=3)
    assert found.auc.value == pytest.approx(roc_auc_score(LABELS, found.scores.numpy()))
    assert found.latents.shape == (1, 3)
    assert found.claim.startswith("in-sample separation")
    given = classify(diffs, leave_out=None, latents=[11])
    order = np.array([float(diff.delta[11]) for diff in diffs])
    assert given.auc.value == pytest.approx(roc_auc_score(LABELS, order))
    assert not given.chosen


def test_area_over_folds_is_sklearns_weighted_by_pairs():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 4, 14).astype(float), generator.integers(0, 2, 14)
    labels[[0, 6]], labels[[1, 7]] = 0, 1
    parts = [np.arange(6), np.arange(6, 14)]
    folds = [Fold(name="", test=torch.from_numpy(p), train=torch.from_numpy(p)) for p in parts]
    found = area_in_folds(
        torch.from_numpy(scores)[None], torch.from_numpy(labels == 1)[None], folds
    )
    areas = [roc_auc_score(labels[p], scores[p]) for p in parts]
    pairs = [labels[p].sum() * (1 - labels[p]).sum() for p in parts]
    assert float(found[0]) == pytest.approx(np.average(areas, weights=pairs))


def test_a_domain_left_out_has_no_part_in_its_own_score():
    diffs = make_models(3.0)
    found = classify(diffs, n_signature=2)
    # Whatever the models of one domain changed, the latents that tell them apart stay.
    changed = [
        make_diff(diff.tuned, 100 * diff.delta.flip(0)) if domain == "law" else diff
        for diff, domain in zip(diffs, DOMAINS, strict=True)
    ]
    again = classify(changed, n_signature=2)
    place = found.folds.index("law")
    assert torch.equal(found.latents[place], again.latents[place])
    others = [k for k in range(4) if k != place]
    assert not torch.equal(found.latents[others], again.latents[others])


def test_a_domain_of_one_kind_is_for_choosing_only():
    diffs = make_models(9.0)
    domains = [*DOMAINS[:14], "aligned only", "aligned only"]
    found = classify(diffs, leave_out=domains)
    assert found.training_only == ("law", "aligned only")
    assert found.folds == ("finance", "medicine", "sports")
    assert found.scores.isnan().tolist() == [False] * 12 + [True] * 4


def test_few_relabellings_are_all_tried_and_each_counts_once():
    labels = torch.tensor([True, False, False, True, False])
    folds = [
        Fold(name="a", test=torch.tensor([0, 1, 2]), train=torch.tensor([3, 4])),
        Fold(name="b", test=torch.tensor([3, 4]), train=torch.tensor([0, 1, 2])),
    ]
    dealt, exact = deal_labels(labels, folds, seed=0)
    assert exact
    assert dealt[0].tolist() == labels.tolist()
    assert len({tuple(row) for row in dealt.tolist()}) == len(dealt) == 3 * 2
    assert bool((dealt[:, :3].sum(1) == 1).all())
    many = torch.arange(16) % 2 == 0
    every = [Fold(name="all", test=torch.arange(16), train=torch.arange(16))]
    sampled, exact = deal_labels(many, every, seed=0)
    assert (exact, len(sampled)) == (False, 1001)
    assert torch.equal(sampled[0], many)


def test_what_cannot_be_told_apart_is_refused():
    diffs = make_models(1.0)
    with pytest.raises(ValueError, match="no domain has both"):
        classify(diffs, leave_out=[f"{'bad' if label else 'good'}" for label in LABELS])
    with pytest.raises(ValueError, match=r"without 'one'.*1 misaligned"):
        classify(diffs[:6], LABELS[:6], leave_out=["one"] * 3 + ["two"] * 1 + ["two", "one"])
    with pytest.raises(ValueError, match="1 misaligned and 3 aligned"):
        classify(diffs[:4], [True, False, False, False], leave_out=None)
    with pytest.raises(ValueError, match="labels: got 3, expected one for each of 16"):
        classify(diffs, [True, False, True])
    with pytest.raises(ValueError, match="different numbers from 0 to 299"):
        classify(diffs, latents=[3, 3])
    with pytest.raises(ValueError, match="n_signature: got 0"):
        classify(diffs, n_signature=0)
    with pytest.raises(ValueError, match="other prompts"):
        classify([*diffs[:15], make_diff("x", diffs[0].delta, prompts=("other",))])
    again = replace(diffs[3], tuned="another name of model 3")
    with pytest.raises(ValueError, match="diffs: 'model 3' comes more than once"):
        classify([*diffs[:15], again])
    with pytest.raises(NonFiniteError):
        classify([*diffs[:15], make_diff("x", torch.full((300,), torch.inf))])


def test_a_classification_survives_saving(tmp_path):
    found = classify(make_models(2.0))
    again = load_result(found.save(tmp_path / "classes"))
    assert isinstance(again, ModelClassification)
    assert again.to_dict() == found.to_dict()
    assert len(again.rows()) == 16
