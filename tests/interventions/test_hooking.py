"""Interventions in effect: against the host's own hooks, cached, padded, paired, interrupted."""

import pytest
import torch

from emlens.data import PositionsError
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
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.hooks import HookNeverFiredError, watch_sites
from emlens.models.kv_cache import KeyValueCache
from emlens.models.loading import load_base
from emlens.models.merge import merge_adapter
from emlens.models.paired import forward_many
from emlens.models.tokens_in_flight import (
    count_positions,
    frame_batch,
    frame_prompts,
    publish_tokens,
)
from emlens.numerics.validation import WidthError
from emlens.sites import SiteError, expand_sites, parse_site
from tests.interventions.vectors import (
    D_MODEL,
    ablate_writes,
    count_hooks,
    draw,
    load_tiny,
    make_batch,
    make_direction,
    per_layer,
    project_out,
    run_hooked,
)
from tests.models.adapters import make_peft
from tests.models.tiny import TINY, make_ids

ONE_EACH = [n for n in ("llama-tied-biased", "qwen3", "gemma3", "gpt2", "neox") if n in TINY]


def close(got, expected, relative=1e-5):
    return float((got - expected).abs().max()) <= relative * float(expected.abs().max())


def enter_and_leave(model, interventions, run=lambda: None):
    with intervene(model, interventions):
        run()


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_direction_ablated_at_every_write_is_gone_from_every_residual_stream(name):
    model, ids = load_tiny(name), make_ids(2, 9)
    direction = make_direction(model)
    sites = expand_sites(["resid_pre", "resid_post", *write_sites(model)], model.cfg)
    seen = {}
    with (
        intervene(model, ablate_direction(direction, at="writes")),
        watch_sites(model, sites, lambda site, x: seen.update({site: x.clone()})),
    ):
        logits = model(ids)
    unit = direction.direction.float()
    for site, x in seen.items():
        assert bool(((x @ unit).abs() <= 1e-5 * x.norm(dim=-1)).all()), site
    assert close(logits, ablate_writes(model, ids, direction.vector))
    assert not close(logits, model(ids), 1e-2)


def test_each_layers_own_direction_is_taken_out_where_it_was_found():
    model, ids = load_tiny(), make_ids(2, 9)
    directions = per_layer(model)
    hooks = {one.site: project_out(one.vector) for one in directions}
    with intervene(model, ablate_direction(directions, at="site")):
        logits = model(ids)
    assert close(logits, run_hooked(model, ids, hooks))
    # Elsewhere, the direction of the site's own layer; the embedding goes with block 0.
    hooks = {
        site: project_out(directions[f"resid_post.{site.layer or 0}"].vector)
        for site in write_sites(model)
    }
    with intervene(model, ablate_direction(directions, at="writes")):
        logits = model(ids)
    assert close(logits, run_hooked(model, ids, hooks))


