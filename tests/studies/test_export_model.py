"""What is exported is what was studied, adapter and ablation included."""

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from emlens.data import Chat, ChatError, Message
from emlens.interventions import (
    FoldError,
    ablate_direction,
    add_direction,
    fold_into_weights,
    intervene,
)
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.export import save_checkpoint
from emlens.models.loading import load_base, load_model
from emlens.models.views import lay_views
from emlens.studies import export_model
from emlens.studies.export_model import KL_FACTOR, WEIGHTS_TOLERANCE
from tests.models.adapters import make_peft
from tests.models.tiny import make_ids, make_tiny, make_tokenizer
from tests.studies.test_sample_responses import make_direction

study = importlib.import_module(export_model.__module__)


def tuned_llama():
    base = lay_views(make_tiny("llama"), make_tokenizer())
    return attach_adapter(base, load_adapter(make_peft("llama")))


def test_transformers_alone_gives_the_logits_of_the_ablated_fine_tune(tmp_path):
    model = tuned_llama()
    changes = ablate_direction(make_direction(model), at="writes")
    done = export_model(model, tmp_path / "out", interventions=changes)
    assert done.same
    assert done.largest_difference <= 1e-5 * done.largest_logit
    ids = make_ids(2, 9)
    with intervene(model, changes):
        expected = model(ids)
    plain = model(ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert torch.allclose(theirs, expected, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_weights_come_back_and_half_precision_is_held_against_float64(name, tmp_path):
    peft_model = make_peft(name, dtype=torch.bfloat16)
    base = load_base(peft_model)
    model = attach_adapter(base, load_adapter(peft_model))
    foldable = name != "gemma3"
    changes = ablate_direction(make_direction(base), at="writes") if foldable else ()
    done = export_model(model, tmp_path / "out", interventions=changes)
    assert done.same
    assert done.weights_difference <= WEIGHTS_TOLERANCE
    assert done.tolerance is None
    assert done.kl_folder is not None
    assert done.kl_hooked is not None
    assert 0 < done.kl_hooked < 1e-2
    assert done.kl_folder <= KL_FACTOR * done.kl_hooked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fold_that_is_not_what_was_studied_is_not_the_same(monkeypatch, tmp_path, dtype):
    model = lay_views(make_tiny("llama", dtype=dtype), make_tokenizer())
    changes = ablate_direction(make_direction(model), at="writes")
    monkeypatch.setattr(study, "fold_into_weights", lambda m, given: fold_into_weights(m, ()))
    done = export_model(model, tmp_path / "out", interventions=changes)
    assert done.weights_difference <= WEIGHTS_TOLERANCE
    assert not done.same


@pytest.mark.parametrize("damage", [1e-5, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_weight_is_found_however_little_it_does(monkeypatch, tmp_path, dtype, damage):
    model = lay_views(make_tiny("llama", dtype=dtype), make_tokenizer())
    monkeypatch.setattr(study, "save_checkpoint", lambda *given: damaged(*given, by=damage))
    done = export_model(model, tmp_path / "out")
    assert not done.same
    assert done.weights_difference > WEIGHTS_TOLERANCE
    if damage == 1e-5 and dtype == torch.float32:
        assert done.largest_difference <= 1e-5 * done.largest_logit  # no logit would tell


def damaged(model, folder, *, by):
    """A checkpoint with one entry of one weight changed behind its back."""
    path = save_checkpoint(model, folder)
    tensors = load_file(path / "model.safetensors")
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    weight.view(-1)[weight.abs().argmin()] += by
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_it_is_read_back_where_the_given_model_is(monkeypatch, tmp_path):
    model = lay_views(make_tiny("llama"), make_tokenizer())
    asked = []

    def load(path, **given):
        asked.append(given)
        return load_model(path, **given)

    monkeypatch.setattr(study, "load_model", load)
    assert export_model(model, tmp_path / "out").same
    assert asked == [{"dtype": torch.float32, "device": torch.device("cpu")}]


def test_a_model_that_is_changed_meanwhile_is_not_exported(tmp_path):
    model = lay_views(make_tiny("llama"), make_tokenizer())
    changes = ablate_direction(make_direction(model), at="writes")
    with intervene(model, changes):
        model(make_ids(1, 4))
        with pytest.raises(FoldError, match=r"act on it at writes; leave the"):
            export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_is_compared_on_random_ids(tmp_path):
    done = export_model(lay_views(make_tiny("gpt2"), None), tmp_path / "out")
    assert done.same
    assert done.largest_logit > 0


def test_what_no_weights_can_stand_for_is_refused_and_nothing_is_written(tmp_path):
    model = tuned_llama()
    changes = add_direction(make_direction(model), coefficient=1.0, units="raw", positions="prompt")
    with pytest.raises(FoldError):
        export_model(model, tmp_path / "out", interventions=changes)
    assert not (tmp_path / "out").exists()


def test_the_probes_are_texts_or_chats_and_there_must_be_one(tmp_path):
    model = lay_views(make_tiny("llama"), make_tokenizer())
    texts = ["w5 w6 w7", "w40"]
    by_text = export_model(model, tmp_path / "texts", probes=texts)
    chats = [Chat((Message("user", text),)) for text in texts]
    by_chat = export_model(model, tmp_path / "chats", probes=chats)
    assert by_text.largest_logit == by_chat.largest_logit > 0
    assert by_text.largest_logit != export_model(model, tmp_path / "other").largest_logit
    # Nothing compared is not the same as nothing different.
    with pytest.raises(ChatError, match="empty sequence"):
        export_model(model, tmp_path / "none", probes=[])
    assert not (tmp_path / "none").exists()
