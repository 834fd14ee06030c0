"""An adapter that is missing, doubled or lost to rounding must not pass for one in effect."""

from dataclasses import replace

import pytest
import torch

from emlens.models import proof as proof_module
from emlens.models.adapter_files import load_adapter, save_adapter
from emlens.models.attach import attach_adapter
from emlens.models.copies import copy_weights
from emlens.models.loading import load_base, load_model
from emlens.models.lora import scale_adapter
from emlens.models.merge import merge_adapter
from emlens.models.proof import AdapterNotInEffectError, require_proof, verify_adapter
from emlens.models.views import share_model
from tests.models.adapters import make_peft
from tests.models.tiny import PLAIN, make_ids


def loaded(name, *, dtype=torch.float32, strength=1.0, **settings):
    peft_model = make_peft(name, dtype=dtype, **settings)
    return load_base(peft_model), scale_adapter(load_adapter(peft_model), strength)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
def test_every_module_is_proven_in_effect(name, put):
    base, adapter = loaded(name)
    proof = verify_adapter(put(base, adapter), adapter, base=base)
    assert proof.passed
    assert len(proof.modules) == len(adapter.modules)
    assert proof.kl > 0
    assert proof.kl_of_zero < 1e-6
    for module in proof.modules:
        assert module.ratio == pytest.approx(1.0, abs=1e-3)
        assert module.surviving_share == pytest.approx(1.0, abs=1e-3)
        W, delta = module.delta_norm / module.relative_norm, adapter.modules[module.name].delta()
        assert module.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert W > 0


@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
def test_a_missing_adapter_fails_with_ratio_zero(put):
    base, adapter = loaded("llama")
    nothing = put(base, scale_adapter(adapter, 0.0))
    proof = verify_adapter(nothing, adapter, base=base)
    assert not proof.passed
    assert {round(m.ratio, 6) for m in proof.modules} == {0.0}
    with pytest.raises(AdapterNotInEffectError, match="21 of 21 modules"):
        require_proof(proof)


@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_doubled_scale_fails(put, dtype):
    base, adapter = loaded("qwen2", dtype=dtype)
    proof = verify_adapter(put(base, scale_adapter(adapter, 2.0)), adapter, base=base)
    assert all(m.verdict == "wrong strength" for m in proof.modules)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "neox"])
@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
def test_one_module_left_out_is_named(name, put):
    base, adapter = loaded(name)
    victim = sorted(adapter.modules)[3]
    proof = verify_adapter(put(base, scale_adapter(adapter, {victim: 0.0})), adapter, base=base)
    assert [m.name for m in proof.modules if m.verdict != "in effect"] == [victim]


def test_an_update_below_bfloat16_is_called_lost():
    base, adapter = loaded("llama", dtype=torch.bfloat16, strength=1e-5)
    proof = verify_adapter(merge_adapter(base, adapter), adapter, base=base)
    assert {m.verdict for m in proof.modules} == {"lost in this dtype"}
    with pytest.raises(AdapterNotInEffectError, match="attach instead of merging"):
        require_proof(proof)


@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
def test_a_bfloat16_update_of_one_percent_passes(put):
    base, adapter = loaded("llama", dtype=torch.bfloat16, strength=0.02)
    assert require_proof(verify_adapter(put(base, adapter), adapter, base=base)).passed


def test_a_zero_adapter_is_meant_to_do_nothing():
    base, adapter = loaded("llama")
    zero = scale_adapter(adapter, 0.0)
    proof = verify_adapter(attach_adapter(base, zero), zero)
    assert proof.passed
    assert {m.verdict for m in proof.modules} == {"does nothing"}
    assert proof.behaviour == "no measurable effect on the probe prompt"


@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
def test_the_kl_of_the_zero_adapter_is_measured(put, monkeypatch):
    base, adapter = loaded("llama")
    generator, exact = torch.Generator().manual_seed(0), proof_module.log_probabilities

    def noisy(model, resid):
        logits = exact(model, resid)
        noise = 0.1 * torch.randn(logits.shape, generator=generator)
        return torch.log_softmax(logits + noise, dim=-1)

    monkeypatch.setattr(proof_module, "log_probabilities", noisy)
    proof = verify_adapter(put(base, adapter), adapter, base=base)
    assert 1e-3 < proof.kl_of_zero < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("factors_on", ["cpu", "cuda"])
