"""Sites against the hook points of real, tiny HookedTransformers."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens import HookedTransformer, HookedTransformerConfig

from emlens.sites import Site, SiteError, check_sites, expand_sites, parse_site

ROTARY = {
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 6,
    "act_fn": "silu",
    "gated_mlp": True,
    "final_rms": True,
    "n_key_value_heads": 2,
}
PLAIN = {"normalization_type": "LN", "act_fn": "gelu", "positional_embedding_type": "standard"}
ARCHITECTURES = {
    "llama, qwen2, mistral": ROTARY,
    "qwen3": {**ROTARY, "use_qk_norm": True},
    "gemma2": {**ROTARY, "use_normalization_before_and_after": True},
    "gemma3": {**ROTARY, "use_normalization_before_and_after": True, "use_qk_norm": True},
    "gpt2": PLAIN,
    "gpt-neox": {
        **PLAIN,
        "positional_embedding_type": "rotary",
        "rotary_dim": 6,
        "parallel_attn_mlp": True,
    },
}
BATCH, POS = 2, 7


@cache
def tiny_model(architecture: str) -> HookedTransformer:
    # Every size differs from every other, so that a swapped axis cannot pass.
    sizes = {"n_layers": 3, "d_model": 12, "n_heads": 4, "d_head": 6, "d_mlp": 20, "d_vocab": 30}
    torch.manual_seed(0)
    settings = {**sizes, "n_ctx": 16, "device": "cpu", **ARCHITECTURES[architecture]}
    return HookedTransformer(HookedTransformerConfig(**settings))


@cache
def captured_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    model = tiny_model(architecture)
    if architecture == "gpt2":
        model.set_use_attn_result(True)
        model.set_use_hook_mlp_in(True)
    ids = torch.arange(BATCH * POS).view(BATCH, POS)
    with torch.no_grad():
        _, activations = model.run_with_cache(ids, return_cache_object=False)
    return {name: tuple(activation.shape) for name, activation in activations.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_hook_point_of_the_model_is_a_site_and_back(architecture: str) -> None:
    hook_names = list(tiny_model(architecture).hook_dict)
    for name in hook_names:
        site = parse_site(name)
        assert site.hook_name == name
        assert parse_site(str(site)) == site
    assert len({parse_site(name) for name in hook_names}) == len(hook_names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_activations_have_the_axes_and_width_of_their_site(architecture: str) -> None:
    cfg = tiny_model(architecture).cfg
    shapes = captured_shapes(architecture)
    key_heads = cfg.n_key_value_heads or cfg.n_heads
    sizes = {"batch": BATCH, "pos": POS, "query_pos": POS, "key_pos": POS, "1": 1}
    named = {"n_key_value_heads": key_heads, "n_heads": cfg.n_heads, "d_head": cfg.d_head}
    named |= {"d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab}
    assert len(shapes) > 40
    for name, shape in shapes.items():
        site = parse_site(name)
        heads = key_heads if "attn.k_norm" in name else cfg.n_heads
        sizes["batch*pos*head"] = BATCH * POS * heads
        assert shape == tuple((sizes | named)[axis] for axis in site.axes), name
        if "pos" in site.axes:
            assert site.is_positional
            assert site.shape(cfg) == shape[2:], name
            assert site.width(cfg) == torch.Size(shape[2:]).numel(), name


def test_width_of_keys_counts_key_value_heads_and_of_queries_all_heads() -> None:
    cfg = tiny_model("llama, qwen2, mistral").cfg
    assert parse_site("k.0").width(cfg) == 2 * 6
    assert parse_site("v.0").shape(cfg) == (2, 6)
    assert parse_site("q.0").width(cfg) == parse_site("z.0").width(cfg) == 4 * 6
    assert parse_site("v.0").shape(tiny_model("gpt2").cfg) == (4, 6)


def test_width_of_a_query_norm_is_that_of_one_head() -> None:
    cfg = tiny_model("qwen3").cfg
    site = parse_site("blocks.1.attn.q_norm.hook_normalized")
    assert (site.is_positional, site.width(cfg)) == (False, 6)


@pytest.mark.parametrize("stream", ["pattern", "attn_scores"])
def test_attention_between_positions_has_no_width(stream: str) -> None:
    with pytest.raises(SiteError, match=r"grow with the text"):
        Site(1, stream).width(tiny_model("gpt2").cfg)


def test_a_model_without_mlps_has_no_mlp_width() -> None:
    @dataclass
    class AttentionOnly:
        n_layers: int = 1
        d_model: int = 8
        n_heads: int = 2
        d_head: int = 4
        d_mlp: int | None = None
        d_vocab: int = 10
        n_key_value_heads: int | None = None

    with pytest.raises(SiteError, match=r"post\.0 has the axis d_mlp"):
        Site(0, "post").width(AttentionOnly())


def test_both_spellings_name_one_site() -> None:
    assert parse_site("resid_post.24") == parse_site("blocks.24.hook_resid_post")
    assert str(parse_site("blocks.24.hook_resid_post")) == "resid_post.24"
    assert parse_site("hook_embed") == parse_site("embed") == Site(None, "embed")
    assert parse_site("ln_final.hook_normalized") == Site(None, "ln_final_normalized")
    assert Site(3, "ln2_post_normalized").hook_name == "blocks.3.ln2_post.hook_normalized"


def test_a_bare_stream_is_every_layer_in_order() -> None:
    cfg = tiny_model("gpt2").cfg
    assert [str(s) for s in expand_sites("resid_post", cfg)] == [
        "resid_post.0",
        "resid_post.1",
        "resid_post.2",
    ]
    assert expand_sites("embed", cfg) == (Site(None, "embed"),)
    assert expand_sites(Site(2, "z"), cfg) == (Site(2, "z"),)


def test_sites_keep_the_order_asked_for_and_come_once() -> None:
    cfg = tiny_model("gpt2").cfg
    sites = expand_sites(["resid_post.2", Site(0, "z"), "resid_post", "z.0"], cfg)
    assert [str(s) for s in sites] == ["resid_post.2", "z.0", "resid_post.0", "resid_post.1"]


@pytest.mark.parametrize("site", ["resid_post.3", "blocks.3.hook_z", Site(9, "resid_pre")])
def test_a_layer_that_the_model_lacks_is_refused(site: str | Site) -> None:
    with pytest.raises(SiteError):
        expand_sites(site, tiny_model("gpt2").cfg)


def test_the_last_layer_is_in_range_and_the_next_is_not() -> None:
    cfg = tiny_model("gpt2").cfg
    assert expand_sites("z.2", cfg) == (Site(2, "z"),)
    with pytest.raises(SiteError, match=r"z\.3 is out of range.* 3 layers, 0 to 2"):
        expand_sites("z.3", cfg)


def test_no_site_at_all_is_refused() -> None:
    with pytest.raises(SiteError, match="empty list"):
        expand_sites([], tiny_model("gpt2").cfg)


@pytest.mark.parametrize(
    "text",
    [
        *["resid_post.-1", "resid_post.x", "resid_post.", "resid_post.1.2", "resid_post.²", "z.01"],
        *["blocks.-1.hook_resid_post", "blocks.x.hook_resid_post"],
    ],
)
def test_a_layer_that_is_no_plain_number_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match="expected a whole number counted from 0"):
        parse_site(text)


def test_a_negative_layer_is_refused() -> None:
    with pytest.raises(SiteError, match="layer -1 of resid_post is negative"):
        Site(-1, "resid_post")


def test_a_layer_belongs_to_streams_inside_the_blocks_only() -> None:
    with pytest.raises(SiteError, match=r"needs a layer, as in 'resid_post\.0'"):
        parse_site("resid_post")
    with pytest.raises(SiteError, match="takes no layer, got layer 2"):
        parse_site("embed.2")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("resid_pst.24", "resid_post.24"),
        ("blocks.7.hook_resid_pots", "blocks.7.hook_resid_post"),
        ("hook_embd", "hook_embed"),
        ("attn_pattern.0", "pattern.0"),
        ("", "q"),
    ],
)
def test_an_unknown_site_lists_the_nearest_three(text: str, wanted: str) -> None:
    with pytest.raises(SiteError) as caught:
        parse_site(text)
    nearest = str(caught.value).split("nearest: ")[1].split(", ")
    assert len(nearest) == 3
    assert wanted in nearest or not text


def test_an_unknown_stream_is_refused_when_a_site_is_made() -> None:
    with pytest.raises(SiteError, match=r"nearest: .*resid_mid"):
        Site(0, "resid_middle")


def test_a_hook_point_that_the_architecture_leaves_out_is_refused() -> None:
    neox, gpt2 = tiny_model("gpt-neox"), tiny_model("gpt2")
    sites = expand_sites("resid_mid", neox.cfg)
    check_sites(sites, gpt2.hook_dict)
    with pytest.raises(SiteError, match=r"no resid_mid\.0; .*nearest: .*blocks\.0\.hook_resid_p"):
        check_sites(sites, neox.hook_dict)


@given(
    st.sampled_from(["resid_post", "rot_k", "ln1_scale", "q_norm_scale", "pre_linear"]), st.data()
)
def test_a_site_survives_both_of_its_spellings(stream: str, data: st.DataObject) -> None:
    site = Site(data.draw(st.integers(0, 10**6)), stream)
    assert parse_site(str(site)) == parse_site(site.hook_name) == site
