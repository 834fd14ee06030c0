"""Codes that are not 0, against the dense ones; sparse and dense reconstruction alike."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from emlens.codecs import CodecError, active
from emlens.codecs.runtime import ARCHITECTURES
from tests.codecs.builders import draw, make_sae


def make_rows(codec: Any, *, dtype: torch.dtype) -> torch.Tensor:
    """Rows with many, few and no active latents."""
    x = draw(23, 12, seed=9, dtype=dtype)
    x[4:8] *= 0.1
    return torch.cat([x, x[:0], codec.b_dec[None] + 0 * x[:1]])


def spread(codes: Any) -> torch.Tensor:
    found = codes.values.new_zeros(len(codes.counts), codes.d_sae)
    return found.index_put((codes.rows, codes.latents), codes.values)


@pytest.mark.parametrize("dense", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_active_codes_are_those_that_are_not_zero_and_decode_alike(
    monkeypatch: pytest.MonkeyPatch, architecture: str, normalization: Any, dense: float
):
    monkeypatch.setattr(active, "DENSE_SHARE", dense)  # always, or never, by the whole decoder
    codec = make_sae(architecture, dtype=torch.float64, normalization=normalization)
    x = make_rows(codec, dtype=torch.float64)
    found, codes = codec.encode_active(x), codec.encode(x)
    assert torch.allclose(spread(found), codes.values, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.counts, (codes.values != 0).sum(1))
    assert bool((found.values != 0).all())
    assert torch.allclose(codec.decode(found), codec.decode(codes), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_gives_the_same_active_codes(architecture: str):
    codec = make_sae(architecture, dtype=torch.bfloat16)
    x = make_rows(codec, dtype=torch.bfloat16)
    found = codec.encode_active(x)
    gap = spread(found).float() - codec.encode(x).values.float()
    assert float(gap.norm() / codec.encode(x).values.float().norm()) < 0.02


def test_one_threshold_for_all_latents_is_a_floor_too():
    codec = make_sae("batchtopk", threshold=torch.full((96,), 1.25))
    x = draw(9, 12, seed=1)
    found = codec.encode_active(x)
    assert float(found.values.min()) > 1.25
    assert torch.allclose(spread(found), codec.encode(x).values, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_token_has_no_active_code(architecture: str):
    codec = make_sae(architecture)
    found = codec.encode_active(torch.zeros(0, 12))
    assert (len(found.counts), len(found.latents), found.d_sae) == (0, 0, 96)
    assert codec.decode(found).shape == (0, 12)


def test_a_code_that_is_no_number_is_active():
    pre = torch.tensor([[0.5, torch.nan, -1.0], [-0.5, 2.0, 0.0]])
    found = active.list_above(pre, torch.zeros(3))
    assert found.latents.tolist() == [0, 1, 1]
    assert found.counts.tolist() == [2, 1]
    assert active.list_active(pre.relu()).counts.tolist() == [2, 1]


def test_codes_that_overflow_are_found_and_foreign_ones_refused():
    codec = make_sae()
    overflown = codec.encode_active(torch.full((1, 12), 3e38))
    assert not bool(overflown.values.isfinite().all())
    found = codec.encode_active(draw(3, 12, seed=1))
    with pytest.raises(CodecError, match="counts sum to"):
        codec.decode(replace(found, counts=found.counts + 1))
    with pytest.raises(CodecError, match="of 97 latents"):
        codec.decode(replace(found, d_sae=97))
    with pytest.raises(CodecError, match="expected 0 to 95"):
        codec.decode(replace(found, latents=found.latents + 96))
    with pytest.raises(CodecError, match=r"\[n, 12\]"):
        codec.encode_active(torch.zeros(2, 11))
