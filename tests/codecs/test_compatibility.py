"""Codecs of other sites, widths and models are refused by name."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from emlens.codecs import CodecError, allow_other_model, check_fits
from emlens.sites import Site
from tests.codecs.builders import make_crosscoder, make_sae


def make_cfg(**sizes: Any) -> Any:
    return SimpleNamespace(
        **{
            **{"n_layers": 4, "d_model": 12, "n_heads": 2, "d_head": 6, "d_mlp": None},
            **{"d_vocab": 50, "n_key_value_heads": None},
            **sizes,
        }
    )


def test_a_codec_of_the_models_site_and_width_fits():
    sae = dataclasses.replace(make_sae(), base_fingerprint="abc")
    check_fits(sae, make_cfg())
    check_fits(sae, make_cfg(), weights=["abc", "abc and what was merged into it"])
    check_fits(make_sae(), make_cfg(), weights=["abc"])  # nobody knows its own
    check_fits(allow_other_model(sae), make_cfg(), weights=["abd"])
    check_fits(make_crosscoder(), make_cfg(d_model=6))
    check_fits(dataclasses.replace(make_sae(), site=Site(1, "z")), make_cfg())


def test_what_does_not_fit_is_named():
    sae = dataclasses.replace(make_sae(), base_name="org/small", base_fingerprint="abc")
    with pytest.raises(CodecError, match=r"at resid_post.3, .* 3 layers, 0 to 2; .*small"):
        check_fits(sae, make_cfg(n_layers=3))
    with pytest.raises(CodecError, match=r"width 12, but resid_post.3 of the model has width 13"):
        check_fits(sae, make_cfg(d_model=13))
    with pytest.raises(CodecError, match=r"on weights abc, and these are abd.*org/small"):
        check_fits(sae, make_cfg(), weights=["abd"])
    with pytest.raises(CodecError, match=r"lives where the model has no width.*d_mlp"):
        check_fits(dataclasses.replace(sae, site=Site(1, "post")), make_cfg())
