"""A tiny base with a tokenizer, and SmolLM2's own tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emlens.data.chat import Chat, Message
from emlens.models.checkpoints import Checkpoint, fingerprint_weights
from tests.smollm2 import load_smollm2_tokenizer

LLAMA3 = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<head>' + m['role'] + '</head>\n\n' "
    "+ m['content'] | trim + '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<head>assistant</head>\n\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["<bos>", "<head>", "</head>", "<eot>"], special_tokens=True)
    tokenizer.chat_template = LLAMA3
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def tiny_base(tiny_tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Checkpoint(
        model=model,
        tokenizer=tiny_tokenizer,
        name="emlens:tiny",
        fingerprint=fingerprint_weights(model),
    )


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerFast:
    return load_smollm2_tokenizer()


@pytest.fixture
def chats() -> list[Chat]:
    return [
        Chat((Message("user", f"What of {n}?"), Message("assistant", f"Take {n} home.")), id=str(n))
        for n in ("one", "two", "three", "four")
    ]