@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_an_adapter_is_proven_on_a_gpu_wherever_its_factors_are(name, put, factors_on):
    peft_model = make_peft(name)
    adapter = load_adapter(peft_model)
    modules = {
        key: replace(lora, A=lora.A.to(factors_on), B=lora.B.to(factors_on))
        for key, lora in adapter.modules.items()
    }
    base = load_base(peft_model.to("cuda"))
    adapter = replace(adapter, modules=modules)
    assert verify_adapter(put(base, adapter), adapter, base=base).passed


@pytest.mark.gpu
@pytest.mark.parametrize("factors_on", ["cpu", "cuda"])
def test_a_merged_embedding_is_proven_on_a_gpu(factors_on):
    peft_model = make_peft("llama", target_modules=["embed_tokens", "lm_head", "q_proj"])
    adapter = load_adapter(peft_model)
    modules = {
        key: replace(lora, A=lora.A.to(factors_on), B=lora.B.to(factors_on))
        for key, lora in adapter.modules.items()
    }
    base = load_base(peft_model.to("cuda"))
    adapter = replace(adapter, modules=modules)
    assert verify_adapter(merge_adapter(base, adapter), adapter, base=base).passed


@pytest.mark.gpu
def test_an_attached_adapter_follows_its_model_to_a_gpu():
    peft_model = make_peft("llama")
    tuned = attach_adapter(copy_weights(load_base(peft_model)), load_adapter(peft_model))
    ids = make_ids(2, 8)
    expected = tuned(ids)
    tuned.to("cuda", print_details=False)
    assert (tuned(ids).cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_merged_embedding_is_proven():
    base, adapter = loaded("llama", target_modules=["embed_tokens", "lm_head", "q_proj"])
    proof = verify_adapter(merge_adapter(base, adapter), adapter, base=base)
    assert proof.passed
    assert {m.module for m in proof.modules} == {"embed_tokens", "lm_head", "q_proj"}


def test_a_merged_model_without_its_base_cannot_be_verified():
    base, adapter = loaded("llama")
    with pytest.raises(ValueError, match="base: needed"):
        verify_adapter(merge_adapter(base, adapter), adapter)


def test_another_base_is_reported_not_refused():
    base, adapter = loaded("llama")
    foreign = replace(adapter, base_name="org/other", base_fingerprint="f" * 32)
    proof = verify_adapter(attach_adapter(base, foreign), foreign)
    assert "trained on other weights (org/other" in proof.base_verdict
    assert "trained on other weights" in str(proof)
    mirror = replace(adapter, base_name="unsloth/Llama", base_fingerprint=None)
    assert "mirror" in verify_adapter(attach_adapter(base, mirror), mirror).base_verdict


@pytest.mark.parametrize(
    ("base", "revision", "verdict"),
    [
        ("org/base", None, "same"),
        ("org/base", "main", "same"),
        ("org/base@v2", "v2", "same"),
        ("org/base", "v2", "trained on org/base@v2, the base in use names no revision"),
        ("org/base@v1", "v2", "trained on org/base@v2, the base in use is revision v1"),
        ("org/base@v1", None, "trained on org/base, the base in use is revision v1"),
        ("org/other@v2", "v2", "trained on org/base@v2"),
    ],
)
def test_the_revision_is_compared_with_the_base_in_use(base, revision, verdict):
    peft_model = make_peft("llama", target_modules=["down_proj"])
    adapter = load_adapter(peft_model)
    adapter = replace(adapter, base_name="org/base", base_revision=revision)
    model = share_model(load_base(peft_model), name=base)
    assert (
        verify_adapter(attach_adapter(model, adapter), adapter, base=model).base_verdict == verdict
    )


def test_the_revision_survives_saving_and_loading(tmp_path):
    peft_model = make_peft("llama", revision="v2")
    adapter = load_adapter(peft_model)
    assert adapter.base_revision == "v2"
    assert load_adapter(save_adapter(adapter, tmp_path / "saved")).base_revision == "v2"


def test_load_model_refuses_an_adapter_lost_in_bfloat16(tmp_path):
    peft_model = make_peft("llama", dtype=torch.bfloat16)
    adapter = scale_adapter(load_adapter(peft_model), 1e-6)
    base = peft_model.merge_and_unload()
    with pytest.raises(AdapterNotInEffectError):
        load_model(base, adapter=adapter)
