"""What runs on a GPU gives what the CPU gives; left out unless asked for with ``-m gpu``."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from emlens.activations import stream_activations
from emlens.data import Batching, tokenize_chat
from emlens.diffing import compare_models
from emlens.interventions import Ablate, Intervention, fold_into_weights, intervene
from emlens.models import load_adapter, load_pair
from emlens.models.continuations import score_continuations
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.score import score_responses
from emlens.models.views import lay_views
from tests.activations.chats import make_chats
from tests.interventions.vectors import draw
from tests.models.adapters import make_peft
from tests.models.prompts import pad_prompts, stack
from tests.models.tiny import PLAIN, make_ids, make_tiny, make_tokenizer

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def on_both(name: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same weights on the CPU and on the GPU."""
    tiny: Any = [make_tiny(name, dtype=dtype) for _ in range(2)]
    here, there = tiny[0], tiny[1].to(DEVICE)
    return lay_views(here, make_tokenizer()), lay_views(there, make_tokenizer())


def assert_close(got: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    assert (got.cpu() - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("name", PLAIN)
def test_logits_are_those_of_hugging_face(name: str):
    hf: Any = make_tiny(name).to(DEVICE)  # pyright: ignore[reportArgumentType]
    ids = make_ids(2, 20).to(DEVICE)
    with torch.no_grad():
        expected = hf(ids, use_cache=False).logits
        assert_close(lay_views(hf, None)(ids), expected.cpu())


@pytest.mark.parametrize("name", PLAIN)
def test_a_hooked_pattern_changes_the_path_and_not_the_logits(name: str):
    _, model = on_both(name)
    ids, seen = make_ids(2, 20).to(DEVICE), []
    fused = model(ids)
    hooks = [("blocks.1.attn.hook_pattern", lambda pattern, hook: seen.append(pattern))]
    assert_close(model.run_with_hooks(ids, fwd_hooks=hooks), fused.cpu())
    assert seen[0].sum(-1).allclose(torch.ones((), device=DEVICE))


@pytest.mark.parametrize("name", PLAIN)
def test_greedy_tokens_of_padded_prompts_are_those_of_the_cpu(name: str):
    here, there = on_both(name)
    ids, mask = pad_prompts()
    settings = Sampling(1, temperature=0, max_new_tokens=12)
    expected = generate_tokens(here, ids, mask, sampling=settings)
    found = generate_tokens(there, ids, mask, sampling=settings)
    assert torch.equal(stack(found), stack(expected))


def test_sampled_tokens_do_not_depend_on_the_device():
    here, there = on_both()
    ids, keys = make_ids(6, 5), torch.arange(6)
    settings = Sampling(1, max_new_tokens=12)
    runs = [
        generate_tokens(model, ids, torch.ones_like(ids), sampling=settings, keys=keys)
        for model in (here, there)
    ]
    assert torch.equal(*(stack(run) for run in runs))


def test_statistics_are_those_of_the_cpu():
    given: dict[str, Any] = {"sites": "resid_post", "positions": ["response", "all"]}
    given |= {"statistics": ("mean", "covariance", "norm"), "batching": Batching(tokens=40)}
    expected, found = (stream_activations(m, make_chats(), **given) for m in on_both())
    for name in ("mean", "variance", "covariance", "norm_quantiles"):
        value = getattr(expected, name)
        if value is not None:
            assert_close(getattr(found, name), value)
    assert torch.equal(found.n_tokens, expected.n_tokens)


@pytest.mark.parametrize("form", ["attached", "merged"])
def test_a_comparison_is_that_of_the_cpu(form: Any):
    found = []
    for device in ("cpu", DEVICE):
        adapter = load_adapter(make_peft("llama", r=2))
        base = lay_views(make_tiny("llama").to(device), make_tokenizer())  # pyright: ignore[reportArgumentType]
        found.append(compare_models(load_pair(base, adapter, form=form), make_chats(), examples=2))
    expected, got = found
    assert expected.logits.kl_base_tuned > 1e-4
    assert got.logits.kl_base_tuned == pytest.approx(expected.logits.kl_base_tuned, rel=1e-3)
    assert_close(got.activations.mean_tuned, expected.activations.mean_tuned)
    assert_close(got.activations.relative_rms, expected.activations.relative_rms, 1e-3)


def test_hooked_and_folded_ablations_agree_and_are_those_of_the_cpu():
    ids, chosen = make_ids(2, 9), [Intervention("writes", Ablate(draw(24)))]
    here, there = on_both()
    with intervene(here, chosen):
        expected = here(ids)
    with intervene(there, chosen):
        assert_close(there(ids.to(DEVICE)), expected)
    assert_close(fold_into_weights(there, chosen)(ids.to(DEVICE)), expected)
    assert not torch.allclose(here(ids), expected)


def test_scores_of_responses_and_numbers_are_those_of_the_cpu():
    here, there = on_both()
    chats = [tokenize_chat(chat, here.tokenizer) for chat in make_chats()]
    pairs = zip(score_responses(here, chats), score_responses(there, chats), strict=True)
    for expected, found in pairs:
        assert_close(found.log_probs, expected.log_probs)
    numbers = [(3 + n // 10, 3 + n % 10) for n in range(30)]
    never = torch.tensor([5])
    expected, found = (
        score_continuations(m, [make_ids(7)], numbers, never_next=never) for m in (here, there)
    )
    assert_close(found, expected)


def test_padded_grouped_attention_in_half_precision_never_holds_all_scores():
    batch, n_heads, length = 4, 16, 1024
    config: Any = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=n_heads,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(config)
    hf = made.to(DEVICE, torch.bfloat16).eval().requires_grad_(False)
    model: Any = lay_views(hf, None)
    ids, mask = make_ids(batch, length).to(DEVICE), torch.ones(batch, length, dtype=torch.long)
    mask[1, :300] = 0
    mask = mask.to(DEVICE)
    with torch.no_grad():
        fused = model(ids, attention_mask=mask)[mask.bool()]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids, attention_mask=mask)
        grown = torch.cuda.max_memory_allocated() - before
        hooks = [("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern)]
        eager = model.run_with_hooks(ids, attention_mask=mask, fwd_hooks=hooks)[mask.bool()]
    # Half of one layer's scores in bfloat16: a bias for all heads and repeated keys are a tenth.
    assert grown < batch * n_heads * length**2 * 2 / 2
    assert_close(fused.float(), eager.float().cpu(), 3e-2)
