"""The threshold: exact on the rows that it is set on, for any codes, ties included."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.codecs import calibrate
from emlens.codecs.calibrate import calibrate_threshold, find_threshold
from emlens.codecs.codec import CodecError
from emlens.codecs.runtime import Sae
from emlens.sites import Site


def draw_sae(d_in=6, d_sae=9, *, seed=0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    return Sae(
        name="drawn",
        architecture="batchtopk",
        site=Site(1, "resid_post"),
        W_enc=torch.randn(d_in, d_sae, generator=generator),
        b_enc=torch.randn(d_sae, generator=generator),
        W_dec=torch.randn(d_sae, d_in, generator=generator),
        b_dec=torch.randn(d_in, generator=generator),
        threshold=torch.rand(d_sae, generator=generator),
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 40),
    d_sae=st.integers(1, 12),
    share=st.floats(0.02, 1.0),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]),
    chunk=st.sampled_from([1, 7, 2**20]),
)
def test_as_many_codes_are_kept_as_were_wanted(seed, rows, d_sae, share, scale, chunk):
    codes = scale * np.abs(np.random.default_rng(seed).normal(size=(rows, d_sae)))
    codes = torch.tensor(codes, dtype=torch.float32)
    wanted = max(1, int(share * codes.numel()))
    calibrate._CHUNK_VALUES, kept = chunk, calibrate._CHUNK_VALUES
    try:
        found = find_threshold(lambda x: x, codes, l0=wanted / rows, d_sae=d_sae)
    finally:
        calibrate._CHUNK_VALUES = kept
    ordered = np.sort(codes.numpy().ravel())[::-1]
    assert int((codes > found.value).sum()) == wanted
    assert found.value < ordered[wanted - 1]
    assert found.l0 == pytest.approx(wanted / rows)
    assert found.n_rows == rows


def test_of_equal_codes_all_or_none_are_kept_whichever_is_nearer():
    codes = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0]])
    counts = {
        l0: find_threshold(lambda x: x, codes, l0=l0, d_sae=6).l0
        for l0 in (1.0, 2.0, 3.0, 4.0, 5.0)
    }
    assert counts == {1: 1, 2: 1, 3: 4, 4: 4, 5: 5}


def test_a_calibrated_autoencoder_has_the_l0_wanted_and_is_else_the_same():
    sae, rows = draw_sae(), torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    made = calibrate_threshold(sae, rows, l0=2.5)
    assert float((made.encode(rows).values > 0).sum()) / 500 == 2.5
    assert torch.equal(made.W_enc, sae.W_enc)
    assert sae.fingerprint != made.fingerprint
    assert calibrate_threshold(made, rows, l0=2.5).fingerprint == made.fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("l0", [1.0, 2.5, 4.0])
def test_in_every_precision_the_l0_is_the_nearest_that_equal_codes_permit(dtype, l0):
    sae = draw_sae().to(dtype=dtype)
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    plain = dataclasses.replace(sae, threshold=torch.zeros_like(sae.W_enc[0]))
    codes = plain.encode(rows).values.double().numpy()
    possible = [(codes > limit).sum() for limit in (0, *np.unique(codes[codes > 0]))]
    made = calibrate_threshold(sae, rows, l0=l0)
    kept = int((made.encode(rows).values > 0).sum())
    assert abs(kept - 500 * l0) == min(abs(n - 500 * l0) for n in possible)


def test_what_cannot_be_had_is_refused_by_number():
    sae, rows = draw_sae(), torch.randn(500, 6)
    with pytest.raises(CodecError, match=r"l0: got 9.0, but only \d\.\d+ codes a row are above 0"):
        calibrate_threshold(sae, rows, l0=9.0)
    with pytest.raises(CodecError, match=r"l0: 3.0 of 0 rows is no code"):
        calibrate_threshold(sae, rows[:0], l0=3.0)
    topk = dataclasses.replace(sae, architecture="topk", k=2, threshold=None)
    with pytest.raises(CodecError, match=r"drawn has no threshold: architecture 'topk'"):
        calibrate_threshold(topk, rows, l0=3.0)
