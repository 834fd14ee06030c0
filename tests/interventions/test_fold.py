"""Weights that do what the hooks did, and folders that do it in other people's code."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from emlens.interventions import (
    Ablate,
    Add,
    Cap,
    FoldError,
    Intervention,
    OtherModelError,
    Replace,
    ablate_direction,
    add_direction,
    fold_into_weights,
    intervene,
    write_sites,
)
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter, attached_adapter
from emlens.models.export import save_checkpoint
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.hooks import watch_sites
from emlens.models.loading import load_base, load_model
from emlens.models.reading import identify
from emlens.models.views import lay_views, origin_of
from emlens.numerics.divergence import kl_divergence
from emlens.sites import expand_sites
from tests.interventions.vectors import ablate_writes, draw, load_tiny, make_direction, per_layer
from tests.models.adapters import make_peft
from tests.models.tiny import TINY, make_ids, make_tiny

FOLDABLE = [name for name in TINY if not name.startswith("gemma")]
EXPORTED = ("llama", "llama-tied-biased", "qwen2-yarn-tied", "qwen3", "mistral", "gpt2", "neox")
WITH_BIASES = ("gpt2", "gpt2-scaled", "neox")


def run(model, interventions, ids):
    with intervene(model, interventions):
        return model(ids)


def gap(got, expected):
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


def reload(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype
    ).eval()


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_an_ablation_at_every_write_folds_exactly(name, dtype, limit):
    model, ids = load_tiny(name, dtype), make_ids(2, 12)
    direction = make_direction(model)
    chosen = ablate_direction(direction, at="writes")
    folded = fold_into_weights(model, chosen)
    assert gap(folded(ids), run(model, chosen, ids)) <= limit
    assert gap(folded(ids), ablate_writes(model, ids, direction.vector)) <= limit
    assert gap(folded(ids), model(ids)) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_every_layers_own_direction_and_some_writes_only_fold_as_well(name):
    model, ids = load_tiny(name, torch.float64), make_ids(2, 12)
    chosen = [
        *ablate_direction(per_layer(model), at="writes"),
        *ablate_direction(make_direction(model, seed=9), at=["attn_out.1", "mlp_out"]),
    ]
    assert gap(fold_into_weights(model, chosen)(ids), run(model, chosen, ids)) <= 1e-9


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "gpt2", "neox"])
@pytest.mark.parametrize("at", ["resid_pre", "resid_post", "embed", "attn_out.1", "mlp_out.2"])
def test_an_addition_folds_into_the_bias_of_the_last_write(name, at):
    model, ids = load_tiny(name, torch.float64), make_ids(2, 12)
    steer = add_direction(make_direction(model), coefficient=-2.5, units="delta_norm", at=at)
    ablated = ablate_direction(make_direction(model, seed=4), at="writes")
    for chosen in (steer, (*steer, *ablated), (*ablated, *steer)):
        assert gap(fold_into_weights(model, chosen)(ids), run(model, chosen, ids)) <= 1e-9


def test_an_addition_in_the_middle_of_a_block_folds_into_the_attentions_bias():
    model, ids = load_tiny("llama", torch.float64), make_ids(2, 12)
    chosen = [Intervention("resid_mid", Add(draw(24)))]
    assert gap(fold_into_weights(model, chosen)(ids), run(model, chosen, ids)) <= 1e-9


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_an_affine_ablation_folds(name):
    model, ids = load_tiny(name, torch.float64), make_ids(2, 12)
    mean = draw(model.cfg.d_model, seed=7)
    chosen = ablate_direction(make_direction(model), at="writes", toward=mean)
    folded = fold_into_weights(model, chosen)
    assert gap(folded(ids), run(model, chosen, ids)) <= 1e-9
    plain = ablate_direction(make_direction(model), at="writes")
    assert gap(folded(ids), run(model, plain, ids)) > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "neox"])
def test_an_attached_adapter_is_merged_first(name):
    peft_model = make_peft(name)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    tuned, ids = attach_adapter(base, adapter), make_ids(2, 12)
    chosen = ablate_direction(make_direction(base), at="writes")
    folded = fold_into_weights(tuned, chosen)
    assert attached_adapter(folded) is None
    assert attached_adapter(tuned) is adapter
    assert gap(folded(ids), run(tuned, chosen, ids)) <= 1e-5
    assert gap(fold_into_weights(tuned, ())(ids), tuned(ids)) <= 1e-5


def test_what_is_not_touched_is_shared_and_the_argument_stays_as_it_was():
    model, ids = load_tiny("llama-tied-biased"), make_ids(1, 6)
    before = model(ids)
    folded = fold_into_weights(model, ablate_direction(make_direction(model), at="writes"))
    assert torch.equal(model(ids), before)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    own = {
        name.rsplit(".", 1)[-1]
        for name, value in folded.named_parameters(remove_duplicate=False)
        if value.data_ptr() != theirs[name].data_ptr()
    }
    assert own == {"W_E", "W_O", "b_O", "W_out", "b_out"}
    steered = fold_into_weights(model, [Intervention("mlp_out.1", Add(draw(24)))])
    changed = {
        name
        for name, value in steered.named_parameters(remove_duplicate=False)
        if value.data_ptr() != theirs[name].data_ptr()
    }
    assert changed == {"blocks.1.mlp.b_out"}
    names = {origin_of(one).name for one in (model, folded, steered)}
    assert len(names) == 3


@pytest.mark.parametrize("name", EXPORTED)
def test_a_folded_model_survives_export_and_both_loaders(name, tmp_path):
    model, ids = load_tiny(name), make_ids(2, 12)
    folded = fold_into_weights(model, ablate_direction(make_direction(model), at="writes"))
    expected = folded(ids)
    save_checkpoint(folded, tmp_path / "out")
    theirs = reload(tmp_path / "out")
    assert theirs.config.tie_word_embeddings is False
    assert gap(theirs(ids).logits, expected) <= 1e-5
    assert gap(load_model(str(tmp_path / "out"), dtype="float32")(ids), expected) <= 1e-5


@pytest.mark.parametrize("name", WITH_BIASES)
def test_an_affine_ablation_is_exported_where_the_class_has_biases(name, tmp_path):
    model, ids = load_tiny(name), make_ids(2, 12)
    chosen = ablate_direction(
        make_direction(model), at="writes", toward=draw(model.cfg.d_model, seed=7)
    )
    folded = fold_into_weights(model, chosen)
    save_checkpoint(folded, tmp_path / "out")
    assert gap(reload(tmp_path / "out")(ids).logits, folded(ids)) <= 1e-5
    again = load_model(str(tmp_path / "out"), dtype="float32")
    assert gap(again(ids), run(model, chosen, ids)) <= 1e-5


def test_an_affine_ablation_is_not_exported_where_the_class_has_no_bias(tmp_path):
    model = load_tiny("llama")
    chosen = ablate_direction(make_direction(model), at="writes", toward=draw(24, seed=7))
    said = r"bias is not zero, and LlamaForCausalLM cannot hold it.*ablate without toward="
    with pytest.raises(ValueError, match=said):
        save_checkpoint(fold_into_weights(model, chosen), tmp_path / "out")


V = draw(24)


@pytest.mark.parametrize(
    ("name", "chosen", "why"),
    [
        ("llama", Intervention("mlp_out.1", Cap(V, 0.1, "above")), "Cap at mlp_out.1"),
        ("llama", Intervention("mlp_out.1", Replace(V)), "Replace at mlp_out.1"),
        ("llama", Intervention("mlp_out.1", Ablate(V), "response"), "positions response"),
        ("llama", Intervention("mlp_out.1", Ablate(V), "all[1:]"), "positions all"),
        ("llama", Intervention("resid_post.1", Ablate(V)), "ablate at='writes'"),
        ("llama", Intervention("resid_pre.0", Ablate(V)), "ablate at='writes'"),
        ("llama", Intervention("ln1_normalized.1", Add(V)), "no output of weights alone"),
        ("llama", Intervention("ln_final_normalized", Add(V)), "no output of weights alone"),
        ("gemma2", Intervention("writes", Ablate(V)), "Gemma2ForCausalLM norms"),
        ("gemma3", Intervention("mlp_out.1", Add(V)), "Gemma3ForCausalLM norms"),
    ],
)
def test_what_is_not_exact_as_weights_is_refused_by_name(name, chosen, why):
    with pytest.raises(FoldError, match=why):
        fold_into_weights(load_tiny(name), [chosen])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fold_in_bfloat16_is_as_near_to_the_exact_model_as_the_hooks_are(name):
    """Both round, each in its own way: what tells is how far each is from the same in float64."""
    rounded = make_tiny(name, dtype=torch.bfloat16)
    half, exact = (lay_views(hf, None) for hf in (rounded, copy.deepcopy(rounded).double()))
    ids = make_ids(8, 32)
    chosen = ablate_direction(make_direction(half), at="writes")

    def kl_to(model, chosen=()):
        log_p = torch.log_softmax(run(exact, wanted, ids), dim=-1)
        return float(kl_divergence(log_p, run(model, chosen, ids).double().log_softmax(-1)).mean())

    wanted = ablate_direction(make_direction(exact), at="writes")
    folded, hooked = kl_to(fold_into_weights(half, chosen)), kl_to(half, chosen)
    assert 0 < folded <= 1.25 * hooked
    assert folded <= kl_to(half) / 100


def test_a_direction_of_a_folded_model_is_not_one_of_the_model_it_was_folded_from():
    model, ids = load_tiny("llama"), make_ids(1, 6)
    folded = fold_into_weights(model, ablate_direction(make_direction(model), at="writes"))
    again = fold_into_weights(folded, ablate_direction(make_direction(model, seed=4), at="writes"))
    mark = identify(folded).base_fingerprint
    assert len({mark, identify(model).base_fingerprint, identify(again).base_fingerprint}) == 3
    own = ablate_direction(make_direction(folded), at="writes")
    for one in (folded, again):
        run(one, own, ids)
        run(one, ablate_direction(make_direction(model), at="writes"), ids)
    with pytest.raises(OtherModelError):
        run(model, own, ids)


def test_weights_are_not_taken_from_a_model_that_is_changed_meanwhile(tmp_path):
    model: Any = load_tiny()
    chosen = ablate_direction(make_direction(model), at="writes")

    def both_refuse(message):
        with pytest.raises(FoldError, match=message):
            fold_into_weights(model, chosen)
        with pytest.raises(ValueError, match=message):
            save_checkpoint(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    with intervene(model, chosen):
        model(make_ids(1, 4))
        both_refuse(r"interventions act on it at writes; leave the `with intervene")
    model.add_hook("blocks.1.hook_resid_post", lambda value, hook: value + 1)
    try:
        both_refuse(r"no Interventions sit on it at blocks\.1\.hook_resid_post; remove")
    finally:
        model.reset_hooks()
    save_checkpoint(fold_into_weights(model, chosen), tmp_path / "out")


@pytest.mark.slow
def test_smollm2_with_a_direction_out_of_every_write_hooked_folded_and_exported(tmp_path):
    """The whole way on the shipped model: prompt and generated tokens, cached and not."""
    model = load_model("emlens:smollm2", dtype="float32")
    ids = make_ids(2, 12)
    # The vector that all activations share most: whatever is left of it is easy to see.
    means = {}
    deep = expand_sites("resid_post.20", model.cfg)
    with watch_sites(model, deep, lambda site, x: means.update({site: x.mean((0, 1))})):
        model(ids)
    v = means[deep[0]].double()
    chosen = [Intervention("writes", Ablate(v))]
    writes, unit = write_sites(model), (v / v.norm()).float()
    assert len(writes) == 61
    sites = [*writes, *expand_sites("resid_post", model.cfg)]
    worst = 0.0

    def look(_, x):
        nonlocal worst
        worst = max(worst, float(((x @ unit).abs() / x.norm(dim=-1)).max()))

    def decode(from_model):
        sampling = Sampling(n=1, temperature=0.0, max_new_tokens=6)
        made = generate_tokens(from_model, ids, torch.ones_like(ids), sampling=sampling)
        return torch.stack(list(made.ids))

    with intervene(model, chosen), watch_sites(model, sites, look):
        model(ids)
        decode(model)
    assert 0 < worst <= 1e-5
    # Without what all activations share the model amplifies rounding; another vector for folding.
    chosen = [Intervention("writes", Ablate(draw(model.cfg.d_model)))]
    with intervene(model, chosen):
        hooked, new = model(ids), decode(model)
    folded = fold_into_weights(model, chosen)
    assert float((folded(ids) - hooked).abs().max()) <= 1e-4
    assert torch.equal(decode(folded), new)
    save_checkpoint(folded, tmp_path / "out")
    theirs = reload(tmp_path / "out")
    assert theirs.config.tie_word_embeddings is False
    with torch.no_grad():
        exact, own = reload(tmp_path / "out", torch.float64)(ids).logits, theirs(ids).logits
    assert float((own - hooked).abs().max()) <= 1e-4
    for logits in (hooked, folded(ids)):
        assert (logits - exact).abs().max() <= (own - exact).abs().max()
