"""Training of autoencoders: what it finds, what sae_lens says of it, going on, and refusals."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch

from emlens.codecs.calibrate import calibrate_threshold
from emlens.codecs.checkpoint import read_checkpoint
from emlens.codecs.fit import measure_fit
from emlens.codecs.loop import CodecDivergedError
from emlens.codecs.rows import CorpusTooSmallError
from emlens.codecs.runtime import Sae
from emlens.codecs.sae_lens_package import import_sae_lens
from emlens.codecs.sae_trainer import SaeTrainer
from emlens.codecs.settings import SaeSettings
from emlens.codecs.train import read_training, train_sae
from emlens.encoding import ArtifactError
from emlens.runs import PlanChangedError
from emlens.sites import Site
from tests.codecs.planted import CutShort, Planted, best_cosines, draw_dictionary

DICTIONARY = draw_dictionary(20, 20)
L0 = 3
SETTINGS = SaeSettings(
    architecture="batchtopk",
    d_sae=24,
    k=L0,
    steps=300,
    batch_rows=256,
    learning_rate=1e-2,
    warmup_steps=10,
    decay_steps=80,
    dead_after_rows=4000,
    held_out_rows=1000,
)
SHORT = dataclasses.replace(SETTINGS, steps=40, checkpoint_every=15, decay_steps=10)


def corpus(rows=30_000):
    return Planted(DICTIONARY, l0=L0).corpus(rows)


def train(activations, out, *, settings=SHORT, seed=0, **given):
    return train_sae(
        activations, site="resid_post.3", settings=settings, out=out, seed=seed, **given
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One training to the end, and where it lies."""
    out = tmp_path_factory.mktemp("sae") / "run"
    return train(corpus(), out, settings=SETTINGS), out


def test_a_planted_dictionary_is_found_again(trained):
    sae, out = trained
    cosines = best_cosines(sae.W_dec, DICTIONARY)
    assert (cosines > 0.9).float().mean() >= 0.9
    assert best_cosines(draw_dictionary(24, 20, seed=9), DICTIONARY).mean() < 0.6
    fresh = measure_fit(sae, [Planted(DICTIONARY, l0=L0, seed=7).draw(5000)])
    assert fresh.explained_variance > 0.85
    record = read_training(out)
    assert record.held_out.explained_variance == pytest.approx(fresh.explained_variance, abs=0.03)
    assert record.rows_of_a_pass == 29_000
    assert (record.d_in, record.site, record.positions) == (20, "resid_post.3", "all")


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_other_architectures_find_it_too(tmp_path, architecture):
    widths = (12, 24) if architecture == "matryoshka" else None
    settings = dataclasses.replace(SETTINGS, architecture=architecture, matryoshka_widths=widths)
    sae = train(corpus(), tmp_path / "run", settings=settings)
    assert (best_cosines(sae.W_dec, DICTIONARY) > 0.9).float().mean() >= 0.5
    assert sae.architecture == {"matryoshka": "matryoshka_batchtopk"}.get(architecture, "topk")
    assert (sae.k, sae.threshold is None) == (
        (L0, True) if architecture == "topk" else (None, False)
    )


def test_curves_tell_how_it_went(trained):
    curves = read_training(trained[1]).curves
    assert curves.step.tolist() == [*range(0, 300, 10), 299]
    assert curves.loss[-1] < curves.loss[0] / 3
    assert curves.explained_variance[-1] > 0.85
    assert curves.explained_variance[0] < 0.3
    # A batch keeps the k largest a row, whatever the threshold will be.
    assert torch.allclose(curves.l0, torch.full_like(curves.l0, L0), atol=1e-3)
    assert ((curves.dead_share >= 0) & (curves.dead_share <= 1)).all()


def test_the_loop_trains_what_sae_lens_trains(tmp_path):
    # Not the normalisation: sae_lens measures it on batches that it then does not train on.
    settings = dataclasses.replace(SHORT, normalisation="none", checkpoint_every=None)
    data = torch.cat(corpus(20_000), dim=0)
    held, batches = data[:1000], data[1000:].split(256)
    ours = train(data[None].unbind(), tmp_path / "run", settings=settings)
    theirs = SaeTrainer(settings, batches[0], seed=0)
    theirs.trainer.data_provider = iter(batches)
    theirs.trainer.fit()
    folded = theirs.weights()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(ours, name), folded[name])
    assert measure_fit(ours, [held]) == read_training(tmp_path / "run").held_out


