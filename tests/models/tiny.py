"""Tiny random Hugging Face models, every parameter perturbed: fresh norms hide errors."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

D_VOCAB = 97

_GATED: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE: dict[str, Any] = _GATED | {"head_dim": 10}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_SANDWICH: dict[str, Any] = _WIDE | {
    "sliding_window": 5,
    "layer_types": _SLIDING,
    "query_pre_attn_scalar": 12,
}
_GPT2: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_WHOLE_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
_NEOX: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rope_parameters": _WHOLE_ROTARY | {"partial_rotary_factor": 0.5},
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_NEOX_SEQUENTIAL: dict[str, Any] = _NEOX | {
    "rope_parameters": _WHOLE_ROTARY,
    "use_parallel_residual": False,
    "attention_bias": False,
    "tie_word_embeddings": True,
}

TINY: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_GATED)),
    "llama-tied-biased": (
        LlamaForCausalLM,
        LlamaConfig(**_WIDE, attention_bias=True, tie_word_embeddings=True),
    ),
    "llama-rope3": (LlamaForCausalLM, LlamaConfig(**_WIDE, rope_parameters=_LLAMA3)),
    "llama-dynamic": (
        LlamaForCausalLM,
        LlamaConfig(
            **_WIDE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
    ),
    "llama-linear": (
        LlamaForCausalLM,
        LlamaConfig(
            **_WIDE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        ),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_GATED)),
    "qwen2-yarn-tied": (
        Qwen2ForCausalLM,
        Qwen2Config(**_GATED, rope_parameters=_YARN, tie_word_embeddings=True),
    ),
    "qwen2-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config(**_GATED, use_sliding_window=True, sliding_window=5, layer_types=_SLIDING),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_WIDE, attention_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**_WIDE, sliding_window=5)),
    "mistral-full": (MistralForCausalLM, MistralConfig(**_WIDE, sliding_window=None)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**_SANDWICH)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**_SANDWICH)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**_NEOX)),
    "neox-sequential": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**_NEOX_SEQUENTIAL),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**_GPT2)),
    "gpt2-scaled": (
        GPT2LMHeadModel,
        GPT2Config(
            **_GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=56, tie_word_embeddings=False
        ),
    ),
}
"""Name -> (class, config): grouped heads, odd head widths, ties, biases, windows, rope scaling."""

PLAIN = (
    *("llama", "llama-tied-biased", "qwen2", "qwen3", "mistral"),
    *("gemma2", "gemma3", "gpt2", "neox"),
)
"""One or two of each architecture, where the variants make no difference."""


def make_tiny(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model in evaluation mode with eager attention."""
    kind, config = TINY[name]
    torch.manual_seed(seed)
    config = type(config)(**(config.to_dict() | {"attn_implementation": "eager"}))
    model = kind(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.2 if parameter.ndim == 1 else 0.15) * noise
            parameter.requires_grad_(False)
    return model.to(dtype).eval()


def make_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, shape, generator=generator)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the tiny vocabulary: ``w5 w6`` is [5, 6]; chats are framed."""
    words = {"<pad>": 0, "<user>": 1, "<end>": 2} | {f"w{i}": i for i in range(3, D_VOCAB)}
    core = Tokenizer(WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<user>", eos_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' + m['content'] + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<user> ' }}{% endif %}"
    )
    return tokenizer
