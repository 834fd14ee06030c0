"""A GGUF file is dequantised once, into a folder that is complete or not there."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from emlens.models import checkpoints
from emlens.models.checkpoints import dequantise_gguf, gguf_folder
from emlens.models.loading import load_model
from tests.models.tiny import D_VOCAB, make_ids, make_tiny

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def rename(name: str) -> str:
    inside = name.removeprefix("model.").removesuffix(".weight")
    if inside in OUTSIDE:
        return f"{OUTSIDE[inside]}.weight"
    _, layer, module = inside.split(".", 2)
    return f"blk.{layer}.{NAMES[module]}.weight"


def interleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The row order of llama.cpp's rotary: the halves of a head by turns."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path: Path) -> Any:
    """The tiny Llama in float32, with a byte-pair tokenizer of letters; returns the model."""
    model: Any = make_tiny("llama")
    cfg = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    writer.add_vocab_size(D_VOCAB)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(33 + i) for i in range(D_VOCAB - 4)]
    writer.add_token_list(["<pad>", "<s>", "</s>", *letters, "!!"])
    writer.add_token_types([3, 3, 3] + [1] * (D_VOCAB - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"attn_q": cfg.num_attention_heads, "attn_k": cfg.num_key_value_heads}
    for name, weight in model.state_dict().items():
        ours = rename(name)
        n_heads = heads.get(ours.split(".")[-2])
        writer.add_tensor(ours, (interleave(weight, n_heads) if n_heads else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EMLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tiny.gguf"


@pytest.fixture
def readings(monkeypatch) -> list[str]:
    """The files that were dequantised."""
    seen: list[str] = []
    plain = checkpoints.AutoModelForCausalLM.from_pretrained

    def watch(*args: Any, **kwargs: Any) -> Any:
        if "gguf_file" in kwargs:
            seen.append(kwargs["gguf_file"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(checkpoints.AutoModelForCausalLM, "from_pretrained", watch)
    return seen


def test_a_file_is_dequantised_once_and_computes_what_it_holds(file, readings):
    written = write_gguf(file)
    ids = make_ids(2, 9)
    model: Any = load_model(str(file))
    expected = written(ids).logits
    assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.tokenizer('!!"').input_ids[-2:] == [D_VOCAB - 1, 4]
    folder = dequantise_gguf(file)
    assert folder == dequantise_gguf(file) == gguf_folder(file)
    load_model(str(file))
    assert readings == ["tiny.gguf"]
    with file.open("ab") as stream:  # another file of the same name
        stream.write(b"\0")
    assert gguf_folder(file) != folder


def test_a_half_written_folder_does_not_count_as_done(file, readings, monkeypatch):
    write_gguf(file)
    plain = checkpoints.AutoTokenizer.from_pretrained

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(OSError, match="the disk is full"):
        dequantise_gguf(file)
    assert list(gguf_folder(file).parent.iterdir()) == []
    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", plain)
    left = gguf_folder(file).parent / ".draft-killed"  # of a process that was killed
    left.mkdir()
    (left / "config.json").write_text("{}")
    folder = dequantise_gguf(file)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        one.name for one in folder.iterdir()
    }
    assert readings == ["tiny.gguf", "tiny.gguf"]