@pytest.mark.parametrize("architecture", ["batchtopk", "topk"])
def test_codes_are_those_of_the_model_that_sae_lens_saves(tmp_path, architecture):
    settings = dataclasses.replace(SHORT, architecture=architecture)
    trainer = SaeTrainer(settings, Planted(DICTIONARY, l0=L0).draw(256), seed=0)
    for batch in torch.cat(corpus(10_240)).split(256):
        trainer.step(batch, recording=False)
    planted = Planted(DICTIONARY, l0=L0, seed=8)
    ours, x = trainer.weights(), planted.draw(200)
    trainer.sae.fold_activation_norm_scaling_factor(
        trainer.trainer.activation_scaler.scaling_factor
    )
    trainer.sae.save_inference_model(tmp_path)
    theirs = import_sae_lens().SAE.load_from_disk(tmp_path)
    sae = Sae(
        name="here",
        architecture=architecture,
        site=Site(3, "resid_post"),
        k=L0 if architecture == "topk" else None,
        **ours,
    )
    codes = sae.encode(x)
    assert (codes.values > 0).any()
    assert torch.allclose(codes.values, theirs.encode(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(sae.decode(codes), theirs(x), rtol=1e-4, atol=1e-4)


def test_dead_latents_are_revived(tmp_path):
    # More vectors than fit beside one another, fewer places than there are of them, large steps:
    # latents lose their vectors to others.
    rows = Planted(draw_dictionary(96, 32), l0=6).corpus(26_000)
    recipe = dataclasses.replace(
        SETTINGS, d_sae=96, k=2, steps=250, decay_steps=60, dead_after_rows=5000
    )
    dead = {}
    for coefficient in (0.0, 1.0):
        settings = dataclasses.replace(recipe, aux_coefficient=coefficient)
        train(rows, tmp_path / str(coefficient), settings=settings)
        dead[coefficient] = read_training(tmp_path / str(coefficient)).curves.dead_share[-1]
    assert dead[0.0] > 0.2
    assert dead[1.0] < 0.08


def test_at_inference_as_many_latents_are_active_as_was_wanted(trained):
    sae, out = trained
    record = read_training(out)
    assert record.held_out.l0 == pytest.approx(L0, abs=1e-3)
    assert record.threshold == float(sae.threshold[0])
    fresh = Planted(DICTIONARY, l0=L0, seed=5).draw(5000)
    assert measure_fit(sae, [fresh]).l0 == pytest.approx(L0, rel=0.05)
    # The threshold that training itself leaves is an average since its first step, and far off.
    short = SaeTrainer(SHORT, fresh[:256], seed=0)
    for batch in fresh.split(256)[:19]:
        short.step(batch, recording=False)
    weights = short.weights()
    uncalibrated = dataclasses.replace(sae, **weights)
    assert abs(measure_fit(uncalibrated, [fresh]).l0 / L0 - 1) > 0.3
    calibrated = calibrate_threshold(uncalibrated, fresh, l0=float(L0))
    assert measure_fit(calibrated, [fresh]).l0 == pytest.approx(L0, abs=1e-3)


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path):
    whole = train(corpus(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(CutShort(corpus(), before=6), tmp_path / "cut")
    found: Any = read_checkpoint(tmp_path / "cut")
    assert found["step"] == 30
    with pytest.raises(ArtifactError, match="result"):
        read_training(tmp_path / "cut")
    resumed = train(corpus(), tmp_path / "cut")
    assert resumed.fingerprint == whole.fingerprint
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    first, second = (read_training(tmp_path / name) for name in ("whole", "cut"))
    assert torch.equal(first.curves.loss, second.curves.loss)
    assert first.held_out == second.held_out
    assert read_checkpoint(tmp_path / "cut") is None


def test_a_run_goes_on_over_the_end_of_a_pass(tmp_path):
    settings = dataclasses.replace(SHORT, least_firings=1, checkpoint_every=20)
    few = corpus(5000)  # 15 steps a pass
    whole = train(few, tmp_path / "whole", settings=settings)
    cut = CutShort(few, before=15, number=3)
    with pytest.raises(KeyboardInterrupt):
        train(cut, tmp_path / "cut", settings=settings)
    found: Any = read_checkpoint(tmp_path / "cut")
    assert found["step"] == 20
    resumed = train(few, tmp_path / "cut", settings=settings)
    assert resumed.fingerprint == whole.fingerprint


def test_a_finished_run_is_returned_as_it_is_and_another_plan_refused(trained):
    sae, out = trained
    again = train(corpus(), out, settings=dataclasses.replace(SETTINGS, checkpoint_every=7))
    assert again.fingerprint == sae.fingerprint
    changed = {
        r"settings.k was 3, now 4": {"settings": dataclasses.replace(SETTINGS, k=4)},
        r"seed was 0, now 1": {"seed": 1, "settings": SETTINGS},
        r"held_out was": {"held_out": [torch.randn(1000, 20)], "settings": SETTINGS},
    }
    for named, given in changed.items():
        with pytest.raises(PlanChangedError, match=named):
            train(corpus(), out, **given)
    with pytest.raises(PlanChangedError, match=r"activations.first was"):
        train([2 * part for part in corpus()], out, settings=SETTINGS)


def test_nan_ends_the_run_with_the_last_checkpoint_kept(tmp_path):
    parts = corpus()
    parts[7][5, 3] = torch.nan
    with pytest.raises(CodecDivergedError, match=r"batch of step 37 holds NaN.*after 30 steps"):
        train(parts, tmp_path / "run")
    found: Any = read_checkpoint(tmp_path / "run")
    assert found["step"] == 30
    repaired = train(corpus(), tmp_path / "run")
    assert repaired.fingerprint == train(corpus(), tmp_path / "whole").fingerprint


def test_a_loss_that_diverges_ends_the_run(tmp_path):
    settings = dataclasses.replace(SHORT, learning_rate=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(CodecDivergedError, match=r"step \d.*learning rate is probably too high"):
        train(corpus(), tmp_path / "run", settings=settings)
    kept = read_checkpoint(tmp_path / "run")
    if kept is not None:
        weights = kept["trainer"]["sae"].values()
        assert all(bool(weight.isfinite().all()) for weight in weights)


def test_too_small_a_corpus_is_refused_by_number(tmp_path):
    wanted = dataclasses.replace(SHORT, least_firings=1, max_passes=2)
    with pytest.raises(CorpusTooSmallError, match=r"3000 rows to train on, 2 passes.*10240 rows"):
        train(corpus(4000), tmp_path / "a", settings=wanted)
    assert not (tmp_path / "a").exists()
    with pytest.raises(CorpusTooSmallError, match=r"10240 rows.*1.28e\+03 times.*82000 rows"):
        train(corpus(), tmp_path / "b", settings=dataclasses.replace(SHORT, least_firings=10_250))
    with pytest.raises(CorpusTooSmallError, match=r"900 rows, and 1000 are held out"):
        train(iter(corpus(900)), tmp_path / "c")
    with pytest.raises(CorpusTooSmallError, match=r"held_out: fewer than the 1000 rows"):
        train(corpus(), tmp_path / "d", held_out=corpus(800))
    # An iterator is found too short when it ends.
    once = dataclasses.replace(wanted, max_passes=1)
    with pytest.raises(CorpusTooSmallError, match=r"7000 rows to train on, 1 passes"):
        train(iter(corpus(8000)), tmp_path / "e", settings=once)
    with pytest.raises(CorpusTooSmallError, match=r"ended after 7000 rows.*read once"):
        train(iter(corpus(8000)), tmp_path / "f", settings=wanted)


def test_half_precision_activations_are_trained_on_in_single(tmp_path):
    sae = train([part.bfloat16() for part in corpus()], tmp_path / "run")
    assert sae.W_dec.dtype is torch.float32


def test_importing_sae_lens_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_sae_lens().__name__ == "sae_lens"


def test_a_start_is_that_of_its_seed_and_leaves_every_random_stream_alone(monkeypatch):
    rows = Planted(DICTIONARY, l0=L0).draw(64)
    torch.manual_seed(5)
    expected = torch.rand(3)
    # What torch's own seeding calls for the devices beside the CPU.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("a GPU was seeded"))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    torch.default_generator.manual_seed(5)
    first, again, other = (SaeTrainer(SHORT, rows, seed=seed).sae.W_enc for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
