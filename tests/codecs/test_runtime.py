"""Autoencoders in use: what they refuse, what they do not remember, and what gradients see."""

import dataclasses
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from emlens.codecs import CodecError, Codes, SparseCodec, topk
from emlens.codecs.frozen import freeze_weights
from emlens.codecs.inputs import check_activations
from emlens.codecs.rectifier import Rectifier
from emlens.codecs.runtime import ARCHITECTURES, WITH_THRESHOLD
from emlens.numerics.by_device import ByDevice
from tests.codecs.builders import draw, make_sae

X = draw(30, 12, seed=9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_some_latents_have_the_codes_that_they_have_among_all(architecture: str):
    sae = make_sae(architecture)
    chosen = [95, 0, 7, 7, 40]
    assert torch.allclose(
        sae.encode_latents(X, chosen), sae.encode(X).values[:, chosen], rtol=1e-5, atol=1e-6
    )


def test_few_latents_of_a_topk_are_not_chosen_among_themselves():
    sae = make_sae("topk", k=2)
    codes = sae.encode(X).values
    assert bool((codes.count_nonzero(1) == 2).all())
    quiet = codes.sum(0).argsort()[:20].tolist()
    assert torch.equal(sae.encode_latents(X, quiet), codes[:, quiet])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_codes_are_the_largest_of_all_codes_whatever_the_chunks(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    sae = make_sae(architecture, dtype=torch.float64)
    codes = sae.encode(X).values
    monkeypatch.setattr(topk, "CHUNK", ByDevice(cpu=100, elsewhere=100))
    monkeypatch.setattr(topk, "ROWS", 7)
    found = sae.encode_sparse(X, k=5)
    assert torch.allclose(found.values, codes.topk(5, dim=1).values, rtol=1e-12)
    every = sae.encode_sparse(X, k=96)
    assert all(sorted(row) == list(range(96)) for row in every.indices.tolist())
    dense = torch.zeros_like(codes).scatter(1, every.indices, every.values)
    assert torch.allclose(dense, codes, rtol=1e-12)
    assert torch.allclose(sae.decode(every), sae.decode(sae.encode(X)), rtol=1e-10)


def test_beside_codes_of_zero_stand_the_lowest_inactive_latents():
    sae = make_sae("topk", k=2)
    found = sae.encode_sparse(X, k=6)
    assert not found.values[:, 2:].any()
    for row in found.indices.tolist():
        assert row[2:] == [j for j in range(96) if j not in row[:2]][:4]


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_batches_of_two_models_that_alternate_do_not_mix(normalization: Any):
    sae = make_sae(normalization=normalization)
    base, tuned = 5 * X + 1, 0.1 * X[:20] - 3
    alone = [sae.decode(sae.encode(x)) for x in (base, tuned)]
    first, second = sae.encode(base), sae.encode(tuned)
    assert torch.equal(sae.decode(first), alone[0])
    assert torch.equal(sae.decode(second), alone[1])
    assert torch.equal(sae.decode(first), alone[0])  # a second time, too
    bare = Codes(values=first.values)
    with pytest.raises(CodecError, match=f"do not fit the normalization '{normalization}'"):
        sae.decode(bare)
    with pytest.raises(CodecError, match="do not fit the normalization 'none'"):
        make_sae().decode(first)


def test_a_row_of_zeros_has_no_norm_to_divide_by():
    x = X.clone()
    x[4] = 0
    with pytest.raises(CodecError, match="row 4 is zero"):
        make_sae(normalization="constant_norm_rescale").encode(x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_reach_activations_and_nothing_else(architecture: str):
    sae = make_sae(architecture, d_in=4, d_sae=16, dtype=torch.float64, normalization="layer_norm")
    x = draw(3, 4, seed=9, dtype=torch.float64).requires_grad_(True)
    for function in (
        lambda x: sae.encode(x).values,
        lambda x: sae.encode_latents(x, [1, 8, 15]),
        lambda x: sae.encode_sparse(x, k=4).values,
        lambda x: sae.decode(sae.encode(x)),
        lambda x: sae.decode(sae.encode_sparse(x, k=4)),
    ):
        assert torch.autograd.gradcheck(function, (x,), atol=1e-6)
    # With gradients codes are made another way than in place.
    assert torch.allclose(sae.encode(x).values, sae.encode(x.detach()).values, rtol=1e-12)
    assert sae.W_enc.grad is None


def test_a_caller_keeps_weights_and_activations_as_they_were():
    weight = draw(12, 96, seed=0).requires_grad_(True)
    sae = make_sae(W_enc=weight)
    assert weight.requires_grad
    assert not sae.W_enc.requires_grad
    x, before = X.clone(), sae.fingerprint
    sae.decode(sae.encode(x))
    assert torch.equal(x, X)
    assert dataclasses.replace(sae).fingerprint == before


def test_a_code_at_the_threshold_is_none():
    sae = make_sae("batchtopk", d_in=1, d_sae=3, W_enc=torch.ones(1, 3), b_enc=torch.zeros(3))
    for threshold in ([2.0, 2.0, 2.0], [2.0, 1.0, 2.0]):  # one for all latents, and one for each
        own = dataclasses.replace(
            sae, threshold=torch.tensor(threshold), b_dec=torch.zeros(1), W_dec=torch.ones(3, 1)
        )
        codes = own.encode(torch.tensor([[2.0], [2.5], [-3.0]])).values
        assert codes[:, 0].tolist() == [0.0, 2.5, 0.0]
        assert codes[:, 2].tolist() == [0.0, 2.5, 0.0]


def test_a_threshold_below_zero_is_that_of_a_relu():
    plain = make_sae()
    same = make_sae("jumprelu", threshold=torch.full((96,), -1.0))
    assert torch.equal(same.encode(X).values, plain.encode(X).values)
    mixed = torch.cat([torch.full((48,), -1.0), torch.full((48,), 0.5)])
    some = make_sae("jumprelu", threshold=mixed).encode(X).values
    assert torch.equal(some[:, :48], plain.encode(X).values[:, :48])
    assert bool((some[:, 48:] < plain.encode(X).values[:, 48:]).any())


def test_rows_of_masks_smaller_than_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch):
    from emlens.codecs import rectifier

    wanted = {name: make_sae(name).encode(X).values for name in ("jumprelu", "gated")}
    monkeypatch.setattr(rectifier, "ROOM", 96 * 7)
    for name, codes in wanted.items():
        assert torch.equal(make_sae(name).encode(X).values, codes)


def test_a_rectifier_of_some_latents_is_theirs():
    floor = draw(5, seed=0).abs()
    part = Rectifier(floor=floor, gain=floor + 1, offset=-floor)[torch.tensor([3, 1])]
    assert torch.equal(part.floor, floor[[3, 1]])  # type: ignore[arg-type]
    pre = draw(4, 2, seed=1)
    wanted = torch.where(pre > floor[[3, 1]], (pre * (floor[[3, 1]] + 1) - floor[[3, 1]]).relu(), 0)
    assert torch.allclose(part(pre.clone()), wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_token_has_no_code(architecture: str):
    sae = make_sae(architecture)
    assert sae.encode(X[:0]).values.shape == (0, 96)
    assert sae.encode_latents(X[:0], [1, 2]).shape == (0, 2)
    none = sae.encode_sparse(X[:0], k=3)
    assert none.values.shape == none.indices.shape == (0, 3)
    assert sae.decode(none).shape == (0, 12)


def test_what_cannot_be_encoded_is_refused_by_name():
    sae = make_sae()
    assert isinstance(sae, SparseCodec)
    with pytest.raises(CodecError, match=r"\[n, 12\]: a test takes rows of resid_post.3"):
        sae.encode(draw(4, 11, seed=0))
    with pytest.raises(CodecError, match="expected floating-point"):
        check_activations("x", torch.ones(4, 12, dtype=torch.int64), sae)
    for bad in (float("nan"), float("inf")):
        x = X.clone()
        x[3, 2] = bad
        for encode in (sae.encode, lambda x: sae.encode_sparse(x, k=2)):
            with pytest.raises(CodecError, match="x holds NaN or infinity"):
                encode(x)
    with pytest.raises(CodecError, match="x is on meta"):
        sae.encode(X.to("meta"))
    for latents in ([], [96], [-1], [True]):
        with pytest.raises(CodecError, match="latents: got"):
            sae.encode_latents(X, latents)  # type: ignore[arg-type]
    for k in (0, 97):
        with pytest.raises(CodecError, match=f"k: got {k}, expected 1 to 96"):
            sae.encode_sparse(X, k=k)
    with pytest.raises(CodecError, match="of another codec"):
        sae.decode(make_sae(d_sae=90).encode(X))
    sparse = make_sae(d_sae=90).encode_sparse(X, k=3)
    with pytest.raises(CodecError, match="of another codec"):
        sae.decode(sparse)
    beyond = dataclasses.replace(sparse, d_sae=96, indices=sparse.indices + 96)
    with pytest.raises(CodecError, match="expected 0 to 95"):
        sae.decode(beyond)


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        ("abstopk", {}, "'abstopk' is not supported; supported are standard, gated, topk"),
        ("standard", {"b_dec": torch.full((12,), torch.nan)}, "b_dec holds NaN or infinity"),
        ("standard", {"b_dec": torch.zeros(12).double()}, "b_dec is torch.float64, expected"),
        ("standard", {"threshold": torch.zeros(96)}, "threshold has no place"),
        ("jumprelu", {"threshold": None}, "threshold is missing"),
        ("gated", {"b_mag": None}, "b_mag is missing"),
        ("standard", {"k": 3}, "k: got 3 for the architecture 'standard'"),
        ("topk", {"k": None}, "k: got None for the architecture 'topk'"),
        ("topk", {"k": 97}, "k: got 97, expected 1 to 96"),
    ],
)
def test_weights_that_do_not_make_a_codec_are_refused_by_name(
    architecture: str, fields: dict[str, Any], said: str
):
    with pytest.raises(CodecError, match=said):
        make_sae(architecture, **fields)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(95), r"b_enc has shape \(95,\), expected \(96,\): .* is it transposed"),
        (torch.zeros(96, dtype=torch.int32), "b_enc is torch.int32, expected one of float32, "),
    ],
)
def test_weights_of_other_shapes_are_refused_where_nothing_checks_annotations(
    weight: torch.Tensor, said: str
):
    class Bare:
        architecture, W_enc, b_enc = "standard", torch.zeros(12, 96), weight

    with pytest.raises(CodecError, match=said):
        freeze_weights(Bare(), {"W_enc": (12, 96), "b_enc": (96,)})


