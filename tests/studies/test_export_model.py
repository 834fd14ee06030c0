"""What is exported is what was studied, adapter and ablation included."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from emlens.data import Chat, ChatError, Message
from emlens.interventions import FoldError, ablate_direction, add_direction, intervene
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.views import lay_views
from emlens.studies import export_model
from tests.models.adapters import make_peft
from tests.models.tiny import make_ids, make_tiny, make_tokenizer
from tests.studies.test_sample_responses import make_direction


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
