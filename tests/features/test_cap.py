"""Codes held at a limit: the reconstruction with that one code changed, and all else left alone."""

import dataclasses
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from emlens.activations import stream_activations
from emlens.codecs import CodecError, Codes
from emlens.features.cap import cap_latent
from emlens.features.steering import require_autoencoder
from emlens.interventions import (
    FoldError,
    describe_interventions,
    fold_into_weights,
    generate_responses,
    intervene,
)
from emlens.models import Sampling, generate_tokens
from emlens.models.views import lay_views
from tests.features.planted import PLANTED, SITE, make_codec
from tests.models.tiny import make_ids, make_tiny, make_tokenizer


def make_overlapping(**changed: Any) -> Any:
    """Encoder and decoder vectors of their own, of any length."""
    generator = torch.Generator().manual_seed(3)
    W_enc = 0.3 * torch.randn(24, 12, generator=generator)
    W_dec = torch.randn(12, 24, generator=generator)
    b_enc = 0.1 * torch.randn(12, generator=generator)
    return make_codec(W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, **changed)


class Scaling:
    """A codec that is none of ours: what it reads is scaled, and only its codes say so."""

    architecture = "standard"

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "normalization":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 + 0.25 * (x[:, :1] > 0).to(x)

    def encode(self, x: torch.Tensor) -> Codes:
        scale = self._scale(x)
        return dataclasses.replace(self.inner.encode(x / scale), scale=scale)

    def encode_latents(self, x: torch.Tensor, latents: Any) -> torch.Tensor:
        return self.inner.encode_latents(x / self._scale(x), latents)

    def encode_sparse(self, x: torch.Tensor, *, k: int) -> Any:
        scale = self._scale(x)
        return dataclasses.replace(self.inner.encode_sparse(x / scale, k=k), scale=scale)

    def decode(self, codes: Codes) -> torch.Tensor:
        return self.inner.decode(Codes(values=codes.values)) * codes.scale


CODECS: dict[str, Any] = {
    "standard": make_overlapping(),
    "topk": make_overlapping(architecture="topk", k=4),
    "jumprelu": make_overlapping(architecture="jumprelu", threshold=torch.full((12,), 0.3)),
    "layer_norm": make_overlapping(normalization="layer_norm"),
    "gated": make_overlapping(
        architecture="gated",
        r_mag=torch.linspace(-0.5, 0.5, 12),
        b_mag=torch.linspace(-0.2, 0.4, 12),
    ),
    "rescaled": make_overlapping(normalization="constant_norm_rescale"),
}
CODECS["batchtopk"] = dataclasses.replace(CODECS["jumprelu"], architecture="batchtopk")
CODECS["matryoshka"] = dataclasses.replace(CODECS["jumprelu"], architecture="matryoshka_batchtopk")
CODECS["somebody else's"] = Scaling(CODECS["standard"])


@pytest.fixture(scope="module")
def model() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer())


@torch.no_grad()
def stream(model: Any, ids: torch.Tensor, interventions: Any = ()) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = None
    with intervene(model, interventions):
        handle = model.hook_dict[SITE.hook_name].register_forward_hook(
            lambda _m, _a, out: kept.append(out.clone())
        )
        model(ids)
    handle.remove()
    return kept[0].flatten(0, 1)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("side", "limit"), [("above", 0.0), ("above", 0.4), ("below", 0.7)])
def test_it_is_the_reconstruction_with_one_code_at_its_limit(model, name, side, limit):
    codec, ids = CODECS[name], make_ids(3, 8)
    x = stream(model, ids)
    codes = codec.encode(x)
    latent = int((codes.values > 0).float().mean(0).sub(0.5).abs().argmin())
    limited = codes.values.clone()
    column = codes.values[:, latent]
    limited[:, latent] = column.clamp(max=limit) if side == "above" else column.clamp(min=limit)
    changed = Codes(values=limited, scale=codes.scale, shift=codes.shift)
    expected = codec.decode(changed) + (x - codec.decode(codes))
    act = cap_latent(codec, latent, threshold=limit, side=side)
    found = stream(model, ids, act)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - x).abs().max()) > 0.01
    still = column == limited[:, latent]
    assert torch.equal(found[still], x[still])
    assert 0 < int(still.sum()) < len(x)


