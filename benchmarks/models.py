"""The models and texts that the benchmarks run on.

Toy size is a tiny random Llama, made in a moment; full size is SmolLM2-135M-Instruct, or on a GPU
random weights in the shapes of a Qwen2.5.
"""

import atexit
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.settings import DTYPES, Settings
from emlens.data import Chat, Message
from emlens.models.checkpoints import dequantise_gguf
from emlens.models.products import multiply
from emlens.sources import locate_source

TOY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LARGE = {
    shape: Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )
    for shape, (vocab, width, mlp, layers, heads, kv_heads, tied) in {
        "0.5b": (151936, 896, 4864, 24, 14, 2, True),
        "7b": (152064, 3584, 18944, 28, 28, 4, False),
        "14b": (152064, 5120, 13824, 48, 40, 8, False),
    }.items()
}
"""The shapes of three Qwen2.5."""


@cache
def checkpoint_folder(size: str) -> Path:
    """The folder that both sides load: SmolLM2 as safetensors, or the toy written to disk."""
    if size == "full":
        return dequantise_gguf(locate_source("emlens:smollm2"))
    folder = tempfile.TemporaryDirectory(prefix="emlens-benchmarks-")
    atexit.register(folder.cleanup)
    random_model(LlamaForCausalLM, TOY).save_pretrained(folder.name)
    _word_tokenizer(TOY.vocab_size).save_pretrained(folder.name)
    return Path(folder.name)


def random_model(kind: Callable[[Any], Any], config: Any) -> PreTrainedModel:
    """Random weights, norms included, the same for the same configuration."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # fresh norms are all ones, and would hide a missing weight
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def _word_tokenizer(d_vocab: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, d_vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def load_hugging_face(dtype: str, settings: Settings) -> PreTrainedModel:
    """A fresh Hugging Face model with fused (sdpa) attention, its weights shared with nobody."""
    if settings.device != "cpu" and settings.full:
        with torch.device(settings.device):
            made = random_model(_in_dtype(Qwen2ForCausalLM, DTYPES[dtype]), LARGE[settings.shape])
        return made.requires_grad_(False)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_folder(settings.size),
        dtype=DTYPES[dtype],
        attn_implementation="sdpa",
        device_map={"": settings.device},
        local_files_only=True,
    )
    return model.eval().requires_grad_(False)


def _in_dtype(kind: type, dtype: torch.dtype) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return kind(config)
        finally:
            torch.set_default_dtype(before)

    return make


def plan_source(settings: Settings) -> str | Path:
    """What `plan_memory` reads the sizes of the model from, at full size."""
    if settings.device == "cpu":
        return "emlens:smollm2"
    config = copy.deepcopy(LARGE[settings.shape])
    config.architectures = ["Qwen2ForCausalLM"]
    folder = tempfile.TemporaryDirectory(prefix="emlens-benchmarks-")
    atexit.register(folder.cleanup)
    config.save_pretrained(folder.name)
    return Path(folder.name)


def load_tokenizer(settings: Settings) -> Any:
    """The checkpoint's tokenizer; the toy's knows the words w3 to w255."""
    return AutoTokenizer.from_pretrained(checkpoint_folder(settings.size), local_files_only=True)


def draw_ids(hf: PreTrainedModel, batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random token ids [batch length], special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    d_vocab: int = hf.config.get_text_config().vocab_size
    return torch.randint(3, d_vocab, (batch, length), generator=generator).to(hf.device)


def make_chats(settings: Settings, n: int, words: int) -> tuple[Chat, ...]:
    """Chats of about ``words`` tokens each, a fifth of them the question."""
    generator = torch.Generator().manual_seed(1)
    cut = max(1, words // 5)
    return tuple(_make_chat(settings, words, cut, generator) for _ in range(n))


def _make_chat(settings: Settings, words: int, cut: int, generator: torch.Generator) -> Chat:
    if settings.full:
        vocabulary = ["the", "market", "house", "price", "of", "river", "green", "slow", "year"]
    else:
        vocabulary = [f"w{i}" for i in range(3, TOY.vocab_size)]
    drawn = torch.randint(len(vocabulary), (words,), generator=generator).tolist()
    text = [vocabulary[i] for i in drawn]
    return Chat((Message("user", " ".join(text[:cut])), Message("assistant", " ".join(text[cut:]))))


def linear_weights(hf: PreTrainedModel) -> list[Tensor]:
    """Every matrix that multiplies activations, the unembedding last, in Hugging Face's layout."""
    return [m.weight.detach() for m in hf.modules() if isinstance(m, nn.Linear)]


def sweep_weights(weights: Sequence[Tensor], rows: int) -> Callable[[], None]:
    """The multiplications of one forward pass over ``rows`` tokens and nothing else: the bound.

    By `products.multiply`, as a forward pass asks for it.
    """
    widths = {weight.shape[1] for weight in weights}
    like = weights[0]
    inputs = {width: torch.randn(rows, width, device=like.device).to(like) for width in widths}

    @torch.inference_mode()
    def sweep() -> None:
        for weight in weights:
            multiply(inputs[weight.shape[1]], weight, loose=weight is weights[-1])

    return sweep


def describe_model(hf: PreTrainedModel) -> dict[str, Any]:
    """Its sizes, by the names of this package."""
    config = hf.config.get_text_config()
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_mlp": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_vocab": config.vocab_size,
        "parameters": sum(p.numel() for p in hf.parameters()),
    }
