"""Directions to interventions: units, places, models; and what is written down of them."""

import dataclasses
import hashlib
import inspect
import json
import math
import struct

import pytest
import torch

from emlens.interventions import (
    Ablate,
    Add,
    Cap,
    Intervention,
    OtherModelError,
    PerLayer,
    Replace,
    ablate_direction,
    add_direction,
    cap_direction,
    describe_interventions,
    intervene,
)
from emlens.interventions.active import hash_tensor
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.lora import scale_adapter
from emlens.models.merge import merge_adapter
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.views import lay_views
from emlens.numerics.validation import NonFiniteError, WidthError, ZeroVectorError
from emlens.sites import SiteError, parse_site
from emlens.vectors import Direction, Directions, Provenance
from tests.interventions.vectors import D_MODEL, draw, load_tiny, make_direction, per_layer
from tests.models.adapters import make_peft
from tests.models.tiny import make_ids, make_tiny, make_tokenizer


def shift(direction, **settings):
    (one,) = add_direction(direction, **settings)
    assert isinstance(one.operator, Add)
    return one.operator.coefficient * one.operator.vector


def test_units_say_how_long_one_step_is():
    direction = make_direction(scale=7.0, resid_norm=50.0)
    v = direction.vector
    assert torch.allclose(shift(direction, coefficient=2.0, units="raw"), 2 * v / v.norm())
    assert torch.allclose(shift(direction, coefficient=-2.0, units="delta_norm"), -2 * v)
    assert math.isclose(float(shift(direction, coefficient=2.0, units="resid_norm").norm()), 100.0)
    own = shift(direction, coefficient=1.0, units="resid_norm", at=["resid_post.1"])
    assert math.isclose(float(own.norm()), 50.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": "resid_norm"}, "does not carry it"),
        ({"units": "resid_norm", "at": "writes"}, "own site, not at writes"),
        ({"units": "resid_norm", "at": "resid_post"}, "own site"),
        ({"units": "resid_norm", "at": ["resid_post.1", "z.0"]}, r"own site, not at z\.0"),
        ({"units": "raw", "coefficient": math.nan}, "finite"),
        ({"units": "raw", "at": []}, "no place"),
        ({"units": "raw", "at": "resid_pots"}, "nearest"),
        ({"units": "raw", "positions": "responce"}, "nearest"),
    ],
)
def test_a_wrong_unit_coefficient_place_or_position_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        add_direction(make_direction(), **({"coefficient": 1.0} | settings))


@pytest.mark.parametrize("units", ["raw", "delta_norm", "resid_norm"])
def test_a_direction_of_length_zero_cannot_steer(units):
    nothing = make_direction(scale=0.0, resid_norm=50.0)
    with pytest.raises(ZeroVectorError, match="has no direction"):
        add_direction(nothing, coefficient=1.0, units=units)


def test_units_of_one_direction_among_several_are_told_apart_from_those_of_one():
    one = make_direction(resid_norm=50.0)
    several = Directions(directions=(one, make_direction(site="resid_post.2", resid_norm=60.0)))
    given = {"coefficient": 1.0, "units": "resid_norm"}
    assert len(add_direction(several, **given)) == 2
    with pytest.raises(ValueError, match=r"at: got resid_post\.1, where each of 2 directions"):
        add_direction(several, at=["resid_post.1"], **given)
    alone = shift(Directions(directions=(one,)), at=["resid_post.1"], **given)
    assert math.isclose(float(alone.norm()), 50.0)


@pytest.mark.parametrize("missing", ["coefficient", "units"])
def test_the_quantity_under_study_has_no_default(missing):
    given = {"coefficient": 1.0, "units": "raw"}
    del given[missing]
    with pytest.raises(TypeError, match=missing):
        add_direction(make_direction(), **given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="at"):
        ablate_direction(make_direction())  # pyright: ignore[reportCallIssue]


