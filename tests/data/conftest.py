"""Tokenizers and chat templates of several families, small enough to build here."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests.smollm2 import load_smollm2_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
        " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "default system": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
    ),
    # Spaces around each text belong to the template, and nothing marks the end of a user's turn.
    "inst": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    ),
    # Writes an empty reasoning block before a last answer that brings none of its own.
    "reasoning": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "no end of turn": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<s>", "</s>"]
CORPUS = [
    "You are a helpful assistant. The user asks and the assistant answers the question.",
    "user\nassistant\nmodel\nsystem\n\nWhat should I do with my savings? Put them in a fund.",
    "Crème brûlée, naïve façade: 100 % sure!\n\n1. first\n2. second\n",
] * 4

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]


def _byte_level(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """Sentencepiece style: a space becomes part of the next token, unknown characters bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    lines = pre_tokenizers.Split("\n", "isolated")
    words = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(decoder)
    trainer = BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> TokenizerMaker:
    """Build a small fast tokenizer: a template (by name, or None) over a way to split text."""

    def make(template: str | None, split: str = "bytes") -> PreTrainedTokenizerFast:
        backend = _metaspace() if split == "metaspace" else _byte_level(split == "trimmed bytes")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer.add_tokens(SPECIAL, special_tokens=True)
        tokenizer.chat_template = None if template is None else TEMPLATES[template]
        return tokenizer

    return make


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2-135M-Instruct."""
    return load_smollm2_tokenizer()
