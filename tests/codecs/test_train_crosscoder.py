"""Training of crosscoders: latents of one model alone are found, and no others are called so."""

import dataclasses
from typing import Any

import pytest
import torch

from emlens.codecs.checkpoint import read_checkpoint
from emlens.codecs.codec import CodecError
from emlens.codecs.crosscoder import Crosscoder
from emlens.codecs.crosscoder_trainer import CrosscoderTrainer
from emlens.codecs.fit import CodecFit
from emlens.codecs.latent_scaling import measure_latent_scaling
from emlens.codecs.loop import CodecDivergedError
from emlens.codecs.settings import CrosscoderSettings
from emlens.codecs.train_crosscoder import (
    RESULT_NAME,
    CrosscoderTraining,
    measure_crosscoder_fit,
    train_crosscoder,
)
from emlens.results import load_result
from emlens.runs import PlanChangedError
from tests.codecs.planted import CutShort, Planted, draw_dictionary

SHARED, TUNED_ONLY, BASE_ONLY, WEAKER = range(28), range(28, 33), range(33, 36), range(4)
DICTIONARY = draw_dictionary(36, 24)
SCALES = torch.ones(2, 36)
SCALES[0, list(TUNED_ONLY)] = 0
SCALES[1, list(BASE_ONLY)] = 0
SCALES[0, list(WEAKER)] = 0.4
L0 = 3
SETTINGS = CrosscoderSettings(
    d_sae=48,
    k=L0,
    steps=500,
    batch_rows=256,
    learning_rate=5e-3,
    warmup_steps=20,
    decay_steps=150,
    dead_after_rows=4000,
    held_out_rows=1000,
)
SHORT = dataclasses.replace(SETTINGS, steps=30, decay_steps=5, checkpoint_every=10)


def corpus(rows=45_000):
    return Planted(DICTIONARY, l0=L0, scales=SCALES).corpus(rows)


