"""Codecs in half precision: near float32, or refused, and never NaN."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from emlens.codecs import CodecError, Crosscoder, Sae
from emlens.codecs.runtime import ARCHITECTURES
from tests.codecs.builders import draw, make_crosscoder, make_sae

SIZES = (1.0, 3e2, 3e3, 3e4, 6e4)
"""Sizes of the largest value of a row; float16 ends at 65,504."""
SHARES = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of a row's largest number: about ten spacings, which are 2^-10 and 2^-7."""


def make_rows(size: float) -> torch.Tensor:
    """Four plain rows, and one of another size."""
    x = draw(5, 12, seed=9)
    x[3] *= size / float(x[3].abs().max())
    return x


def is_near(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    """Row by row: an extreme one must not hide the others."""
    gap = (found.float() - expected.float()).abs().amax(1)
    return bool((gap <= share * expected.float().abs().amax(1).clamp(min=1.0)).all())


def attempt(make: Callable[[], Any]) -> Any:
    """What is made, or None where half precision cannot hold it."""
    try:
        return make()
    except CodecError as error:
        if "load it in bfloat16 or float32" not in str(error):
            raise
        return None


def make_continuous(architecture: str, normalization: Any) -> Sae:
    """Codes without a jump where they begin, nor a choice among them: no rounding makes one."""
    sae = make_sae(architecture)
    fields: dict[str, Any] = {"k": 96} if architecture == "topk" else {}
    if sae.threshold is not None:
        fields["threshold"] = sae.threshold / 100
    if sae.r_mag is not None:
        fields["b_mag"] = sae.r_mag.exp() * sae.b_enc
    return dataclasses.replace(sae, normalization=normalization, **fields)


@pytest.mark.parametrize("dtype", SHARES)
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_of_any_size_is_encoded_as_in_float32_or_refused(
    architecture: str, normalization: Any, dtype: torch.dtype
):
    half = make_continuous(architecture, normalization).to(dtype=dtype)
    wide, share, refused = half.to(dtype=torch.float32), SHARES[dtype], []
    for size in SIZES:
        x = make_rows(size).to(dtype)
        expected = wide.encode(x)
        codes = attempt(lambda x=x: half.encode(x))
        if codes is None:
            refused.append(size)
            continue
        assert is_near(codes.values, expected.values, share)
        assert bool(codes.values[3].any())
        sparse, active = half.encode_sparse(x, k=96), half.encode_active(x)
        dense = torch.zeros_like(codes.values)
        listed = dense.index_put((active.rows, active.latents), active.values)
        for other in (
            half.encode_latents(x, range(96)),
            dense.scatter(1, sparse.indices, sparse.values),
            listed,
        ):
            assert is_near(other, codes.values, share)
        again = attempt(lambda codes=codes: half.decode(codes))
        if again is None:
            refused.append(size)
        else:
            assert is_near(again, wide.decode(expected), 2 * share)
    # float16 ends where float32 does not; what needs no such number is never refused.
    assert all(dtype == torch.float16 and size > 3e2 for size in refused)
    if dtype == torch.float16 and normalization == "none":
        assert refused[-1] == SIZES[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_way_of_encoding_refuses_codes_that_are_no_numbers(architecture: str):
    fields = {"k": 20} if architecture == "topk" else {}
    half = make_sae(architecture, **fields).to(dtype=torch.float16)
    x = make_rows(5e4).half()
    for encode in (
        half.encode,
        half.encode_active,
        lambda x: half.encode_latents(x, range(96)),
        lambda x: half.encode_sparse(x, k=9),
    ):
        with pytest.raises(
            CodecError, match=r"codes of a test hold NaN or infinity.*bfloat16 or fl"
        ):
            encode(x)
    with pytest.raises(CodecError, match=r"x holds values beyond torch.float16.*extreme norm"):
        half.encode(2 * x.float())


def test_what_overflows_below_zero_is_an_inactive_latent():
    half = make_sae("jumprelu").to(dtype=torch.float16)
    x = make_rows(5e4).half()[3:4]
    overflow = (half.W_enc.float().mT @ (x.float() - half.b_dec.float())[0]) < -7e4
    latents = overflow.nonzero()[:, 0].tolist()
    assert len(latents) > 3
    assert not bool(half.encode_latents(x, latents).any())
    slow = x.clone().requires_grad_()
    half.encode_latents(slow, latents).sum().backward()
    assert slow.grad is not None
    assert not bool(slow.grad.any())


def test_a_reconstruction_beyond_half_precision_is_refused():
    sae = make_sae("standard", normalization="constant_norm_rescale")
    half = dataclasses.replace(sae, W_dec=300 * sae.W_dec).to(dtype=torch.float16)
    codes = half.encode(make_rows(6e4).half())
    with pytest.raises(CodecError, match="reconstructions of a test hold NaN or infinity"):
        half.decode(codes)


def test_weights_beyond_float16_are_not_called_damaged():
    sae = dataclasses.replace(make_sae(), b_dec=torch.full((12,), 1e5))
    assert bool(sae.to(dtype=torch.bfloat16).b_dec.isfinite().all())
    with pytest.raises(
        CodecError, match=r"b_dec .*beyond float16 \(load it in bfloat16 or float32"
    ):
        sae.to(dtype=torch.float16)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_crosscoders_are_held_to_the_same(architecture: str):
    half: Crosscoder = make_crosscoder(architecture).to(dtype=torch.float16)
    wide = half.to(dtype=torch.float32)
    small = draw(5, 6, seed=9).half()
    found, expected = half.encode(small, small), wide.encode(small, small)
    if architecture != "topk":
        assert is_near(found.values, expected.values, 0.02)
        assert is_near(half.decode(found)[1], wide.decode(expected)[1], 0.04)
    huge = small * (6e4 / small.abs().max())
    for encode in (
        half.encode,
        lambda a, b: half.encode_latents(a, b, latents=range(40)),
        lambda a, b: half.encode_sparse(a, b, k=3),
    ):
        with pytest.raises(CodecError, match="codes of a test hold NaN"):
            encode(huge, huge)
    with pytest.raises(CodecError, match=r"tuned holds values beyond torch.float16"):
        half.encode(small, huge.float() * 2)
