"""Comparisons over large vocabularies need the memory of one slice, however many the tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATUS = Path("/proc/self/status")
MEMORY = """
import json, sys, torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from emlens.data import Chat, Message
from emlens.diffing import compare_logits, compare_nulls
from emlens.models.lora import LoraAdapter, LoraModule
from emlens.models.pair import load_pair
from emlens.models.views import lay_views
from tests.models.tiny import make_tokenizer

d_vocab = int(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=d_vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1)
base = lay_views(LlamaForCausalLM(config).requires_grad_(False), make_tokenizer())
module = LoraModule(A=torch.randn(1, 8), B=torch.randn(8, 1), scale=1.0)
pair = load_pair(base, LoraAdapter(modules={"model.layers.0.mlp.down_proj": module}, name="a"))
row = (1 << 26) // (4 * d_vocab) // 4  # tokens of a chat: four chats fill one slice

def compare(n):
    answer = Message("assistant", " ".join(["w6"] * row))
    chats = [Chat((Message("user", "w5"), answer))] * n
    found = compare_logits(pair, chats, examples=0)
    assert found.n_tokens == n * row
    yield "compare_logits"
    compare_nulls(pair, chats, n=1, seed=0, sites="resid_post.0")
    yield "compare_nulls"

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

for _ in compare(8):  # of two slices, of which the first lives until the second is made
    before = peak()
growth = {}
for name in compare(32):
    growth[name] = peak() - before
    before = peak()
print(json.dumps(growth))
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason=f"peak memory is read from {STATUS}")
@pytest.mark.parametrize("d_vocab", [49_152, 152_064])
def test_peak_memory_of_predictions_does_not_grow_with_tokens(d_vocab):
    command = [sys.executable, "-c", MEMORY, str(d_vocab)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout)
    assert set(growth) == {"compare_logits", "compare_nulls"}
    # MiB. A slice's logits are 64 for each of two models, those of six further slices 768 in all.
    assert max(growth.values()) < 256, growth
