"""What interventions do to the values at a site: against the host's own hooks."""

from typing import Any

import pytest
import torch

from emlens.interventions import (
    Ablate,
    Add,
    Cap,
    Intervention,
    Replace,
    Shift,
    ablate_direction,
    fold_into_weights,
    intervene,
    write_sites,
)
from emlens.interventions.hooking import _ShiftChange
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.hooks import watch_sites
from emlens.models.loading import load_base
from emlens.models.merge import merge_adapter
from emlens.numerics.validation import WidthError
from emlens.sites import expand_sites, parse_site
from tests.interventions.vectors import (
    D_MODEL,
    ablate_writes,
    close,
    draw,
    load_tiny,
    make_direction,
    per_layer,
    project_out,
    run_hooked,
)
from tests.models.adapters import make_peft
from tests.models.tiny import TINY, make_ids

ONE_EACH = [n for n in ("llama-tied-biased", "qwen3", "gemma3", "gpt2", "neox") if n in TINY]


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


def give_component(v, mean):
    """A hook function of the host: x - u (u . (x - mean)) in float64, u the unit vector of v."""
    u = v / v.norm()

    def hook(x, hook=None):
        wide = x.double()
        return (wide - ((wide - mean) @ u)[..., None] * u).to(x.dtype)

    return hook


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("at", ["resid_post.1", "writes"])
def test_an_ablation_toward_a_mean_gives_every_token_the_means_component(name, at):
    model, ids = load_tiny(name), make_ids(2, 9)
    v, mean = 3 * draw(D_MODEL), draw(D_MODEL, seed=7)
    sites = write_sites(model) if at == "writes" else (parse_site(at),)
    expected = run_hooked(model, ids, dict.fromkeys(sites, give_component(v, mean)))
    seen = {}
    with (
        intervene(model, [Intervention(at, Ablate(v, toward=mean))]),
        watch_sites(model, sites, lambda site, x: seen.update({site: x.double()})),
    ):
        logits = model(ids)
    assert close(logits, expected)
    wanted = float(v @ mean / v.norm())
    assert abs(wanted) > 0.1
    for site, x in seen.items():
        off = (x @ v / v.norm() - wanted).abs()
        assert bool((off <= 1e-5 * (1 + x.norm(dim=-1))).all()), site
    # As made of a direction, of any norm; and not what taking it out altogether gives.
    direction = make_direction(model, scale=5.0)
    expected = run_hooked(model, ids, dict.fromkeys(sites, give_component(direction.vector, mean)))
    with intervene(model, ablate_direction(direction, at=at, toward=mean)):
        assert close(model(ids), expected)
    with intervene(model, ablate_direction(direction, at=at)):
        assert not close(model(ids), expected, 1e-2)


def test_an_ablation_toward_a_mean_beside_a_plain_one_keeps_both():
    model, ids = load_tiny(), make_ids(2, 9)
    v, w, mean = draw(D_MODEL), draw(D_MODEL, seed=1), draw(D_MODEL, seed=7)
    w = w - v * (v @ w) / (v @ v)  # orthogonal: then one after the other is both at once
    site, seen = parse_site("resid_mid.1"), []
    with watch_sites(model, [site], lambda _, x: seen.append(x.double())):
        model(ids)
    with (
        intervene(model, [Intervention(site, Ablate(w)), Intervention(site, Ablate(v, mean))]),
        watch_sites(model, [site], lambda _, x: seen.append(x.double())),
    ):
        model(ids)
    assert close(seen[1], give_component(v, mean)(project_out(w)(seen[0])))


@pytest.mark.parametrize("attach", [attach_adapter, merge_adapter])
def test_a_rank_one_fine_tune_without_what_it_writes_is_the_base_without_it(attach):
    peft_model = make_peft(
        "llama",
        dtype=torch.float64,
        r=1,
        target_modules=["down_proj"],
        layers_to_transform=[1],
    )
    base, adapter, ids = load_base(peft_model), load_adapter(peft_model), make_ids(2, 9)
    (module,) = adapter.modules.values()
    written = module.B[:, 0].double()
    chosen = [Intervention("mlp_out.1", Ablate(written))]
    tuned = attach(base, adapter)
    assert not close(tuned(ids), base(ids), 1e-3)
    expected = run_hooked(base, ids, {"mlp_out.1": project_out(written)})
    for model in (base, tuned):
        with intervene(model, chosen):
            assert close(model(ids), expected, 1e-9)
        assert close(fold_into_weights(model, chosen)(ids), expected, 1e-9)
        assert not close(model(ids), expected, 1e-3)
    # In peft's own model as well, whose norms are in float32 throughout.
    theirs: Any = peft_model.get_base_model()
    handle = theirs.model.layers[1].mlp.register_forward_hook(
        lambda _m, _a, x: project_out(written)(x)
    )
    assert close(peft_model(ids).logits, expected, 1e-6)
    handle.remove()
    # Another direction out of the module's output leaves the two apart.
    other = [Intervention("mlp_out.1", Ablate(draw(D_MODEL)))]
    got = []
    for model in (base, tuned):
        with intervene(model, other):
            got.append(model(ids))
    assert not close(got[1], got[0], 1e-3)


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
    changes = [
        Intervention("resid_post.1", Ablate(v)),
        Intervention("mlp_out.2", Add(v)),
        Intervention("attn_out.2", Ablate(v, toward=2 * v)),
    ]
    with intervene(model, changes):
        with torch.inference_mode():  # what is kept from the first pass must serve the second
            model(x, start_at_layer=1)
        model(x, start_at_layer=1).sum().backward()
    got = x.grad
    assert got is not None
    y = x.detach().clone().requires_grad_()
    hooks = {
        "resid_post.1": project_out(v),
        "mlp_out.2": lambda z, hook: z + v.float(),
        "attn_out.2": lambda z, hook: project_out(v)(z) + 2 * v.float(),
    }
    run_hooked(model, y, hooks, start_at_layer=1).sum().backward()
    assert y.grad is not None
    assert close(got, y.grad)


def test_a_shift_moves_each_token_by_what_is_read_of_it():
    model, ids = load_tiny(dtype=torch.float64), make_ids(2, 6)
    reads, writes = draw(D_MODEL, seed=1), draw(D_MODEL, seed=2)

    def amount(x: torch.Tensor) -> torch.Tensor:
        return (x @ reads).square()

    with intervene(model, [Intervention("resid_post.1", Shift(writes, amount, "squared"))]):
        _, cache = model.run_with_cache(ids)
    _, plain = model.run_with_cache(ids)
    x = plain["blocks.1.hook_resid_post"]
    expected = x + (x @ reads).square()[..., None] * writes
    found = cache["blocks.1.hook_resid_post"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    first = torch.arange(6) < 1

    def extreme(x: torch.Tensor) -> torch.Tensor:
        assert not bool(x.isnan().any())
        return x.new_ones(len(x))

    change = _ShiftChange(Shift(writes, extreme, "one"))
    values = torch.where(first[None, :, None], torch.nan, x)
    moved = change(values, ~first.expand(2, 6))
    torch.testing.assert_close(moved[:, 1:], x[:, 1:] + writes)
    assert torch.equal(change(x, torch.zeros(2, 6, dtype=torch.bool)), x)
    wrong = Shift(writes, lambda x: x[:, :1], "a column")
    with (
        pytest.raises(WidthError, match=r"amount: it gave \(12, 1\) for 12 values"),
        intervene(model, [Intervention("resid_post.1", wrong)]),
    ):
        model(ids)
    with pytest.raises(ValueError, match="name: got an empty text"):
        Shift(writes, amount, "")