def test_a_normalization_that_is_not_known_is_refused():
    with pytest.raises((CodecError, TypeCheckError), match="normalization"):
        make_sae(normalization="batch")


def test_a_fingerprint_is_of_weights_and_use_not_of_names():
    sae = make_sae("topk")
    assert (
        dataclasses.replace(sae, name="other", neuronpedia_id="m/1").fingerprint == sae.fingerprint
    )
    nudged = sae.W_dec.clone()
    nudged[-1, -1] *= 1.0001
    others = [
        dataclasses.replace(sae, k=8),
        dataclasses.replace(sae, apply_b_dec_to_input=False),
        dataclasses.replace(sae, positions="all[8:]"),
        dataclasses.replace(sae, W_dec=nudged),
        sae.to(dtype=torch.bfloat16),
    ]
    assert len({sae.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_a_link_leads_to_where_the_latent_is_described():
    sae = make_sae()
    assert sae.link(5) is None
    named = dataclasses.replace(sae, neuronpedia_id="model/3-set")
    assert named.link(5) == "https://www.neuronpedia.org/model/3-set/5"
    with pytest.raises(CodecError, match="got 96"):
        named.link(96)


def test_every_architecture_with_a_threshold_computes_alike():
    threshold = draw(96, seed=3).abs()
    codes = [make_sae(name, threshold=threshold).encode(X).values for name in WITH_THRESHOLD]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])