def test_a_direction_acts_at_its_own_site_or_where_it_is_told():
    direction = make_direction()
    sites = {"site": ["resid_post.1"], "writes": ["writes"], "resid_mid": ["resid_mid"]}
    for at, expected in sites.items():
        assert [str(one.site) for one in ablate_direction(direction, at=at)] == expected
    several = cap_direction(
        direction, threshold=1.0, side="above", at=["embed", parse_site("resid_mid.2")]
    )
    assert [one.site for one in several] == [parse_site("embed"), parse_site("resid_mid.2")]
    assert all(isinstance(one.operator, Cap) for one in several)


def test_directions_bring_each_layers_own():
    model = load_tiny()
    directions = per_layer(model)
    own = ablate_direction(directions, at="site")
    assert [one.site for one in own] == list(directions.sites)
    (writes,) = ablate_direction(directions, at="writes")
    assert isinstance(writes.operator, PerLayer)
    for site, layer in (("embed", 0), ("attn_out.0", 0), ("mlp_out.2", 2)):
        operator = writes.operator.at(parse_site(site))
        assert isinstance(operator, Ablate)
        assert torch.equal(operator.vector, directions[f"resid_post.{layer}"].direction)
    with pytest.raises(SiteError, match="layers 0, 1, 2"):
        writes.operator.at(parse_site("attn_out.3"))
    with pytest.raises(SiteError, match="no direction for it"):
        writes.operator.at(parse_site("ln_final_normalized"))


def test_a_layer_without_a_direction_is_not_skipped():
    model = load_tiny()
    two = Directions(directions=tuple(per_layer(model))[:2])
    with pytest.raises(SiteError, match=r"attn_out\.2: no direction"):
        intervene(model, ablate_direction(two, at="writes")).__enter__()


def test_two_directions_of_one_layer_leave_open_which_acts():
    both = Directions(directions=(make_direction(), make_direction(site="attn_out.1")))
    assert len(ablate_direction(both, at="site")) == 2
    with pytest.raises(SiteError, match=r"attn_out\.1"):
        ablate_direction(both, at="writes")


def test_one_mean_does_not_fit_several_layers():
    with pytest.raises(ValueError, match="toward: one mean"):
        ablate_direction(per_layer(load_tiny()), at="site", toward=draw(D_MODEL))


def of_model(base="", tuned=None):
    return Direction(
        site=parse_site("resid_post.1"),
        vector=draw(D_MODEL),
        provenance=Provenance(
            construction="imported", base_fingerprint=base, tuned_fingerprint=tuned
        ),
    )


def test_a_direction_is_for_the_models_it_was_made_from_unless_transfer_is_meant():
    model, other, ids = load_tiny(), load_tiny("mistral"), make_ids(1, 4)
    own = make_direction(model)
    # By the fingerprint of a full fine-tune as well.
    tuned = of_model("another", tuned=own.provenance.base_fingerprint)
    for direction in (own, tuned):
        with intervene(model, ablate_direction(direction, at="site")):
            model(ids)
    for direction in (own, of_model(), of_model("another")):
        wrong = other if direction is own else model
        with pytest.raises(OtherModelError, match="allow_other_model=True"):
            intervene(wrong, ablate_direction(direction, at="site")).__enter__()
        for build in (
            ablate_direction(direction, at="site", allow_other_model=True),
            add_direction(direction, coefficient=1.0, units="raw", allow_other_model=True),
            cap_direction(
                direction, threshold=0.0, side="below", at="site", allow_other_model=True
            ),
        ):
            with intervene(wrong, build):
                wrong(ids)


@pytest.mark.parametrize("site", ["z.1", "q.1", "rot_q.0"])
def test_a_width_that_agrees_by_chance_does_not_make_a_space(site):
    model = load_tiny()
    assert parse_site(site).width(model.cfg) == D_MODEL
    direction = make_direction(model)
    for other in (False, True):
        for chosen in (
            ablate_direction(direction, at=[site], allow_other_model=other),
            add_direction(
                direction, coefficient=1.0, units="raw", at=site, allow_other_model=other
            ),
        ):
            with pytest.raises(SiteError, match=r"'d_model'\), and \w+\.\d has .*'d_head'"):
                intervene(model, chosen).__enter__()
    own = make_direction(model, site)
    with intervene(model, ablate_direction(own, at="site")):
        model(make_ids(1, 4))
    with pytest.raises(SiteError, match="mean different things"):
        intervene(model, ablate_direction(own, at="writes")).__enter__()
    # A site of the same axes will do, and an intervention without a direction knows of none.
    for chosen in (
        ablate_direction(direction, at=["ln1_normalized.1", "mlp_out.2"]),
        [Intervention(site, Ablate(draw(D_MODEL)))],
    ):
        with intervene(model, chosen):
            model(make_ids(1, 4))


