"""Directions: their provenance, lookup, controls and prompt sets, and the way to disk and back."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.numerics.validation import NonFiniteError, WidthError, ZeroVectorError
from emlens.prompt_sets import OverlappingPromptsError
from emlens.results import load_result
from emlens.sites import Site, SiteError
from emlens.vectors import Direction, Directions, Provenance

MADE = Provenance(
    construction="data@tuned",
    positions="response",
    weighting="token",
    n_positive=30,
    n_negative=31,
    n_tokens_positive=200,
    n_tokens_negative=190,
    base_fingerprint="b",
    adapter_fingerprint="a",
    tokenizer_fingerprint="t",
)


def make_direction(layer=3, width=6, *, scale=2.5, **fields):
    vector = scale * torch.randn(
        width, generator=torch.Generator().manual_seed(layer), dtype=torch.float64
    )
    return Direction(
        site=Site(layer, "resid_post"), vector=vector, **{"provenance": MADE, **fields}
    )


def make_directions(layers=(1, 2, 12), **fields):
    return Directions(directions=tuple(make_direction(layer) for layer in layers), **fields)


@settings(deadline=None)
@given(st.floats(1e-150, 1e150), st.integers(0, 2**20))
def test_the_direction_is_the_vector_at_unit_norm(scale, seed):
    own = make_direction(seed, scale=scale)
    assert own.direction.dtype is torch.float64
    assert float(own.direction.norm()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(own.direction * own.norm, own.vector.double(), rtol=1e-12, atol=0)


def test_a_zero_vector_is_a_result_but_points_nowhere():
    nothing = make_direction(scale=0.0)
    assert nothing.norm == 0
    with pytest.raises(ZeroVectorError, match=r"resid_post.3 \(data@tuned\) is zero"):
        _ = nothing.direction


def test_a_direction_survives_saving(tmp_path):
    own = make_direction(resid_norm=12.5, split_half_cosine=0.9)
    again = load_result(own.save(tmp_path / "one"))
    assert again == own
    assert isinstance(again, Direction)
    assert again.site == Site(3, "resid_post")
    assert again.provenance == MADE


def test_an_imported_direction_outside_the_blocks_survives_saving(tmp_path):
    imported = Direction(
        site=Site(None, "embed"),
        vector=torch.ones(4, dtype=torch.float32),
        provenance=Provenance(construction="imported", note="control_vector.gguf"),
    )
    again = load_result(imported.save(tmp_path / "one"))
    assert again == imported
    assert isinstance(again, Direction)
    assert again.vector.dtype is torch.float32


def test_directions_survive_saving(tmp_path):
    matched, shuffled = torch.randn(3, 16, 6), torch.randn(3, 4, 6)
    own = make_directions(
        covariance_matched=matched,
        shuffled=shuffled,
        top3_share=torch.tensor([0.1, 0.2, 0.3]),
        prompt_sets={"fit": ("p", "q"), "evaluate": ("r",)},
    )
    again = load_result(own.save(tmp_path / "some"))
    assert isinstance(again, Directions)
    assert again.directions == own.directions
    assert again.covariance_matched is not None
    assert again.shuffled is not None
    assert torch.equal(again.covariance_matched, matched)
    assert torch.equal(again.shuffled, shuffled)
    assert again.prompt_sets == own.prompt_sets
    assert again.rows() == own.rows()
    assert [row["top3_share"] for row in own.rows()] == pytest.approx([0.1, 0.2, 0.3])
    largest = [max(float(v.norm()) for v in rows) for rows in shuffled]
    assert [row["shuffled_norm"] for row in own.rows()] == pytest.approx(largest)


def test_directions_without_baselines_survive_saving(tmp_path):
    again = load_result(make_directions().save(tmp_path / "some"))
    assert isinstance(again, Directions)
    assert again.covariance_matched is again.shuffled is again.top3_share is None


def test_equality_looks_at_the_vector_and_at_how_it_was_made():
    own = make_direction()
    assert own == make_direction()
    assert hash(own) == hash(make_direction())
    assert own != make_direction(scale=2.6)
    assert own != dataclasses.replace(own, provenance=dataclasses.replace(MADE, seed=1))
    assert own != dataclasses.replace(own, site=Site(4, "resid_post"))


@pytest.mark.parametrize(
    "name", ["resid_post.2", "blocks.2.hook_resid_post", Site(2, "resid_post")]
)
def test_a_direction_is_looked_up_by_its_site(name):
    own = make_directions()
    assert own[name] is own.directions[1]
    assert name in own
    assert own.index(name) == 1
    assert [d.site.layer for d in own] == [1, 2, 12]
    assert len(own) == 3


@pytest.mark.parametrize("name", ["resid_post.11", "resid_pst.12", Site(11, "resid_post")])
def test_a_site_without_direction_is_refused_with_the_nearest_that_have_one(name):
    own = make_directions((0, 1, 2, 3, 12))
    assert name not in own
    with pytest.raises(SiteError, match=r"no direction at .*; nearest: resid_post.1") as caught:
        _ = own[name]
    assert len(str(caught.value).split("nearest: ")[1].split(", ")) == 3


def test_controls_are_as_long_as_the_estimate_and_say_what_they_are():
    rows = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1))
    own = make_directions(covariance_matched=rows, shuffled=rows[:, :2])
    controls = own.controls("covariance")
    assert len(controls) == 16
    assert len(own.controls("shuffled")) == 2
    for k, control in enumerate(controls):
        for index, (mine, theirs) in enumerate(zip(own, control, strict=True)):
            assert theirs.site == mine.site
            assert theirs.norm == pytest.approx(mine.norm)
            row = rows[index, k].double()
            assert torch.allclose(theirs.direction, row / row.norm())
            assert theirs.provenance.construction == "random:covariance"
            assert theirs.provenance.is_control
    assert not MADE.is_control
    assert own.controls("shuffled")[0].directions[0].provenance.construction == "shuffled"


@pytest.mark.parametrize("kind", ["covariance", "shuffled"])
def test_a_site_without_a_direction_has_no_controls_and_the_others_keep_theirs(kind):
    rows = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1))
    rows[0] = 0 if kind == "shuffled" else rows[0]
    name = "covariance_matched" if kind == "covariance" else "shuffled"
    given: Any = {name: rows}
    first, *rest = make_directions().directions
    dead = dataclasses.replace(first, vector=torch.zeros(6))
    controls = Directions(directions=(dead, *rest), **given).controls(kind)
    assert len(controls) == 16
    for control in controls:
        assert control.sites == tuple(own.site for own in rest)
        assert [one.norm for one in control] == pytest.approx([own.norm for own in rest])
    assert torch.allclose(
        controls[2].directions[0].direction, rows[1, 2].double() / rows[1, 2].norm()
    )
    given = {name: rows[:1]}
    alone = Directions(directions=(dead,), **given)
    with pytest.raises(ZeroVectorError, match="all 1 are zero"):
        alone.controls(kind)


def test_a_direction_taken_out_knows_the_prompts_it_was_fitted_on():
    sets = {"fit": ("p", "q"), "evaluate": ("r",)}
    rows = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    own = make_directions(prompt_sets=sets, shuffled=rows)
    assert own["resid_post.2"].fit_prompts == ("p", "q")
    assert own.controls("shuffled")[0]["resid_post.2"].fit_prompts == ("p", "q")
    assert make_directions().with_prompts("fit", ["q", "p"])["resid_post.2"].fit_prompts == (
        "p",
        "q",
    )
    freed = own.without_prompts("fit")
    assert freed.prompt_sets == {"evaluate": ("r",)}
    assert {one.fit_prompts for one in freed} == {()}
    assert own.without_prompts("evaluate")["resid_post.2"].fit_prompts == ("p", "q")
    # A collection of such directions, without a record of its own, leaves theirs.
    assert Directions(directions=own.directions).directions == own.directions
    with pytest.raises(
        ValueError, match=r"no prompts to choose with are listed, only \['evaluate'"
    ):
        own.without_prompts("choose")


def test_controls_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"carry no covariance controls"):
        make_directions().controls("covariance")


def test_prompt_sets_that_overlap_are_refused():
    own = make_directions(prompt_sets={"fit": ("p", "q")}).with_prompts("choose", ["s", "r", "s"])
    assert own.prompt_sets == {"fit": ("p", "q"), "choose": ("r", "s")}
    with pytest.raises(OverlappingPromptsError, match=r"1 prompts serve to fit and to evaluate"):
        own.with_prompts("evaluate", ["q", "z"])
    with pytest.raises(ValueError, match=r"expected one of"):
        own.with_prompts("tune", ["z"])
    with pytest.raises(ValueError, match=r"listed already"):
        own.with_prompts("fit", ["z"])


def test_what_cannot_be_a_direction_is_refused():
    with pytest.raises(NonFiniteError):
        make_direction(scale=float("nan"))
    with pytest.raises(ValueError, match=r"resid_norm"):
        make_direction(resid_norm=0.0)
    with pytest.raises(WidthError, match=r"expected \[d\]"):
        Direction(site=Site(0, "resid_post"), vector=torch.ones(0), provenance=MADE)
    with pytest.raises(ValueError, match=r"nearest: data@base"):
        Provenance(construction="data@bse")


def test_what_cannot_be_directions_is_refused():
    with pytest.raises(ValueError, match=r"got none"):
        Directions(directions=())
    with pytest.raises(ValueError, match=r"resid_post.1 is there twice"):
        make_directions((1, 2, 1))
    with pytest.raises(WidthError, match=r"covariance_matched has shape \(3, 16, 7\)"):
        make_directions(covariance_matched=torch.zeros(3, 16, 7))
    with pytest.raises(WidthError, match=r"shuffled has shape \(2, 16, 6\)"):
        make_directions(shuffled=torch.zeros(2, 16, 6))
    with pytest.raises(WidthError, match=r"top3_share has shape \(2,\)"):
        make_directions(top3_share=torch.zeros(2))
