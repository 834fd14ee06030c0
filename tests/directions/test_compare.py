"""Cosines beside their baselines, and isotropic directions."""

import dataclasses

import numpy as np
import pytest
import torch

from emlens.directions import CosineMatrix, compare_directions, sample_directions
from emlens.numerics.validation import WidthError
from emlens.results import load_result
from emlens.sites import Site, SiteError
from emlens.vectors import Direction, Directions, Provenance

MADE = Provenance(construction="data@tuned", base_fingerprint="b")


def make_directions(layers=(0, 1, 2), width=8, *, seed=0, controls=True, **fields):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions = tuple(
        Direction(
            site=Site(layer, "resid_post"),
            vector=3 * normal(width),
            resid_norm=7.0,
            split_half_cosine=0.1 * layer,
            provenance=MADE,
        )
        for layer in layers
    )
    if controls:
        fields |= {
            "covariance_matched": normal(len(layers), 16, width) * torch.arange(1, width + 1)
        }
        fields |= {"shuffled": normal(len(layers), 5, width)}
    return Directions(directions=directions, **fields)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_cosines_and_their_baselines_are_those_of_a_plain_loop():
    own, other = make_directions(), make_directions(seed=1, controls=False)
    got = compare_directions({"first": own, "second": other})
    assert got.labels == tuple(f"{n} resid_post.{k}" for n in ("first", "second") for k in range(3))
    vectors = [d.vector.numpy() for d in (*own, *other)]
    assert own.covariance_matched is not None
    assert own.shuffled is not None
    for i in range(6):
        for j in range(6):
            assert float(got.cosines[i, j]) == pytest.approx(cosine(vectors[i], vectors[j]))
            for name in ("covariance_matched", "shuffled"):
                controls = getattr(own, name).numpy()
                found = [cosine(c, vectors[j]) for c in controls[i]] if i < 3 else []
                found += [cosine(c, vectors[i]) for c in controls[j]] if j < 3 else []
                expected = np.sqrt(np.mean(np.square(found))) if found else np.nan
                short = name.removesuffix("_matched")
                rms = float(getattr(got, f"{short}_rms")[i, j])
                assert rms == pytest.approx(expected, nan_ok=True)
    assert got.isotropic_std == pytest.approx(8**-0.5)
    assert got.split_half_cosines == pytest.approx((0, 0.1, 0.2) * 2)
    assert len(got.rows()) == 15
    assert got.rows()[0]["cosine"] == pytest.approx(cosine(vectors[0], vectors[1]))


def test_random_directions_are_as_far_apart_as_the_isotropic_baseline_says():
    width = 512
    like = make_directions((0,), width, controls=False)
    drawn = [control.directions[0] for control in sample_directions(like, n=60, seed=1)]
    got = compare_directions(drawn)
    off = got.cosines[~torch.eye(60, dtype=torch.bool)]
    assert float(off.square().mean().sqrt()) == pytest.approx(got.isotropic_std, rel=0.1)
    assert got.labels[1] == "random:isotropic resid_post.0 (2)"


def test_anisotropic_activations_have_larger_chance_cosines_than_isotropic_ones():
    own = make_directions((0, 1), 64)
    assert own.covariance_matched is not None
    spiked = own.covariance_matched.clone()
    spiked[:, :, 5] *= 50
    vectors = tuple(
        dataclasses.replace(d, vector=d.vector + 40 * torch.eye(64, dtype=torch.float64)[5])
        for d in own
    )
    got = compare_directions(
        dataclasses.replace(own, directions=vectors, covariance_matched=spiked)
    )
    assert float(got.covariance_rms[0, 1]) > 2 * got.isotropic_std


def test_a_zero_direction_has_no_cosine_and_the_others_keep_theirs():
    own = make_directions((0, 1), controls=False)
    nothing = dataclasses.replace(own.directions[0], vector=torch.zeros(8))
    got = compare_directions([nothing, *own.directions])
    assert bool(got.cosines[0].isnan().all())
    assert not bool(got.cosines[1:, 1:].isnan().any())


def test_one_direction_or_several_widths_are_refused():
    with pytest.raises(ValueError, match=r"got 1, expected at least two"):
        compare_directions(make_directions((0,)))
    with pytest.raises(WidthError, match=r"widths \[4, 8\]"):
        compare_directions([*make_directions((0,)), *make_directions((0,), 4)])


def test_a_width_that_agrees_by_chance_is_no_angle():
    own = make_directions((0, 1), controls=False)
    heads = dataclasses.replace(own.directions[1], site=Site(1, "z"))
    with pytest.raises(SiteError, match=r"resid_post\.0.*'d_model'.*z\.1.*'d_head'"):
        compare_directions([own.directions[0], heads])
    other = dataclasses.replace(own.directions[1], site=Site(1, "mlp_out"))
    assert len(compare_directions([own.directions[0], other]).labels) == 2


def test_a_matrix_survives_saving(tmp_path):
    got = compare_directions(make_directions(controls=False))
    again = load_result(got.save(tmp_path / "matrix"))
    assert isinstance(again, CosineMatrix)
    assert torch.equal(again.cosines, got.cosines)
    assert again.labels == got.labels
    assert got.to_dict()["covariance_rms"][0][1] == "NaN"


def test_isotropic_directions_are_a_function_of_seed_site_and_number():
    like = make_directions((0, 1, 2), prompt_sets={"fit": ("p",)})
    first, again, other = (sample_directions(like, n=3, seed=seed) for seed in (5, 5, 6))
    assert [d.directions for d in first] == [d.directions for d in again]
    assert first[0].directions[0] != other[0].directions[0]
    part = sample_directions(like["resid_post.2"], n=2, seed=5)
    assert part[1]["resid_post.2"] == first[1]["resid_post.2"]
    directions = torch.stack([d.direction for control in first for d in control])
    gram = (directions @ directions.T).fill_diagonal_(0)
    assert float(gram.abs().max()) < 0.95
    for control in first:
        assert control.prompt_sets == {"fit": ("p",)}
        for own, drawn in zip(like, control, strict=True):
            assert drawn.norm == pytest.approx(own.norm)
            assert drawn.resid_norm == own.resid_norm
            assert drawn.provenance.construction == "random:isotropic"
            assert drawn.provenance.seed == 5
            assert drawn.provenance.base_fingerprint == "b"
    with pytest.raises(ValueError, match=r"got 0"):
        sample_directions(like, n=0, seed=1)