def test_a_direction_of_one_fine_tune_is_not_used_unasked_on_another():
    peft_model, other_peft = make_peft("llama"), make_peft("llama", r=2)
    base = lay_views(make_tiny("llama"), make_tokenizer())
    adapter, other = load_adapter(peft_model), load_adapter(other_peft)
    assert adapter.fingerprint != other.fingerprint
    direction = made_with(adapter_fingerprint=adapter.fingerprint)
    # Its own fine-tune, at any strength and in the weights, and the base that is to be steered.
    tuned = attach_adapter(base, adapter)
    scaled = attach_adapter(base, scale_adapter(adapter, 0.5))
    for model in (tuned, scaled, merge_adapter(base, adapter), base):
        with intervene(model, ablate_direction(direction, at="writes")):
            model(make_ids(1, 4))
    said = refused(attach_adapter(base, other), direction)
    assert f"by adapter {adapter.fingerprint}, not {other.fingerprint}" in said
    assert "weights" not in said
    # One of the base alone is for every fine-tune of it.
    with intervene(tuned, ablate_direction(made_with(), at="site")):
        tuned(make_ids(1, 4))


def retemplated(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "<end> <end>")
    return tokenizer


def made_with(**made):
    """A direction of the tiny model's weights."""
    own = make_direction(load_tiny())
    return dataclasses.replace(own, provenance=dataclasses.replace(own.provenance, **made))


def refused(model, direction):
    """What is said of a direction that a model is not to be changed by."""
    with pytest.raises(OtherModelError) as error:
        intervene(model, ablate_direction(direction, at="site")).__enter__()
    with intervene(model, ablate_direction(direction, at="site", allow_other_model=True)):
        model(make_ids(1, 4))
    return str(error.value)


def test_a_direction_is_for_the_tokenizer_it_was_made_with_unless_transfer_is_meant():
    model, ids = load_tiny(), make_ids(1, 4)
    own = fingerprint_tokenizer(model.tokenizer)
    other = fingerprint_tokenizer(retemplated(make_tokenizer()))
    said = refused(model, made_with(tokenizer_fingerprint=other))
    assert f"with tokenizer {other}, not {own}" in said
    assert "allow_other_model=True" in said
    assert "weights" not in said
    # What one of the two sides does not know is not compared.
    bare = lay_views(make_tiny("llama"), None)
    for one, known in ((model, own), (model, ""), (bare, other)):
        direction = made_with(tokenizer_fingerprint=known)
        with intervene(one, ablate_direction(direction, at="site")):
            one(ids)


def test_a_tokenizer_that_changes_under_way_is_another():
    model = lay_views(make_tiny("llama"), make_tokenizer())
    direction = made_with(tokenizer_fingerprint=fingerprint_tokenizer(model.tokenizer))
    with intervene(model, ablate_direction(direction, at="site")):
        model(make_ids(1, 4))
    retemplated(model.tokenizer)
    assert "chat template" in refused(model, direction)


def test_a_direction_of_processed_weights_is_for_processed_weights_unless_transfer_is_meant():
    model = load_tiny()
    said = refused(model, made_with(processing="norms folded"))
    assert "'norms folded', not 'unprocessed'" in said
    with intervene(model, ablate_direction(made_with(processing=""), at="site")):
        model(make_ids(1, 4))


