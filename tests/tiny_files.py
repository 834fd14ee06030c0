"""A tiny base with a chat tokenizer, and adapters of it, as the folders that users have."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
N_CTX = 512


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the tokens of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"})
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def make_tiny_chat_model(*, d_model: int = 24, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, every parameter random."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=d_model,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape)
    return model.eval()


def save_tiny_base(folder: Path, *, d_model: int = 24, seed: int = 0) -> Path:
    """A checkpoint folder as transformers writes it."""
    make_tiny_chat_model(d_model=d_model, seed=seed).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_adapter(
    folder: Path,
    *,
    size: float = 0.3,
    seed: int = 1,
    targets: Sequence[str] = ("q_proj", "o_proj", "down_proj"),
) -> Path:
    """An adapter folder as peft writes it, of the base above."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(make_tiny_chat_model(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
