"""What is written must come back through transformers with the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.copies import copy_weights
from emlens.models.export import save_checkpoint
from emlens.models.loading import load_base, load_model
from emlens.models.merge import merge_adapter
from emlens.models.views import lay_views
from tests.models.adapters import make_peft
from tests.models.tiny import PLAIN, make_ids, make_tiny


def reloaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", [*PLAIN, "gpt2-scaled"])
def test_exported_folder_gives_hugging_face_the_same_logits(name, tmp_path):
    hf = make_tiny(name)
    ids = make_ids(2, 10)
    save_checkpoint(lay_views(hf, None), tmp_path / "out")
    again = reloaded(tmp_path / "out")
    expected = hf(ids).logits
    assert (again(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert again.config.tie_word_embeddings == hf.config.tie_word_embeddings


@pytest.mark.parametrize("put", [attach_adapter, merge_adapter])
def test_an_adapter_is_exported_merged_and_loads_as_a_base(put, tmp_path):
    peft_model = make_peft("qwen2")
    ids = make_ids(2, 10)
    expected = peft_model(ids).logits
    save_checkpoint(put(load_base(peft_model), load_adapter(peft_model)), tmp_path / "out")
    got = load_model(str(tmp_path / "out"), dtype="float32")(ids)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_edited_unembedding_is_exported_untied(tmp_path):
    model = copy_weights(lay_views(make_tiny("llama-tied-biased"), None))
    with torch.no_grad():
        model.unembed.W_U.data = model.unembed.W_U.clone()
        model.unembed.W_U += 0.1
    ids = make_ids(1, 6)
    save_checkpoint(model, tmp_path / "out")
    again = reloaded(tmp_path / "out")
    assert not again.config.tie_word_embeddings
    assert (again(ids).logits - model(ids)).abs().max() <= 1e-4


def test_a_bias_the_class_cannot_hold_is_refused(tmp_path):
    model = copy_weights(lay_views(make_tiny("llama"), None))
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.b_out").add_(1.0)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.bias"):
        save_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        save_checkpoint(lay_views(make_tiny("llama"), None), tmp_path)


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(ValueError, match=r"out is a file; name a new folder"):
        save_checkpoint(lay_views(make_tiny("llama"), None), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "keep"
