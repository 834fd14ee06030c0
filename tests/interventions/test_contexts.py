"""What is in effect inside `with intervene`, what is left afterwards, and what is refused."""

import pytest
import torch

from emlens.interventions import (
    Ablate,
    Add,
    ContradictoryInterventionsError,
    Intervention,
    Replace,
    ablate_direction,
    active_interventions,
    intervene,
    write_sites,
)
from emlens.models.hooks import HookNeverFiredError
from emlens.numerics.validation import WidthError
from emlens.sites import SiteError, parse_site
from tests.interventions.vectors import (
    D_MODEL,
    close,
    count_hooks,
    draw,
    enter_and_leave,
    load_tiny,
    make_direction,
    project_out,
    run_hooked,
)
from tests.models.tiny import make_ids


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_however_the_context_ends(error):
    model, ids = load_tiny(), make_ids(1, 5)
    before, hooks = model(ids), count_hooks(model)
    chosen = ablate_direction(make_direction(model), at="writes")

    def interrupted():
        with intervene(model, chosen):
            assert active_interventions(model) == chosen
            assert count_hooks(model) == hooks + len(write_sites(model))
            model(ids)
            raise error

    with pytest.raises(error):
        interrupted()
    assert active_interventions(model) == ()
    assert count_hooks(model) == hooks
    assert torch.equal(model(ids), before)


def test_a_failure_half_way_through_registration_leaves_no_hook(monkeypatch):
    model = load_tiny()
    hooks = count_hooks(model)

    def fail(*_args, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.blocks[1].hook_mlp_out, "register_forward_hook", fail)
    context = intervene(model, ablate_direction(make_direction(model), at="writes"))
    with pytest.raises(KeyboardInterrupt):
        context.__enter__()
    assert count_hooks(model) == hooks
    assert active_interventions(model) == ()


def test_contexts_nest_and_the_inner_one_acts_after_the_outer():
    model, ids, v = load_tiny(), make_ids(1, 5), draw(D_MODEL)
    site = parse_site("resid_post.1")
    first, second = [Intervention(site, Add(v))], [Intervention(site, Ablate(v))]

    def both(x, hook):
        return project_out(v)(x + v.float())

    with intervene(model, first):
        with intervene(model, second):
            assert active_interventions(model) == (*first, *second)
            nested = model(ids)
        assert active_interventions(model) == tuple(first)
        outer = model(ids)
    assert close(nested, run_hooked(model, ids, {site: both}))
    assert close(outer, run_hooked(model, ids, {site: lambda x, hook: x + v.float()}))


def test_resetting_the_hosts_hooks_does_not_end_an_intervention():
    model, ids = load_tiny(), make_ids(1, 5)
    with intervene(model, [Intervention("resid_post.1", Ablate(draw(D_MODEL)))]):
        expected = model(ids)
        model.reset_hooks()
        assert torch.equal(model(ids), expected)
    assert not close(model(ids), expected, 1e-3)


def test_no_intervention_is_a_plain_run():
    model, ids = load_tiny(), make_ids(1, 5)
    with intervene(model, ()):
        assert count_hooks(model) == 0
    with intervene(model, ()):
        got = model(ids)
    assert torch.equal(got, model(ids))


def test_a_hook_that_never_fired_is_an_error_but_never_hides_another():
    model, ids = load_tiny(), make_ids(1, 5)
    chosen = [Intervention("resid_post.2", Ablate(draw(D_MODEL)))]
    with pytest.raises(HookNeverFiredError, match=r"resid_post\.2; no forward pass"):
        enter_and_leave(model, chosen)
    with pytest.raises(HookNeverFiredError):
        enter_and_leave(model, chosen, lambda: model(ids, stop_at_layer=2))
    with pytest.raises(ZeroDivisionError):
        enter_and_leave(model, chosen, lambda: 1 / 0)
    # The host makes the per-head results only when asked to.
    heads = model.cfg.n_heads * D_MODEL
    with pytest.raises(HookNeverFiredError, match=r"result\.0"):
        enter_and_leave(model, [Intervention("result.0", Add(draw(heads)))], lambda: model(ids))


@pytest.mark.parametrize(
    ("operators", "refused"),
    [
        (((Replace, "all"), (Ablate, "all")), True),
        (((Add, "response"), (Replace, "response[:3]")), True),
        (((Replace, "response"), (Replace, "all")), True),
        (((Replace, "response[:3]"), (Replace, "response[3:]")), False),
        (((Replace, "response[:4]"), (Replace, "response[3:]")), True),
        (((Replace, "response[:-1]"), (Replace, "response[3:]")), True),
        (((Replace, "response"), (Ablate, "prompt")), False),
        (((Replace, "last_prompt"), (Ablate, "prompt")), True),
        (((Ablate, "all"), (Add, "all"), (Ablate, "all")), False),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_replacement_and_anything_else_on_the_same_tokens_contradict(operators, refused, nested):
    model = load_tiny()
    chosen = [
        Intervention("resid_post.1", kind(draw(D_MODEL)), positions)
        for kind, positions in operators
    ]
    outer, inner = (chosen[:1], chosen[1:]) if nested else ([], chosen)
    hooks = count_hooks(model)
    expectation = (
        pytest.raises(ContradictoryInterventionsError, match=r"resid_post\.1 is replaced")
        if refused
        else pytest.raises(HookNeverFiredError)
    )
    with expectation, intervene(model, outer), intervene(model, inner):
        pass
    assert count_hooks(model) == hooks


@pytest.mark.parametrize(
    ("site", "width", "error", "message"),
    [
        ("resid_post.1", D_MODEL + 1, WidthError, "width 25, and the site has 24"),
        ("resid_post.3", D_MODEL, SiteError, "out of range"),
        ("pos_embed", D_MODEL, SiteError, "has no pos_embed"),
        ("pattern.1", D_MODEL, SiteError, "one vector"),
        ("resid_pots", D_MODEL, SiteError, "nearest"),
    ],
)
def test_a_site_or_width_that_the_model_does_not_have_is_named(site, width, error, message):
    with pytest.raises(error, match=message):
        enter_and_leave(load_tiny(), [Intervention(site, Add(draw(width)))])