@pytest.mark.parametrize("at", ["resid_mid", "resid_mid.1", ["resid_pre.2", "attn_out"]])
def test_sites_can_be_named_one_by_one_or_by_stream(at):
    model, ids, direction = load_tiny(), make_ids(2, 9), make_direction()
    places = expand_sites(at, model.cfg)
    chosen = ablate_direction(direction, at=at, allow_other_model=True)
    expected = run_hooked(model, ids, dict.fromkeys(places, project_out(direction.vector)))
    with intervene(model, chosen):
        assert close(model(ids), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_leaves_a_hundredth_at_most(name):
    model, ids = load_tiny(name, torch.bfloat16), make_ids(3, 20)
    sites = expand_sites([*write_sites(model), "resid_post"], model.cfg)
    # The worst vector: what every token has most of.
    means = []
    with watch_sites(model, sites[-1:], lambda _, x: means.append(x.double().mean((0, 1)))):
        model(ids)
    worst = means[0]
    seen = {}
    with (
        intervene(model, [Intervention(str(site), Ablate(worst)) for site in sites]),
        watch_sites(model, sites, lambda site, x: seen.update({site: x.double()})),
    ):
        model(ids)
    unit = worst / worst.norm()
    assert len(seen) == len(sites)
    for site, x in seen.items():
        assert bool(((x @ unit).abs() <= 1e-2 * x.norm(dim=-1)).all()), site


def test_heads_are_counted_together():
    model, ids = load_tiny(), make_ids(1, 5)
    z = parse_site("z.1")
    vector = draw(z.width(model.cfg))

    def shift(x, hook):
        return x + vector.view(z.shape(model.cfg)).float()

    expected = run_hooked(model, ids, {z: shift})
    with intervene(model, [Intervention(z, Add(vector))]):
        assert close(model(ids), expected)


def test_operators_that_meet_act_in_the_order_given():
    model, ids = load_tiny(), make_ids(1, 6)
    v, w = draw(D_MODEL), draw(D_MODEL, seed=1)
    site = parse_site("resid_mid.1")
    x = []
    take = run_hooked(model, ids, {site: lambda y, hook: x.append(y.double())})
    assert take is not None

    def left_by(*operators):
        seen = []
        with (
            intervene(model, [Intervention(site, operator) for operator in operators]),
            watch_sites(model, [site], lambda _, y: seen.append(y.double())),
        ):
            model(ids)
        return seen[0]

    out = project_out(v)
    assert close(left_by(Add(w), Ablate(v)), out(x[0] + w))
    assert close(left_by(Ablate(v), Add(w)), out(x[0]) + w)
    assert close(left_by(Ablate(v), Add(v), Ablate(v)), out(x[0]))
    # Neighbouring ablations take out their span, which one after the other does not.
    both = left_by(Ablate(v), Ablate(w))
    assert float((both @ torch.stack([v, w]).mT).abs().max()) <= 1e-4
    assert close(both, left_by(Ablate(w), Ablate(v)))
    assert float((project_out(w)(out(x[0])) @ v).abs().max()) > 1e-2
    # A cap between them keeps them apart.
    capped = left_by(Ablate(w), Cap(v, threshold=0.1, side="above"), Add(v))
    assert close(capped, cap(project_out(w)(x[0]), v, 0.1) + v)


def cap(x, v, threshold):
    u = v / v.norm()
    return torch.where((x @ u > threshold)[..., None], x + (threshold - x @ u)[..., None] * u, x)


@pytest.mark.parametrize(("side", "sign"), [("above", 1.0), ("below", -1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_moves_what_passes_the_threshold_onto_it_and_leaves_the_rest(side, sign, dtype):
    model, ids = load_tiny(dtype=dtype), make_ids(3, 12)
    site, v = parse_site("resid_post.1"), draw(D_MODEL)
    unit = v / v.norm()
    seen = []
    with watch_sites(model, [site], lambda _, x: seen.append(x.double())):
        model(ids)
        with intervene(model, [Intervention(site, Cap(v, threshold=0.2, side=side))]):
            model(ids)
    # The watcher was there first, so it saw both passes before the cap.
    assert torch.equal(seen[0], seen[1])
    with (
        intervene(model, [Intervention(site, Cap(v, threshold=0.2, side=side))]),
        watch_sites(model, [site], lambda _, x: seen.append(x.double())),
    ):
        model(ids)
    before, after = seen[0], seen[2]
    passed = sign * (before @ unit - 0.2) > 0
    assert passed.any()
    assert not passed.all()
    assert torch.equal(after[~passed], before[~passed])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((after @ unit - 0.2)[passed].abs().max()) <= tolerance * float(before.norm())
    rest = project_out(v)
    assert close(rest(after), rest(before), tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["response", "response[:2]", "prompt", "last_prompt"])
def test_padding_does_not_move_named_positions(side, positions):
    model, v = load_tiny(), draw(D_MODEL)
    chats, batch = make_batch((3, 4), (1, 2), (5, 3), side=side)
    steer = [Intervention("resid_post.0", Add(4 * v), positions)]
    with intervene(model, steer), publish_tokens(model, frame_batch(batch, chats)):
        together = model(batch.ids, attention_mask=batch.mask)
    for row, chat in enumerate(chats):
        mask = steer[0].where.mask(chat)

        def add(x, hook, mask=mask):
            return x + 4 * v.float() * mask[:, None]

        alone = run_hooked(model, chat.ids[None], {"resid_post.0": add})[0]
        assert close(together[row][batch.mask[row].bool()], alone, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["all", "response[:2]", "prompt"])
def test_a_cached_padded_decode_acts_on_the_tokens_of_the_whole_text(name, positions):
    model, v = load_tiny(name), draw(D_MODEL)
    chats, batch = make_batch((3, 4), (1, 4))
    prompts = [chat.prompt_end for chat in chats]
    width = max(prompts)
    ids, mask = batch.ids[:, : width + 4], batch.mask[:, : width + 4]
    changes = [
        Intervention("resid_post.0", Add(4 * v), positions),
        Intervention("mlp_out.1", Ablate(v), positions),
    ]
    frame = frame_prompts(mask[:, :width])
    with intervene(model, changes):
        cache = KeyValueCache(model, batch=2, capacity=width + 4)
        with publish_tokens(model, frame):
            steps = [model(ids[:, :width], attention_mask=mask[:, :width], past_kv_cache=cache)]
        for column in range(width, width + 4):
            new = count_positions(mask)[:, column : column + 1]
            with publish_tokens(model, frame.at(new)):
                steps.append(model(ids[:, column : column + 1], past_kv_cache=cache))
        cached = torch.cat(steps, dim=1)
        for row, prompt in enumerate(prompts):
            text = chats[row].ids[None, : prompt + 4]
            open_text = frame_prompts(torch.ones(1, prompt, dtype=torch.int64))
            with publish_tokens(model, open_text.at(torch.arange(prompt + 4)[None])):
                alone = model(text)[0]
            assert close(cached[row][mask[row].bool()], alone, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("at", ["writes", "resid_post"])
def test_an_intervention_sees_an_attached_adapters_update(name, at):
    peft_model = make_peft(name)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    attached, merged = attach_adapter(base, adapter), merge_adapter(base, adapter)
    ids, direction = make_ids(2, 7), make_direction(base)
    chosen = ablate_direction(direction, at=at)
    with intervene(merged, chosen):
        expected = merged(ids)
    seen = {}
    sites = expand_sites(["attn_out", "mlp_out"], base.cfg) if at == "writes" else []
    with (
        intervene(attached, chosen),
        watch_sites(attached, sites, lambda site, x: seen.update({site: x.clone()})),
    ):
        assert close(attached(ids), expected, 1e-4)
    for x in seen.values():
        assert bool(((x @ direction.direction.float()).abs() <= 1e-5 * x.norm(dim=-1)).all())


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_in_a_paired_forward_both_models_meet_the_intervention_on_the_same_tokens(layers):
    settings = {} if layers is None else {"layers_to_transform": layers}
    peft_model = make_peft("llama", **settings)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    base.tokenizer = load_tiny().tokenizer
    chats, batch = make_batch((3, 4), (1, 2))
    frame, v = frame_batch(batch, chats), draw(D_MODEL)
    changes = [
        Intervention("mlp_out.1", Ablate(v), "response"),
        Intervention("resid_post.0", Add(3 * v), "response[1:]"),
    ]
    with intervene(base, changes), publish_tokens(base, frame):
        paired = forward_many(
            base, [adapter], batch.ids, batch.mask, sites=[], visit=lambda *_: None
        )
    assert paired.method == "paired"
    for index, model in enumerate((base, attach_adapter(base, adapter))):
        with intervene(model, changes), publish_tokens(model, frame):
            alone = model(batch.ids, attention_mask=batch.mask, stop_at_layer=model.cfg.n_layers)
        real = batch.mask.bool()
        assert close(paired.resid[index][real], alone[real])


def test_values_of_another_run_are_put_where_their_tokens_are():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2), (5, 3), side="right")
    site = parse_site("resid_post.1")
    values = draw(3, batch.ids.shape[1], D_MODEL)  # right-padded: column = index in the text
    patch = [Intervention(site, Replace(values), "response")]
    whole = frame_batch(batch, chats)
    with intervene(model, patch), publish_tokens(model, whole):
        expected = model(batch.ids, attention_mask=batch.mask)
    # The same rows left-padded, in another order, one of them gone.
    left = make_batch((3, 4), (1, 2), (5, 3))[1]
    kept = [2, 0]
    frame = frame_batch(left, chats).keep(kept)
    seen = []
    with (
        intervene(model, patch),
        publish_tokens(model, frame),
        watch_sites(model, [site], lambda _, x: seen.append(x.double())),
    ):
        got = model(left.ids[kept], attention_mask=left.mask[kept])
    for place, row in enumerate(kept):
        real, columns = left.mask[row].bool(), batch.mask[row].bool()
        assert close(got[place][real], expected[row][columns], 1e-4)
        response = patch[0].where.mask(chats[row])
        held = seen[0][place][real][response]
        assert close(held, values[row][columns][response], 1e-6)


def test_a_patch_that_does_not_reach_its_tokens_is_refused():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2))
    short = [Intervention("resid_post.1", Replace(draw(2, 6, D_MODEL)), "response")]

    def published():
        with publish_tokens(model, frame_batch(batch, chats)):
            model(batch.ids, attention_mask=batch.mask)

    with pytest.raises(WidthError, match="do not reach every token"):
        enter_and_leave(model, short, published)
    bare = [Intervention("embed", Replace(draw(2, 6, D_MODEL)))]
    with pytest.raises(WidthError, match="under a bare model"):
        enter_and_leave(model, bare, lambda: model(batch.ids))


def test_one_value_can_replace_every_tokens():
    model, ids = load_tiny(), make_ids(2, 5)
    value = draw(D_MODEL)

    def put(x, hook):
        return torch.zeros_like(x) + value.float()

    expected = run_hooked(model, ids, {"mlp_out.0": put})
    with intervene(model, [Intervention("mlp_out.0", Replace(value))]):
        assert close(model(ids), expected)


def test_gradients_flow_through():
    model, v = load_tiny(), draw(D_MODEL)
    x = torch.randn(1, 5, D_MODEL, requires_grad=True)
    changes = [Intervention("resid_post.1", Ablate(v)), Intervention("mlp_out.2", Add(v))]
    with intervene(model, changes):
        model(x, start_at_layer=1).sum().backward()
    got = x.grad
    assert got is not None
    y = x.detach().clone().requires_grad_()
    hooks = {"resid_post.1": project_out(v), "mlp_out.2": lambda z, hook: z + v.float()}
    run_hooked(model, y, hooks, start_at_layer=1).sum().backward()
    assert y.grad is not None
    assert close(got, y.grad)


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


def test_positions_that_select_nothing_in_any_pass_are_an_error():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2))
    chosen = [Intervention("resid_post.0", Ablate(draw(D_MODEL)), "response[7:]")]

    def run():
        with publish_tokens(model, frame_batch(batch, chats)):
            model(batch.ids, attention_mask=batch.mask)

    with pytest.raises(HookNeverFiredError, match=r"response\[7:\] met no such token"):
        enter_and_leave(model, chosen, run)


def test_named_positions_of_a_bare_run_are_refused_with_the_way_out():
    model = load_tiny()
    chosen = [Intervention("resid_post.0", Ablate(draw(D_MODEL)), "response")]
    with pytest.raises(PositionsError, match="publish_tokens"):
        enter_and_leave(model, chosen, lambda: model(make_ids(1, 5)))


def test_tokens_of_another_batch_are_refused():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2))
    chosen = [Intervention("resid_post.0", Ablate(draw(D_MODEL)), "response")]

    def run():
        with publish_tokens(model, frame_batch(batch, chats)):
            model(batch.ids[:1])

    with pytest.raises(WidthError, match="tokens published"):
        enter_and_leave(model, chosen, run)


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