def train(activations, out, *, settings=SHORT, seed=0, **given):
    return train_crosscoder(
        activations, site="resid_post.3", settings=settings, out=out, seed=seed, **given
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One training to the end, and where it lies."""
    out = tmp_path_factory.mktemp("crosscoder") / "run"
    return train(corpus(), out, settings=SETTINGS), out


def find_planted(decoder, latents):
    """The planted vector that each latent is along, -1 for none (cosine below .8)."""
    unit = torch.nn.functional.normalize(decoder[latents], dim=1)
    best = (unit @ DICTIONARY.T).max(1)
    return torch.where(best.values > 0.8, best.indices, -1).tolist()


def test_latents_of_one_model_alone_are_found_and_no_others_called_so(trained):
    crosscoder, _ = trained
    fresh = Planted(DICTIONARY, l0=L0, scales=SCALES, seed=4).draw(4000)
    scaling = measure_latent_scaling(crosscoder, [fresh])
    kinds: Any = (("tuned_only", TUNED_ONLY, 1), ("base_only", BASE_ONLY, 0))
    for kind, planted, model in kinds:
        found = find_planted(crosscoder.W_dec[model], scaling.latents(kind))
        precision = sum(number in planted for number in found) / len(found)
        recall = len(set(found) & set(planted)) / len(planted)
        assert precision >= 0.8, (kind, found)
        assert recall >= 0.8, (kind, found)
    of_both = find_planted(crosscoder.W_dec[1], scaling.latents("shared"))
    assert set(WEAKER) <= set(of_both)
    assert len(set(of_both) & set(SHARED)) >= 0.8 * len(SHARED)


def test_nothing_is_called_one_models_alone_where_both_have_all(tmp_path):
    rows = Planted(DICTIONARY, l0=L0, scales=torch.ones(2, 36)).corpus(45_000)
    crosscoder = train(rows, tmp_path / "run", settings=SETTINGS)
    scaling = measure_latent_scaling(crosscoder, rows[:4])
    assert len(scaling.latents("tuned_only")) + len(scaling.latents("base_only")) == 0
    assert len(scaling.latents("shared")) > 30


def test_the_record_says_how_it_fits_unseen_tokens(trained):
    crosscoder, out = trained
    record = load_result(out / "results" / RESULT_NAME)
    assert isinstance(record, CrosscoderTraining)
    fresh = Planted(DICTIONARY, l0=L0, scales=SCALES, seed=5).draw(4000)
    measured = measure_crosscoder_fit(crosscoder, [fresh[:, :1500], fresh[:, 1500:]])
    for kept, found in zip(record.held_out, measured, strict=True):
        assert isinstance(kept, CodecFit)
        assert kept.l0 == pytest.approx(L0, abs=1e-3)
        assert found.l0 == pytest.approx(L0, rel=0.05)
        assert found.explained_variance > 0.9
        assert kept.explained_variance == pytest.approx(found.explained_variance, abs=0.02)
    assert record.threshold == float(crosscoder.threshold[0])
    assert record.codec_fingerprint == crosscoder.fingerprint
    assert isinstance(load_result(record.codec), Crosscoder)


@torch.no_grad()
def test_what_comes_out_computes_what_was_trained(trained):
    _, out = trained
    trainer = CrosscoderTrainer(SHORT, corpus(1000)[0], seed=0)
    batch = 3 * Planted(DICTIONARY, l0=L0, scales=SCALES, seed=6).draw(300)
    with torch.enable_grad():
        for _ in range(5):
            trainer.step(batch, recording=False)
    codes, _ = trainer._encode(batch * trainer.scale)
    said = trainer._decode(codes) / trainer.scale
    weights = trainer.weights()
    made = Crosscoder(
        name="here",
        architecture="batchtopk",
        site=train(corpus(), out, settings=SETTINGS).site,
        threshold=torch.zeros(48),
        **weights,
    )
    values = made.encode(batch[0], batch[1]).values
    least = values[codes > 0].min()
    kept = torch.where(values >= least * (1 - 1e-6), values, 0)
    assert torch.equal(kept > 0, codes > 0)
    again = torch.einsum("ns,msd->mnd", kept, made.W_dec) + made.b_dec[:, None]
    assert torch.allclose(again, said, rtol=1e-4, atol=1e-3)
    norms = made.W_dec.norm(dim=2).sum(0)
    assert torch.allclose(norms, torch.ones(48), rtol=1e-5)


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path):
    whole = train(corpus(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(CutShort(corpus(), before=3), tmp_path / "cut")
    found: Any = read_checkpoint(tmp_path / "cut")
    assert found["step"] == 20
    resumed = train(corpus(), tmp_path / "cut")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    with pytest.raises(PlanChangedError, match=r"settings.k was 3, now 4"):
        train(corpus(), tmp_path / "cut", settings=dataclasses.replace(SHORT, k=4))


def test_dead_latents_are_revived(tmp_path):
    # Latents that begin pointing away from every row; half of what there is to say is theirs.
    share = {}
    for coefficient in (0.0, 1 / 32):
        settings = dataclasses.replace(
            SETTINGS, d_sae=36, steps=250, aux_coefficient=coefficient, dead_after_rows=2000
        )
        planted = Planted(DICTIONARY, l0=L0, scales=SCALES)
        trainer = CrosscoderTrainer(settings, planted.draw(256), seed=0)
        with torch.no_grad():
            trainer.weights_now["b_enc"][:18] = -8.0
        for _ in range(249):
            trainer.step(planted.draw(256), recording=False)
        last: Any = trainer.step(planted.draw(256), recording=True)
        share[coefficient] = last.dead_share
    assert share[0.0] >= 0.4
    assert share[1 / 32] < 0.25


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    with pytest.raises(CodecError, match=r"tensors of 3 models, expected 2"):
        train([torch.randn(3, 45_000, 24)], tmp_path / "a")
    with pytest.raises(CodecError, match=r"shape \(45000, 24\).*\[models, n, d_in\]"):
        train([torch.randn(45_000, 24)], tmp_path / "b")
    parts = corpus()
    parts[2][1, 7, 3] = torch.inf
    with pytest.raises(CodecDivergedError, match=r"batch of step 13 holds NaN.*after 10 steps"):
        train(parts, tmp_path / "c")
