"""One set of weights: what is shared, what is refused, and the host's own parameters and hooks."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformer_lens.pretrained.weight_conversions.mistral import convert_mistral_weights
from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights
from transformer_lens.pretrained.weight_conversions.qwen2 import convert_qwen2_weights
from transformer_lens.pretrained.weight_conversions.qwen3 import convert_qwen3_weights
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.checkpoints import fingerprint_weights, load_checkpoint
from emlens.models.config import find_architecture
from emlens.models.config_fields import check_config
from emlens.models.copies import copy_weights
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.loading import load_base, load_model
from emlens.models.memory import read_sizes
from emlens.models.pair import load_pair
from emlens.models.views import _read_cfg, lay_views, origin_of, share_model
from tests.models.adapters import make_peft
from tests.models.tiny import PLAIN, make_ids, make_tiny

CONVERTERS = {
    "llama": convert_llama_weights,
    "qwen2": convert_qwen2_weights,
    "qwen3": convert_qwen3_weights,
    "mistral": convert_mistral_weights,
    "gemma2": convert_gemma_weights,
    "gemma3": convert_gemma_weights,
    "gpt2": convert_gpt2_weights,
    "neox": convert_neox_weights,
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_parameters_equal_the_hosts_own_conversion(name):
    hf = make_tiny(name)
    model = lay_views(hf, None)
    theirs = CONVERTERS[name](hf, model.cfg)
    if name.startswith("gemma"):  # the host scales the stored embedding, we scale at run time
        theirs["embed.W_E"] = theirs["embed.W_E"] / model.cfg.d_model**0.5
    ours = dict(model.named_parameters())
    for key, value in ours.items():
        if name == "qwen3" and ".b_" in key.replace("._b", ".b"):
            continue  # the host drops the biases of attention_bias configurations
        expected = theirs.get(key)
        if expected is None:
            assert not value.any(), key
        else:
            assert torch.allclose(value, expected.to(value.dtype), rtol=1e-6), key


@pytest.mark.parametrize("name", PLAIN)
def test_hook_points_are_the_hosts_own(name):
    model = lay_views(make_tiny(name), None)
    cfg = model.cfg
    host = HookedTransformer(cfg, None, move_to_device=False)
    assert set(model.hook_dict) == set(host.hook_dict)
    assert set(dict(model.named_parameters())) == set(dict(host.named_parameters()))


@pytest.mark.parametrize("name", PLAIN)
def test_every_hook_point_carries_what_the_hosts_own_forward_gives_it(name):
    hf = make_tiny(name)
    model = lay_views(hf, None)
    host = HookedTransformer(model.cfg, None, move_to_device=False)
    state = {key: value.clone() for key, value in model.named_parameters()}
    if name.startswith("gemma"):
        state["embed.W_E"] = state["embed.W_E"] * model.cfg.d_model**0.5
    host.load_state_dict(state, strict=False)
    for block in host.blocks:
        attn: Any = block.attn
        tables = model.blocks[attn.layer_id].attn
        if hasattr(attn, "rotary_sin"):
            attn.rotary_sin, attn.rotary_cos = tables.rotary_sin, tables.rotary_cos
    ids = make_ids(2, 11)
    _, theirs = host.run_with_cache(ids)
    _, ours = model.run_with_cache(ids)
    # Nobody listens to what enters attention here, so that the blocks run their own way.
    _, own_way = model.run_with_cache(ids, names_filter=lambda key: ".ln1." not in key)
    assert set(ours) == set(theirs)
    assert set(own_way) == {key for key in theirs if ".ln1." not in key}
    for found in (ours, own_way):
        for key in found:
            expected = theirs[key]
            seen = torch.isfinite(expected)
            assert torch.equal(seen, torch.isfinite(found[key])), key
            gap = (found[key].view(expected.shape)[seen] - expected[seen]).abs().max()
            assert gap <= 2e-5 * expected[seen].abs().max().clamp(min=1), key


@pytest.mark.parametrize("name", PLAIN)
def test_every_hook_point_fires_as_often_as_the_hosts_own(name):
    model = lay_views(make_tiny(name), None)
    host = HookedTransformer(model.cfg, None, move_to_device=False)
    counts = []
    for one in (model, host):
        found: Counter[str] = Counter()
        for key, point in one.hook_dict.items():
            point.register_forward_hook(lambda *_, key=key, found=found: found.update([key]))
        one(make_ids(1, 5))
        counts.append(found)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", PLAIN)
def test_only_norms_with_an_offset_are_copied(name):
    hf = make_tiny(name)
    model = lay_views(hf, None)
    storages = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    copied = [
        key
        for key, p in model.named_parameters()
        if p.any() and p.untyped_storage().data_ptr() not in storages
    ]
    offset = find_architecture(type(hf).__name__).norm_offset
    norms = [key for key, _ in model.named_parameters() if key.endswith(("ln1.w", "norm.w"))]
    assert all(key.endswith(".w") for key in copied)
    assert bool(copied) == bool(offset)
    assert not offset or set(norms) <= set(copied)


def test_a_shell_shares_every_weight_and_no_hook():
    model = lay_views(make_tiny("llama"), None)
    point: Any = model.blocks[0].hook_resid_post
    point.add_hook(lambda x, hook: x * 0)
    shell = share_model(model)
    for key, value in model.named_parameters():
        assert shell.get_parameter(key) is value
    assert not any(point._forward_hooks for point in shell.hook_dict.values())
    assert origin_of(shell).fingerprint == origin_of(model).fingerprint


def test_an_edit_of_a_copy_does_not_reach_the_original():
    model = lay_views(make_tiny("llama"), None)
    before = model.W_E.clone()
    copy_weights(model).W_E.data.zero_()
    assert torch.equal(model.W_E, before)


def test_fingerprints_tell_weights_apart_and_not_dtypes():
    first, same, other = (fingerprint_weights(make_tiny("llama", seed=s)) for s in (0, 0, 1))
    assert first == same != other
    assert fingerprint_weights(make_tiny("llama", dtype=torch.bfloat16)) == first
    changed = make_tiny("llama")
    changed.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.05)
    assert fingerprint_weights(changed) != first


def test_another_architecture_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"BloomForCausalLM.*supported: Llama"):
        lay_views(BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1)), None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mlp_bias", True),
        ("quantization_config", {"bits": 4}),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_a_llama_field_that_changes_the_forward_is_refused_by_name(field, value):
    config = LlamaConfig()
    setattr(config, field, value)
    name = {"rope_parameters": "rope_type 'longrope'"}.get(field, field)
    with pytest.raises(ValueError, match=name):
        check_config(config, find_architecture("LlamaForCausalLM"))


def test_a_field_supported_at_one_value_is_refused_at_another():
    config = make_tiny("gemma2").config
    config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match=r"use_bidirectional_attention"):
        check_config(config, find_architecture("Gemma2ForCausalLM"))


def test_a_known_field_without_a_verdict_is_refused_unless_it_holds_its_default():
    llama = find_architecture("LlamaForCausalLM")
    forgetful = replace(llama, handled=llama.handled - {"rms_norm_eps"})
    config = LlamaConfig()
    check_config(config, forgetful)
    config.rms_norm_eps = 0.5
    check_config(config, llama)
    with pytest.raises(
        ValueError, match=r"rms_norm_eps=0\.5 \(default 1e-06\) changes the forward"
    ):
        check_config(config, forgetful)


def test_a_sequence_past_the_first_table_is_rotated_right():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    hf = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 2300))
    with torch.no_grad():
        assert torch.allclose(lay_views(hf, None)(ids), hf(ids).logits, atol=1e-5)


def test_a_sequence_past_the_context_is_named():
    with pytest.raises(ValueError, match=r"context of 64"):
        lay_views(make_tiny("llama"), None)(make_ids(1, 65))


def write(folder, hf):
    hf.save_pretrained(folder)
    return folder


def test_a_folder_loads_in_the_dtype_asked_for(tmp_path):
    folder = write(tmp_path, make_tiny("qwen3"))
    assert load_model(str(folder)).cfg.dtype == torch.float32
    half = load_model(str(folder), dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype='float12'"):
        load_model(str(folder), dtype="float12")


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
    folder = write(tmp_path, make_tiny("llama"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled.*safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("path", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, path):
    folder = write(tmp_path, make_tiny("llama"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": path}}))
    with pytest.raises(ValueError, match=r"plain file name"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "3", "\xff", '{"weight_map": []}', '{"weight_map": {"a": ["x"]}}'),
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_a_malformed_index_is_named(tmp_path, text):
    folder = write(tmp_path, make_tiny("llama"))
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json: not a weight index"):
        load_checkpoint(folder)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_checkpoint(tmp_path)


def test_the_folder_of_a_training_says_where_its_outcome_lies(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json: .*; is .*/adapter meant\?"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"/adapter meant\?"):
        read_sizes(tmp_path)


def test_a_live_model_keeps_its_dtype_or_says_so():
    with pytest.raises(ValueError, match=r"convert it beforehand"):
        load_model(make_tiny("llama"), dtype="bfloat16")


def test_a_model_of_the_hosts_own_loading_is_refused_with_a_hint():
    host = HookedTransformer(lay_views(make_tiny("llama"), None).cfg, None, move_to_device=False)
    with pytest.raises(ValueError, match=r"emlens\.load_model"):
        share_model(host)


def test_a_copy_keeps_ties_and_an_attached_adapter():
    peft_model = make_peft("llama-tied-biased")
    tuned = attach_adapter(load_base(peft_model), load_adapter(peft_model))
    copy = copy_weights(tuned)
    ids = make_ids(1, 6)
    assert torch.equal(copy(ids), tuned(ids))
    before = copy.unembed.W_U.clone()
    copy.embed.W_E.data += 1.0
    assert torch.allclose(copy.unembed.W_U, before + 1.0)
    assert not torch.equal(copy.W_E, tuned.W_E)


def test_gradients_flow_after_decoding():
    model = lay_views(make_tiny("llama"), None)
    ids = make_ids(1, 6)
    sampling = Sampling(1, temperature=0, max_new_tokens=1)
    generate_tokens(model, ids, torch.ones_like(ids), sampling=sampling)
    resid = model(ids, stop_at_layer=0).detach().requires_grad_(True)
    model(resid, start_at_layer=0).sum().backward()
    assert resid.grad is not None
    assert bool(resid.grad.any())


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def drop(tensors):
    del tensors[UP]


def widen(tensors):
    tensors[UP] = torch.zeros(41, 24)


def spoil(tensors):
    tensors[UP][3, 2] = float("nan")


@pytest.mark.parametrize(
    ("change", "says"), [(drop, "lacks"), (widen, "another shape"), (spoil, "NaN")]
)
def test_a_damaged_checkpoint_is_refused_and_the_tensor_named(tmp_path, change, says):
    folder = write(tmp_path, make_tiny("llama"))
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=says) as caught:
        load_checkpoint(folder)
    assert UP in str(caught.value)


def test_a_truncated_checkpoint_is_named(tmp_path):
    folder = write(tmp_path, make_tiny("llama"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        load_checkpoint(folder)


def test_a_live_peft_model_is_no_base_of_a_pair():
    peft_model = make_peft("llama")
    with pytest.raises(ValueError, match=r"LoRA of its own"):
        load_pair(peft_model, load_adapter(peft_model))


def test_a_norm_sees_a_change_of_its_weight_on_the_same_input():
    model: Any = lay_views(make_tiny("llama"), None)
    x = torch.randn(1, 3, model.cfg.d_model)
    before = model.blocks[0].ln1(x)
    with torch.no_grad():
        model.blocks[0].ln1.w *= 2
    assert torch.allclose(model.blocks[0].ln1(x), 2 * before)


def test_an_appended_end_is_no_beginning():
    class Appending:
        bos_token_id, eos_token_id = 1, 2

        def __init__(self, ids):
            self.ids = ids

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": self.ids})()

    hf = make_tiny("llama")
    assert [
        _read_cfg(hf, find_architecture(type(hf).__name__), Appending(ids), "x").default_prepend_bos
        for ids in ([2], [], [1], [1, 2])
    ] == [False, False, True, True]