def test_all_that_differs_is_named_at_once():
    made = {"base_fingerprint": "b", "tokenizer_fingerprint": "t", "processing": "centred"}
    said = refused(load_tiny(), made_with(**made))
    assert all(part in said for part in ("weights b,", "tokenizer t,", "'centred'"))


def test_directions_of_several_layers_must_agree_in_all_of_it():
    model = load_tiny()
    first, *rest = per_layer(model)
    unlike = ({"tokenizer_fingerprint": "t"}, {"processing": "c"}, {"adapter_fingerprint": "a"})
    for made in unlike:
        odd = dataclasses.replace(first, provenance=dataclasses.replace(first.provenance, **made))
        with pytest.raises(ValueError, match="made from different models"):
            ablate_direction(Directions(directions=(odd, *rest)), at="writes")


def test_a_description_is_json_and_tells_interventions_apart():
    v, w = draw(D_MODEL), draw(D_MODEL, seed=1)
    chosen = [
        Intervention("resid_post.1", Add(v, 2.0)),
        Intervention("resid_post.1", Add(v, 3.0)),
        Intervention("resid_post.1", Add(w, 2.0)),
        Intervention("resid_post.2", Add(v, 2.0)),
        Intervention("resid_post.1", Add(v, 2.0), "response"),
        Intervention("resid_post.1", Add(v, 2.0), "response[:5]"),
        Intervention("resid_post.1", Ablate(v)),
        Intervention("resid_post.1", Ablate(v, toward=w)),
        Intervention("resid_post.1", Ablate(v, toward=v)),
        Intervention("resid_post.1", Cap(v, 1.0, "above")),
        Intervention("resid_post.1", Cap(v, 1.0, "below")),
        Intervention("resid_post.1", Cap(v, 2.0, "below")),
        Intervention("resid_post.1", Replace(v)),
        Intervention("resid_post.1", Replace(v[None, None])),
        Intervention("resid_post.1", PerLayer({1: Ablate(v)})),
        Intervention("resid_post.1", PerLayer({1: Ablate(w)})),
        Intervention("resid_post.1", PerLayer({2: Ablate(v)})),
    ]
    texts = [json.dumps(one, allow_nan=False) for one in describe_interventions(chosen)]
    assert len(set(texts)) == len(chosen)
    again = Intervention("resid_post.1", Add(v.clone(), 2.0), "all", fit_prompts=("p",))
    assert json.dumps(describe_interventions([again])[0]) == texts[0]


def test_a_hash_depends_on_the_numbers_alone():
    x = draw(6).float()
    assert hash_tensor(x) == hash_tensor(x.double()) == hash_tensor(x.view(6))
    assert hash_tensor(x) != hash_tensor(x.view(2, 3))
    assert hash_tensor(torch.tensor([0.0])) == hash_tensor(torch.tensor([-0.0]))
    assert hash_tensor(draw(4, 6).mT) == hash_tensor(draw(4, 6).mT.contiguous())
    shape_and_bytes = b"(2,)" + struct.pack("<2d", 1.0, 0.5)
    digest = hashlib.sha256(shape_and_bytes).hexdigest()
    assert digest.startswith(hash_tensor(torch.tensor([1.0, 0.5])))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Ablate(torch.zeros(3)), ZeroVectorError, "no direction"),
        (lambda: Cap(torch.zeros(3), 1.0, "above"), ZeroVectorError, "no direction"),
        (lambda: Cap(torch.ones(3), math.inf, "above"), ValueError, "finite"),
        (lambda: Add(torch.tensor([1.0, math.nan])), NonFiniteError, "NaN"),
        (lambda: Add(torch.ones(0)), WidthError, "one vector"),
        (lambda: Replace(torch.ones(0)), WidthError, "heads counted together"),
        (lambda: PerLayer({}), ValueError, "one a layer"),
    ],
)
def test_an_operator_that_makes_no_sense_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_unknown_units_are_refused_without_a_type_checker_too():
    plain = inspect.unwrap(add_direction)
    with pytest.raises(ValueError, match="'raw', 'delta_norm', 'resid_norm'"):
        plain(make_direction(), coefficient=1.0, units="sigmas")
