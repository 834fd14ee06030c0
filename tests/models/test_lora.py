"""peft's own merge and un-merged forward are the oracle of ours."""

from typing import Any

import pytest
import torch

from emlens.models import attach
from emlens.models.adapter_files import load_adapter, save_adapter
from emlens.models.attach import attach_adapter
from emlens.models.copies import copy_weights
from emlens.models.layout import to_matrix
from emlens.models.loading import load_base, load_model
from emlens.models.lora import read_parameter, scale_adapter
from emlens.models.merge import merge_adapter
from emlens.models.null import sample_null_adapters
from tests.models.adapters import ALL_LINEAR, make_peft, save_peft
from tests.models.tiny import PLAIN, make_ids, make_tiny

RANKS = [{"r": 1, "use_rslora": True}, {"r": 8}, {"r": 32, "use_rslora": True}]


def near(got, expected, tolerance=1e-4):
    return (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("form", ["attached", "merged"])
def test_every_module_equals_pefts_unmerged_forward(name, form):
    peft_model = make_peft(name)
    ids = make_ids(3, 12)
    expected = peft_model(ids).logits
    adapter = load_adapter(peft_model)
    base = load_base(peft_model)
    tuned = (attach_adapter if form == "attached" else merge_adapter)(base, adapter)
    assert near(tuned(ids), expected)
    assert not near(base(ids), expected)


@pytest.mark.parametrize("module", [*ALL_LINEAR])
def test_each_module_alone_equals_pefts_unmerged_forward(module):
    peft_model = make_peft("gemma3", target_modules=[module])
    ids = make_ids(2, 9)
    tuned = attach_adapter(load_base(peft_model), load_adapter(peft_model))
    assert near(tuned(ids), peft_model(ids).logits)


@pytest.mark.parametrize("settings", RANKS)
@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen2", "gpt2", "neox"])
def test_merged_weights_equal_pefts_merge(name, settings, tmp_path):
    peft_model = make_peft(name, **settings)
    adapter = load_adapter(save_peft(peft_model, tmp_path))
    merged = merge_adapter(load_base(peft_model), adapter)
    theirs = load_base(peft_model.merge_and_unload())
    for key, _ in theirs.named_parameters():
        ours, oracle = read_parameter(merged, key), read_parameter(theirs, key)
        assert (ours - oracle).norm() <= 1e-6 * oracle.norm(), key


def last_place(*sizes):
    """The distance of neighbouring numbers at the largest of some sizes, element by element."""
    digits = 8 if sizes[0].dtype == torch.bfloat16 else 24
    largest = torch.stack([size.double().abs() for size in sizes]).amax(0)
    return torch.exp2((torch.frexp(largest).exponent - digits).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_weights_equal_pefts_merge_to_the_last_place(name, dtype):
    peft_model = make_peft(name, dtype=dtype, r=8)
    adapter, base = load_adapter(peft_model), load_base(peft_model)
    merged = merge_adapter(base, adapter)
    untouched = {key: read_parameter(base, key).clone() for key, _ in base.named_parameters()}
    theirs = load_base(peft_model.merge_and_unload())  # in place: the base changes with it
    touched = 0
    for key, before in untouched.items():
        ours, oracle = read_parameter(merged, key), read_parameter(theirs, key)
        # peft rounds the update before it adds it: half a step of its own.
        step = last_place(before, ours, ours - before)
        assert ((ours.double() - oracle.double()).abs() <= step).all(), key
        touched += not torch.equal(ours, before)
    assert touched == {"llama": 21, "gpt2": 18}[name]


def test_a_bfloat16_merge_rounds_once():
    peft_model = make_peft("llama", dtype=torch.bfloat16, r=8)
    adapter = load_adapter(peft_model)
    base = load_base(peft_model)
    merged = merge_adapter(base, adapter)
    W = to_matrix(read_parameter(base, "blocks.1.attn.W_Q"), "heads_out").double()
    exact = W + adapter.modules["model.layers.1.self_attn.q_proj"].delta().double()
    ours = to_matrix(read_parameter(merged, "blocks.1.attn.W_Q"), "heads_out").double()
    assert torch.equal(ours, exact.to(torch.float32).to(torch.bfloat16).double())


def test_rslora_scale_is_alpha_over_root_of_rank(tmp_path):
    folder = save_peft(make_peft("llama", r=16, lora_alpha=64, use_rslora=True), tmp_path)
    assert {m.scale for m in load_adapter(folder).modules.values()} == {16.0}


def test_rank_and_alpha_patterns_are_honoured(tmp_path):
    peft_model = make_peft(
        "llama",
        rank_pattern={"down_proj": 2, "model.layers.1.self_attn.q_proj": 3},
        alpha_pattern={"down_proj": 32},
    )
    adapter = load_adapter(save_peft(peft_model, tmp_path))
    assert adapter.modules["model.layers.0.mlp.down_proj"].scale == 16.0
    assert adapter.modules["model.layers.1.self_attn.q_proj"].rank == 3
    ids = make_ids(1, 8)
    assert near(attach_adapter(load_base(peft_model), adapter)(ids), peft_model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased"])
def test_merged_embedding_adapter_equals_pefts_merge_and_ties_follow(name):
    peft_model = make_peft(name, target_modules=["embed_tokens", "down_proj"])
    merged = merge_adapter(load_base(peft_model), load_adapter(peft_model))
    ids = make_ids(1, 8)
    assert near(merged(ids), peft_model.merge_and_unload()(ids).logits)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_both_ends_of_tied_embeddings_adapted_at_once_are_refused():
    peft_model = make_peft("llama-tied-biased", target_modules=["embed_tokens", "lm_head"])
    adapter, base = load_adapter(peft_model), load_base(peft_model)
    with pytest.raises(ValueError, match=r"embed_tokens and lm_head, which are one matrix"):
        merge_adapter(base, adapter)
    untied = make_peft("llama", target_modules=["embed_tokens", "lm_head"])
    merged, ids = merge_adapter(load_base(untied), load_adapter(untied)), make_ids(1, 8)
    assert near(merged(ids), untied(ids).logits)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased"])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_embedding_adapter_merges_in_float64_without_narrowing(name, target):
    peft_model = make_peft(name, target_modules=[target], dtype=torch.float64)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    merged = merge_adapter(base, adapter)
    (lora,) = adapter.modules.values()
    change = merged.unembed.W_U.mT - base.unembed.W_U.mT
    change = merged.W_E - base.W_E if target == "embed_tokens" else change
    expected = lora.delta().double() if target == "lm_head" else lora.delta().double().mT
    assert (change - expected).abs().max() <= 1e-14


def test_embedding_adapter_has_no_attached_form():
    peft_model = make_peft("llama", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="form='merged'"):
        attach_adapter(load_base(peft_model), load_adapter(peft_model))


def test_attached_adapter_survives_reset_hooks_and_leaves_the_base_alone():
    peft_model = make_peft("qwen2")
    base = load_base(peft_model)
    ids = make_ids(2, 8)
    before = base(ids)
    tuned = attach_adapter(base, load_adapter(peft_model))
    expected = tuned(ids)
    tuned.reset_hooks(including_permanent=True)
    assert torch.equal(tuned(ids), expected)
    assert torch.equal(base(ids), before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox"])
def test_an_attached_adapter_follows_its_model_to_another_dtype(name):
    peft_model = make_peft(name)
    base = copy_weights(load_base(peft_model))  # its weights move with those that share them
    tuned: Any = attach_adapter(base, load_adapter(peft_model))
    ids = make_ids(2, 8)
    expected, plain = tuned(ids), base(ids)
    tuned.to(torch.float64, print_details=False)
    wide = tuned(ids)
    assert wide.dtype == torch.float64
    assert near(wide, expected.double(), 1e-5)
    assert not near(wide, plain.double())
    tuned.to(torch.float32, print_details=False)
    assert near(tuned(ids), expected, 1e-5)
    tuned.to(torch.bfloat16, print_details=False)
    assert tuned(ids).dtype == torch.bfloat16
    assert near(tuned(ids).float(), expected, 0.1)


def test_an_attached_adapter_keeps_nothing_of_a_pass():
    peft_model = make_peft("gpt2")
    tuned: Any = attach_adapter(load_base(peft_model), load_adapter(peft_model))
    readers = {
        id(owner.reader): owner.reader
        for point in tuned.hook_dict.values()
        for hook in point._forward_hooks.values()
        if isinstance(owner := getattr(hook, "__self__", None), attach._Writer)
    }
    assert len(readers) == 4 * tuned.cfg.n_layers
    tuned(make_ids(1, 5))
    assert all(reader._read is None for reader in readers.values())
    with pytest.raises(RuntimeError, match="asked to write before it read"):
        tuned.blocks[1].attn.hook_q(torch.zeros(1, 5, tuned.cfg.n_heads, tuned.cfg.d_head))


def test_users_hooks_and_caches_see_an_attached_adapter():
    peft_model = make_peft("qwen2")
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    ids = make_ids(2, 8)
    attached, merged = attach_adapter(base, adapter), merge_adapter(base, adapter)
    _, seen = attached.run_with_cache(ids)
    _, expected = merged.run_with_cache(ids)
    for point in ("attn.hook_q", "mlp.hook_pre", "hook_mlp_out", "hook_attn_out"):
        assert near(seen[f"blocks.1.{point}"], expected[f"blocks.1.{point}"]), point


def test_merged_model_owns_only_the_touched_matrices():
    peft_model = make_peft("llama", target_modules=["down_proj"])
    base = load_base(peft_model)
    merged = merge_adapter(base, load_adapter(peft_model))
    shared = {p.data_ptr() for p in base.parameters()}
    owned = [n for n, p in merged.named_parameters() if p.data_ptr() not in shared]
    assert owned == [f"blocks.{layer}.mlp.W_out" for layer in range(3)]


def test_zero_scaled_adapter_changes_nothing():
    peft_model = make_peft("llama")
    base = load_base(peft_model)
    zero = scale_adapter(load_adapter(peft_model), 0.0)
    ids = make_ids(2, 8)
    assert torch.equal(merge_adapter(base, zero)(ids), base(ids))
    assert near(attach_adapter(base, zero)(ids), base(ids), 1e-6)


def test_scaling_one_module_leaves_the_others(tmp_path):
    adapter = load_adapter(make_peft("llama"))
    name = "model.layers.0.mlp.down_proj"
    scaled = scale_adapter(adapter, {name: 3.0})
    assert scaled.modules[name].scale == 3 * adapter.modules[name].scale
    others = [n for n in adapter.modules if n != name]
    assert all(scaled.modules[n].scale == adapter.modules[n].scale for n in others)
    with pytest.raises(ValueError, match="does not have"):
        scale_adapter(adapter, {"nowhere": 1.0})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_adapter_gives_peft_and_us_the_same_logits(name, tmp_path):
    from peft import PeftModel

    odd = {"llama": "up_proj", "gpt2": "c_fc"}[name]
    adapter = load_adapter(make_peft(name, use_rslora=True, rank_pattern={odd: 2}))
    folder = save_adapter(adapter, tmp_path / "saved")
    ids = make_ids(1, 8)
    expected = PeftModel.from_pretrained(make_tiny(name), folder)(ids).logits
    got = load_model(make_tiny(name), adapter=str(folder))(ids)
    assert near(got, expected)


def test_null_adapters_keep_shapes_and_norms_and_differ():
    adapter = load_adapter(make_peft("llama", use_rslora=True))
    first, second = sample_null_adapters(adapter, n=2, seed=3)
    for name, module in adapter.modules.items():
        drawn = first.modules[name]
        assert torch.allclose(drawn.delta().norm(), module.delta().norm(), rtol=1e-5)
        assert not torch.allclose(drawn.delta(), module.delta())
        assert not torch.equal(drawn.A, second.modules[name].A)
    again = sample_null_adapters(adapter, n=5, seed=3)[0]
    assert all(torch.equal(again.modules[n].A, m.A) for n, m in first.modules.items())


@pytest.mark.parametrize("point", ["attn.hook_z", "mlp.hook_post", "attn.hook_q", "mlp.hook_pre"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox"])
def test_a_users_edit_reaches_an_attached_adapter_as_it_reaches_a_merged_one(name, point):
    peft_model = make_peft(name)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    ids = make_ids(2, 8)
    edit: list[Any] = [(f"blocks.1.{point}", lambda x, hook: 0.5 * x.flip(1))]
    attached = attach_adapter(base, adapter).run_with_hooks(ids, fwd_hooks=edit)
    merged = merge_adapter(base, adapter).run_with_hooks(ids, fwd_hooks=edit)
    assert near(attached, merged)
    assert not near(attached, attach_adapter(base, adapter)(ids))


def test_a_folder_in_use_is_not_overwritten_by_an_adapter(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        save_adapter(load_adapter(make_peft("llama")), tmp_path)
