"""Comparisons over large vocabularies need the memory of one slice, however many the tokens."""

import ctypes
import gc
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from emlens.data import Chat, Message
from emlens.diffing import compare_logits, compare_nulls
from emlens.models.lora import LoraAdapter, LoraModule
from emlens.models.pair import ModelPair, load_pair
from emlens.models.views import lay_views
from emlens.numerics import blocks
from tests.forks import run_copy
from tests.models.tiny import make_tokenizer

STATUS = Path("/proc/self/status")
SLICE = 1 << 23
"""Values of a slice here: an eighth of the package's, so that eight of them take a second."""
MIB = 1 << 20
M_MMAP_THRESHOLD = -3
"""glibc's name for the size from which freed memory goes back to the system at once."""


def make_pair(d_vocab: int) -> ModelPair:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model: Any = LlamaForCausalLM(config).requires_grad_(False)
    module = LoraModule(A=torch.randn(1, 8), B=torch.randn(8, 1), scale=1.0)
    adapter = LoraAdapter(modules={"model.layers.0.mlp.down_proj": module}, name="a")
    return load_pair(lay_views(model, make_tokenizer()), adapter)


def compare(pair: ModelPair, n: int) -> Iterator[str]:
    """Compare on so many chats, of which four fill one slice."""
    row = SLICE // (4 * pair.base.cfg.d_vocab) // 4
    answer = Message("assistant", " ".join(["w6"] * row))
    chats = [Chat((Message("user", "w5"), answer))] * n
    found = compare_logits(pair, chats, examples=0)
    assert found.n_tokens == n * row
    yield "compare_logits"
    compare_nulls(pair, chats, n=1, seed=0, sites="resid_post.0")
    yield "compare_nulls"


def read_peak() -> float:
    """Peak resident MiB of this process."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def give_back() -> None:
    """Leave no freed memory that a copy of this process could use again unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure_growth(d_vocab: int, told: Path) -> None:
    """Write down by how many MiB the peak grows where there are four times the chats."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    blocks.MAX_LOGITS = SLICE
    pair = make_pair(d_vocab)
    for _ in compare(pair, 8):  # of two slices
        pass
    growth, before = {}, read_peak()
    for name in compare(pair, 32):
        growth[name], before = read_peak() - before, read_peak()
    told.write_text(json.dumps(growth))


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason=f"peak memory is read from {STATUS}")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep what is freed")
@pytest.mark.parametrize("d_vocab", [49_152, 152_064])
def test_peak_memory_of_predictions_does_not_grow_with_tokens(d_vocab: int, tmp_path: Path):
    assert blocks.MAX_LOGITS == 1 << 26
    told = tmp_path / "growth"
    give_back()
    assert run_copy(lambda: measure_growth(d_vocab, told)) == 0
    growth = json.loads(told.read_text())
    assert set(growth) == {"compare_logits", "compare_nulls"}
    # MiB. A slice's logits are 8 for each of two models, those of six further slices 96 in all.
    assert max(growth.values()) < 32, growth
