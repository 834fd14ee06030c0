"""What is in effect inside `with intervene`, what is left afterwards, and what is refused."""

import pytest
import torch

from emlens.interventions import (
    Ablate,
    Add,
    Cap,
    ContradictoryInterventionsError,
    Intervention,
    Replace,
    ablate_direction,
    active_interventions,
    intervene,
    write_sites,
)
from emlens.models.hooks import HookNeverFiredError, watch_sites
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


V, W, M = draw(D_MODEL), draw(D_MODEL, seed=1), draw(D_MODEL, seed=7)
BETWEEN = Intervention("resid_post.1", Add(W))
CONTRADICTIONS = [
    # One vector toward two values, whatever its length and sign, next to each other or not.
    ([(Ablate(V), "all"), (Ablate(V, M), "all")], "toward different values"),
    ([(Ablate(V, M), "all"), (Ablate(-3 * V.float()), "all")], "toward different values"),
    ([(Ablate(V, M), "response"), (Ablate(V), "all")], "toward different values"),
    ([(Ablate(V, M), "response[:4]"), (Ablate(V), "response[3:]")], "toward different values"),
    ([(Ablate(V), "all"), (Ablate(W), "all"), (Ablate(V - W, M), "all")], "depend on each other"),
    ([(Ablate(V, M), "all"), (Ablate(2 * V, M), "all")], None),
    ([(Ablate(V, M), "prompt"), (Ablate(V), "response")], None),
    ([(Ablate(V, M), "all"), (Ablate(W), "all")], None),
    # No token has all three, though each shares some with the first.
    ([(Ablate(V), "all"), (Ablate(W), "prompt"), (Ablate(V - W, M), "response")], None),
    ([(Cap(V, 1.0, "above"), "all"), (Cap(V, 2.0, "below"), "all")], "no value between them"),
    ([(Cap(2 * V, 2.0, "below"), "prompt"), (Cap(V, 1.0, "above"), "all")], "below 2 and above 1"),
    ([(Cap(V, 1.0, "above"), "all"), (Cap(-V, -2.0, "above"), "all")], "no value between them"),
    ([(Cap(V, 2.0, "above"), "all"), (Cap(V, 1.0, "below"), "all")], None),
    ([(Cap(V, 1.0, "above"), "all"), (Cap(V, 1.0, "below"), "all")], None),
    ([(Cap(V, 1.0, "above"), "all"), (Cap(-V, 2.0, "below"), "all")], None),
    ([(Cap(V, 1.0, "above"), "all"), (Cap(W, 2.0, "below"), "all")], None),
    ([(Cap(V, 1.0, "above"), "prompt"), (Cap(V, 2.0, "below"), "response")], None),
]


@pytest.mark.parametrize(("acts", "message"), CONTRADICTIONS)
@pytest.mark.parametrize("nested", [False, True])
def test_what_no_order_could_satisfy_is_refused_wherever_tokens_may_be_shared(
    acts, message, nested
):
    model = load_tiny()
    first, *rest = [Intervention("resid_post.1", operator, where) for operator, where in acts]
    outer, inner = ([first], [BETWEEN, *rest]) if nested else ([], [first, BETWEEN, *rest])
    expectation = (
        pytest.raises(HookNeverFiredError)
        if message is None
        else pytest.raises(ContradictoryInterventionsError, match=rf"resid_post\.1.*{message}")
    )
    with expectation, intervene(model, outer), intervene(model, inner):
        pass
    assert count_hooks(model) == 0


def test_nested_ablations_of_oblique_vectors_act_one_after_the_other():
    model, ids, seen = load_tiny(), make_ids(1, 6), []
    site = parse_site("resid_mid.1")
    run_hooked(model, ids, {site: lambda y, hook: seen.append(y.double())})
    with (
        intervene(model, [Intervention(site, Ablate(V))]),
        intervene(model, [Intervention(site, Ablate(W))]),
        watch_sites(model, [site], lambda _, y: seen.append(y.double())),
    ):
        model(ids)
    assert close(seen[1], project_out(W)(project_out(V)(seen[0])))


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