def test_no_token_but_those_chosen_is_looked_at(model):
    half = dataclasses.replace(make_codec(), positions="all[2:]").to(dtype=torch.float16)
    act = cap_latent(half, PLANTED, threshold=0.0, side="above")

    def enlarge(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        big = out.clone()
        big[:, 0] = 2e5  # as a first token may be: beyond float16
        return big

    chats = ["w5 w6 w7 w8", "w9 w10"]
    handle = model.hook_dict[SITE.hook_name].register_forward_hook(enlarge)
    try:
        with intervene(model, act):
            found = stream_activations(model, chats, sites=SITE, positions="all[2:]")
        everywhere = cap_latent(half, PLANTED, threshold=0.0, side="above", positions="all")
        with pytest.raises(CodecError, match="x holds values beyond"), intervene(model, everywhere):
            stream_activations(model, chats, sites=SITE, positions="all")
    finally:
        handle.remove()
    assert found.mean is not None
    assert bool(found.mean.isfinite().all())


def test_a_tied_encoder_reads_the_limit_afterwards(model):
    codec, ids = make_codec(), make_ids(3, 8)
    before = codec.encode_latents(stream(model, ids), [PLANTED])
    act = cap_latent(codec, PLANTED, threshold=0.2, side="above")
    after = codec.encode_latents(stream(model, ids, act), [PLANTED])
    assert float(before.max()) > 0.5
    torch.testing.assert_close(after, before.clamp(max=0.2), rtol=1e-5, atol=1e-5)


def test_it_holds_while_a_model_answers_where_the_codec_looks(model):
    codec = make_codec(positions="all[2:]")
    act = cap_latent(codec, PLANTED, threshold=0.0, side="above")
    assert str(act[0].where) == "all[2:]"
    seen: list[torch.Tensor] = []
    with intervene(model, act):
        handle = model.hook_dict[SITE.hook_name].register_forward_hook(
            lambda _m, _a, out: seen.append(codec.encode_latents(out[0], [PLANTED])[:, 0])
        )
        try:
            generate_tokens(
                model,
                make_ids(1, 6),
                torch.ones(1, 6, dtype=torch.int64),
                sampling=Sampling(n=1, temperature=0, max_new_tokens=4),
            )
        finally:
            handle.remove()
    assert len(seen) == 4
    assert not bool((seen[0][2:] > 1e-5).any())
    assert not any(bool((later > 1e-5).any()) for later in seen[1:])


def test_what_acts_is_on_record_and_never_becomes_weights(model):
    (one,) = cap_latent(CODECS["topk"], 3, threshold=0.5, side="above")
    (same,) = cap_latent(CODECS["topk"], 3, threshold=0.5, side="above")
    others = [
        cap_latent(CODECS["topk"], 3, threshold=0.6, side="above"),
        cap_latent(CODECS["topk"], 3, threshold=0.5, side="below"),
        cap_latent(CODECS["standard"], 3, threshold=0.5, side="above"),
    ]
    (shown,) = describe_interventions([one])
    assert [shown] == describe_interventions([same])
    assert shown["operator"] == "shift"
    assert "latent 3 of codec" in shown["amount"]
    assert all(describe_interventions(other) != [shown] for other in others)
    with pytest.raises(FoldError, match=r"Shift at resid_post.1 is not an affine map"):
        fold_into_weights(model, [one])
    responses = generate_responses(
        model, ["w5 w6"], sampling=Sampling(n=1, max_new_tokens=3), interventions=[one]
    )
    assert "latent 3 of codec" in responses.interventions[0]


def test_wrong_input_is_named():
    codec = CODECS["standard"]
    with pytest.raises(CodecError, match=r"numbered from 0, and got \[12\]"):
        cap_latent(codec, 12, threshold=0.1, side="above")
    with pytest.raises(ValueError, match=r"threshold: got -0.1"):
        cap_latent(codec, 1, threshold=-0.1, side="above")


def test_a_crosscoder_is_refused_by_what_reads_one_model():
    crosscoder = Mock()
    crosscoder.name, crosscoder.W_dec = "both", torch.ones(2, 3, 4)
    with pytest.raises(CodecError, match=r"both has decoder vectors of shape \(2, 3, 4\)"):
        require_autoencoder(crosscoder)
