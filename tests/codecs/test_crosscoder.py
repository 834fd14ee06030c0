"""Crosscoders: one code for two models, by arithmetic in numpy."""

import numpy as np
import pytest
import torch

from emlens.codecs import CodecError, Crosscoder
from tests.codecs.builders import draw, make_crosscoder

BASE, TUNED = draw(20, 6, seed=7), draw(20, 6, seed=8)


def by_numpy(codec: Crosscoder) -> tuple[np.ndarray, np.ndarray]:
    """Pre-activations, and the codes of a ReLU."""
    both = np.stack([BASE, TUNED])
    pre = np.einsum("mnd,mds->ns", both, codec.W_enc.numpy()) + codec.b_enc.numpy()
    return pre, np.maximum(pre, 0)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_codes_are_of_both_models_and_each_has_its_decoder(architecture: str):
    codec = make_crosscoder(architecture)
    pre, wanted = by_numpy(codec)
    if codec.threshold is not None:
        wanted = np.where(pre > np.maximum(codec.threshold.numpy(), 0), wanted, 0)
    if codec.k is not None:
        last = np.sort(wanted, axis=1)[:, -codec.k][:, None]
        wanted = np.where(wanted >= last, wanted, 0)
    codes = codec.encode(BASE, TUNED)
    assert np.allclose(codes.values.numpy(), wanted, atol=1e-5)
    made = np.einsum("ns,msd->mnd", wanted, codec.W_dec.numpy()) + codec.b_dec.numpy()[:, None]
    assert np.allclose(codec.decode(codes).numpy(), made, atol=1e-4)
    sparse = codec.encode_sparse(BASE, TUNED, k=codec.k or codec.d_sae)
    assert np.allclose(codec.decode(sparse).numpy(), made, atol=1e-4)
    chosen = codec.encode_latents(BASE, TUNED, latents=[39, 2])
    assert torch.allclose(chosen, codes.values[:, [39, 2]], atol=1e-5)


def test_models_are_not_interchangeable():
    codec = make_crosscoder()
    assert not torch.allclose(codec.encode(BASE, TUNED).values, codec.encode(TUNED, BASE).values)


def test_what_does_not_fit_is_refused_by_name():
    codec = make_crosscoder()
    with pytest.raises(CodecError, match="tuned: 19 rows beside 20 of base"):
        codec._prepare(BASE, TUNED[1:])  # inside the annotations, which check it here
    with pytest.raises(CodecError, match=r"tuned has shape \(20, 5\), expected \[n, 6\]"):
        codec._prepare(BASE, TUNED[:, 1:])
    with pytest.raises(CodecError, match="base holds NaN"):
        codec.encode(BASE / 0 * 0, TUNED)
    with pytest.raises(CodecError, match="'jumprelu' is not supported for crosscoders"):
        make_crosscoder("jumprelu")
    with pytest.raises(CodecError, match="W_enc is of 3 models, expected 2"):
        Crosscoder(
            name="three",
            architecture="standard",
            site=codec.site,
            W_enc=torch.zeros(3, 6, 40),
            b_enc=torch.zeros(40),
            W_dec=torch.zeros(3, 40, 6),
            b_dec=torch.zeros(3, 6),
        )
    assert not codec.W_dec.requires_grad
    assert codec.to(dtype=torch.float64).encode(BASE, TUNED).values.dtype == torch.float64
