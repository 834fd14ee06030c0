"""Every row of the verdict table, and every way in which adapter files can be bad."""

import json
import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from emlens.models.adapter_files import load_adapter
from emlens.models.loading import load_base, load_model
from tests.models.adapters import ALL_LINEAR, make_peft, save_peft
from tests.models.tiny import make_ids, make_tiny


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_peft(make_peft("llama", r=2), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def folder(pristine, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((pristine / name).read_bytes())
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


MODULES = [
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"

REFUSED = {
    "peft_type": "IA3",
    "r": 0,
    "lora_alpha": "much",
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "bias": "all",
    "lora_bias": True,
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "arrow_config": {"top_k": 2, "router_temperature": 0.5},
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "use_bdlora": {"nblocks": 2},
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.weight"],
    "a_field_of_tomorrow": 7,
    "another_of_tomorrow": 0,
    "base_model_name_or_path": ["org/base"],
    "revision": 3,
    "rank_pattern": {"down_proj": 0},
    "alpha_pattern": {"(a|b)+$": 3},
}


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_a_field_that_cannot_be_honoured_is_refused_by_name(folder, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(ValueError, match=field if field != "alpha_pattern" else "pattern"):
        load_adapter(folder)


@pytest.mark.parametrize("method", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(folder, method):
    edit_config(folder, init_lora_weights=method)
    with pytest.raises(ValueError, match=r"changes the base weights"):
        load_adapter(folder)


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_read(folder, value):
    edit_config(folder, init_lora_weights=value)
    assert load_adapter(folder).ranks == (2,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inference_mode", False),
        ("lora_dropout", 0.3),
        ("peft_version", "99.0"),
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("megatron_core", "os.system"),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("task_type", "SEQ_CLS"),
        ("revision", "main"),
        ("a_field_of_tomorrow", None),
        ("another", False),
        ("qalora_group_size", 16),
    ],
)
def test_inert_fields_change_nothing(folder, field, value):
    before = load_adapter(folder)
    edit_config(folder, **{field: value})
    assert load_adapter(folder).fingerprint == before.fingerprint


def test_every_field_of_the_installed_config_has_a_verdict_at_its_default(folder):
    config = {k: v for k, v in LoraConfig().to_dict().items() if k not in ("r", "target_modules")}
    edit_config(folder, **json.loads(json.dumps(config, default=str)) | {"peft_type": "LORA"})
    assert load_adapter(folder).ranks == (2,)


def test_handled_fields_are_listed_with_their_values(folder):
    edit_config(folder, use_rslora=True)
    verdicts = {field: value for field, value, _ in load_adapter(folder).verdicts}
    assert verdicts["use_rslora"] == "true"
    assert verdicts["r"] == "2"


def test_fields_that_name_code_are_never_imported(folder, monkeypatch):
    import importlib

    edit_config(folder, auto_mapping={"parent_library": "antigravity"}, megatron_core="antigravity")
    calls = []
    monkeypatch.setattr(importlib, "import_module", lambda name, *a: calls.append(name))
    load_adapter(folder)
    assert calls == []


def test_targets_without_tensors_are_an_error(folder):
    edit_config(folder, target_modules=[*ALL_LINEAR, "lm_head"])
    with pytest.raises(ValueError, match=r"names 'lm_head', but no tensor adapts it"):
        load_adapter(folder)


def drop(folder, *modules):
    def change(tensors):
        for key in [k for k in tensors if any(f".{module}.lora_" in k for module in modules)]:
            del tensors[key]

    edit_tensors(folder, change)


@pytest.mark.parametrize("targets", [ALL_LINEAR, "all-linear"])
def test_a_module_left_out_of_one_layer_is_an_error(folder, targets):
    edit_config(folder, target_modules=targets)
    drop(folder, "layers.1.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj.*incomplete"):
        load_adapter(folder)


def test_a_module_left_out_of_a_layer_that_was_asked_for_is_an_error(folder):
    edit_config(folder, layers_to_transform=[0, 1])
    drop(folder, *(f"layers.2.{name}" for name in MODULES), "layers.1.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj.*incomplete"):
        load_adapter(folder)


def test_a_module_may_be_left_out_of_one_layer_where_the_config_says_so(folder):
    drop(folder, "layers.1.self_attn.q_proj")
    edit_config(folder, exclude_modules=["layers.1.self_attn.q_proj"])
    adapter = load_adapter(folder)
    assert len(adapter.modules) == 20
    load_model(make_tiny("llama"), adapter=adapter)
    edit_config(folder, exclude_modules=r".*\.1\.self_attn\.q_proj")
    assert load_adapter(folder).fingerprint == adapter.fingerprint
    edit_config(folder, exclude_modules=None, target_modules=sorted(adapter.modules))
    assert load_adapter(folder).fingerprint == adapter.fingerprint


def test_a_layer_of_the_base_left_out_is_an_error_unless_the_config_says_so(folder):
    drop(folder, *(f"layers.2.{name}" for name in MODULES))
    adapter = load_adapter(folder)  # without a base nobody knows how many layers there are
    with pytest.raises(ValueError, match=r"no tensor adapts model\.layers\.2\."):
        load_model(make_tiny("llama"), adapter=adapter)
    load_model(make_tiny("llama"), adapter=replace(adapter, every_layer=()))
    edit_config(folder, layers_to_transform=[0, 1])
    load_model(make_tiny("llama"), adapter=str(folder))


@pytest.mark.parametrize("pattern", ["layers", ["h", "layers"], ["model.layers"], None, []])
def test_a_layers_pattern_that_finds_the_layers_is_honoured(tmp_path, pattern):
    peft_model = make_peft("llama", layers_to_transform=[0, 2], layers_pattern=pattern)
    ids = make_ids(1, 8)
    expected = peft_model(ids).logits
    tuned = load_model(make_tiny("llama"), adapter=str(save_peft(peft_model, tmp_path)))
    assert (tuned(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("pattern", "says"), [("blocks", "no layer below blocks"), ("(a+)+$", "regular expression")]
)
def test_a_layers_pattern_that_does_not_find_the_layers_is_named(folder, pattern, says):
    edit_config(folder, layers_to_transform=[0, 1, 2], layers_pattern=pattern)
    with pytest.raises(ValueError, match=says):
        load_adapter(folder)


def test_a_module_targeted_by_its_whole_name_needs_no_layer(tmp_path):
    targets = ["down_proj", "lm_head"]
    peft_model = make_peft("llama", target_modules=targets, layers_to_transform=[1])
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert set(load_adapter(tmp_path).modules) == {"model.layers.1.mlp.down_proj", "lm_head"}


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(self_attn|mlp)\..*", "(.*)*(.*)*(.*)*x"])
def test_targets_that_are_a_pattern_are_taken_from_the_tensors(folder, targets):
    before = load_adapter(folder)
    edit_config(folder, target_modules=targets)
    after = load_adapter(folder)
    assert after.fingerprint == before.fingerprint
    assert ("target_modules", json.dumps(targets), "handled") in after.verdicts


def test_tensors_without_target_are_an_error(folder):
    edit_config(folder, target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"target_modules does not name"):
        load_adapter(folder)


def test_layers_to_transform_must_match_the_tensors(folder):
    edit_config(folder, layers_to_transform=[0, 1])
    with pytest.raises(ValueError, match=r"layers_to_transform"):
        load_adapter(folder)


def test_excluded_modules_must_not_be_adapted(folder):
    edit_config(folder, exclude_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"exclude_modules"):
        load_adapter(folder)


def test_nan_tensors_are_named(folder):
    edit_tensors(folder, lambda t: t[KEY].fill_(math.nan))
    with pytest.raises(ValueError, match=r"down_proj.*NaN"):
        load_adapter(folder)


def test_a_missing_factor_is_named(folder):
    edit_tensors(folder, lambda t: t.pop(KEY))
    with pytest.raises(ValueError, match=r"down_proj has no factor A"):
        load_adapter(folder)


def test_an_oversized_factor_is_named(folder):
    edit_tensors(folder, lambda t: t.update({KEY: torch.ones(5, 40)}))
    with pytest.raises(ValueError, match=r"rank 2"):
        load_adapter(folder)


def test_a_tensor_that_is_no_factor_is_named(folder):
    edit_tensors(folder, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_adapter(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"truncated"):
        load_adapter(folder)


def test_pickled_weights_are_refused_with_a_way_out(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"not opened")
    with pytest.raises(ValueError, match=r"pickled.*safetensors"):
        load_adapter(folder)


def test_an_oversized_config_is_refused_unread(folder):
    (folder / "adapter_config.json").write_text("[" + " " * (1 << 20) + "]")
    with pytest.raises(ValueError, match=r"larger than"):
        load_adapter(folder)


MALFORMED = ["{", "\xff", pytest.param("[" * 100_000, id="nested")]


@pytest.mark.parametrize("text", [*MALFORMED, "[]"])
def test_a_malformed_config_is_named(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_adapter(folder)


@pytest.mark.parametrize("text", [*MALFORMED, '{"base": [1]}', '{"base_fingerprint": 3}'])
def test_a_malformed_record_is_named(folder, text):
    (folder / "emlens.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"emlens\.json|base"):
        load_adapter(folder)


def test_an_adapter_of_zeros_does_nothing_and_says_so(folder):
    edit_tensors(folder, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    with pytest.raises(ValueError, match=r"does nothing"):
        load_adapter(folder)
    assert load_adapter(folder, allow_noop=True).ranks == (2,)


def test_another_bases_shapes_are_named(pristine):
    with pytest.raises(ValueError, match=r"shape \(12, 24\), this base needs \(20, 24\)"):
        load_model(make_tiny("qwen3"), adapter=str(pristine))


def test_another_bases_names_are_named(pristine):
    with pytest.raises(ValueError, match=r"no module of GPT2LMHeadModel"):
        load_model(make_tiny("gpt2"), adapter=str(pristine))


def test_an_adapter_folder_as_a_base_is_refused_with_a_hint(pristine):
    with pytest.raises(ValueError, match=r"adapter="):
        load_model(str(pristine))


def test_unmerged_lora_in_a_live_model_is_refused_unless_the_peft_model_itself_is_given():
    peft_model = make_peft("llama")
    with pytest.raises(ValueError, match=r"un-merged LoRA"):
        load_base(cast(PreTrainedModel, peft_model.get_base_model()))
    ids = make_ids(1, 8)
    tuned, expected = load_model(peft_model)(ids), peft_model(ids).logits
    assert (tuned - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_live_peft_model_and_an_adapter_at_once_are_refused(pristine):
    with pytest.raises(ValueError, match=r"already carries one"):
        load_model(make_peft("llama"), adapter=str(pristine))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha_pattern", ["down_proj"]),
        ("rank_pattern", "down_proj"),
        ("target_modules", {"down_proj": 1}),
        ("target_modules", [3]),
        ("exclude_modules", [None]),
        ("layers_to_transform", ["0", "1"]),
        ("layers_to_transform", "0"),
    ],
)
def test_a_field_of_another_type_is_named(folder, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(ValueError, match=field):
        load_adapter(folder)


def test_settings_that_only_initialise_are_inert(folder):
    edit_config(folder, init_lora_weights="eva", eva_config={"rho": 3.0, "tau": 0.9})
    assert load_adapter(folder).modules
