"""Attention asked for in the form of another device gives the same numbers on this one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emlens.models import attention_kernels, components
from emlens.models.attention_kernels import attend, repeats_heads
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.rotary import AttentionMask
from emlens.models.views import lay_views
from tests.models.prompts import pad_prompts, stack
from tests.models.tiny import make_ids, make_tiny

HALF = torch.bfloat16
LOWEST = torch.finfo(torch.float32).min


def draw(n_queries: int, n_keys: int = 7, n_kv: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of six heads, keys and values of fewer."""
    generator = torch.Generator().manual_seed(n_queries)
    shapes = (2, 6, n_queries, 8), (2, n_kv, n_keys, 8), (2, n_kv, n_keys, 8)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def masks(n_queries: int, n_keys: int = 7) -> dict[str, AttentionMask]:
    """Everything seen, what the kernel masks itself, and a row of padding as a bias."""
    causal = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)[None, None]
    padded = causal & (torch.arange(n_keys) >= torch.tensor([0, 3])[:, None, None, None])
    bias = torch.zeros(padded.shape).masked_fill_(~padded, LOWEST)
    found = {"none": AttentionMask(None, None), "padded": AttentionMask(padded, bias)}
    return found if n_queries < n_keys else found | {"causal": AttentionMask(causal, None)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_padding_mask_that_hides_nothing_costs_no_bias(name: str, monkeypatch):
    hf: Any = make_tiny(name)
    model: Any = lay_views(hf, None)
    ids = make_ids(2, 20)
    seen: list[AttentionMask] = []

    def attend_and_note(*args: Any, mask: AttentionMask, **given: Any) -> Tensor:
        seen.append(mask)
        return attend(*args, mask=mask, **given)

    monkeypatch.setattr(components, "attend", attend_and_note)
    plain, _ = model(ids), seen.clear()
    mask = torch.ones_like(ids)
    assert torch.equal(model(ids, attention_mask=mask), plain)
    assert any(one.is_causal for one in seen)
    assert all(one.bias is None or one.bias.shape[0] == 1 for one in seen)
    seen.clear()
    mask[0, :3] = 0  # in place: the same object hides something now
    assert not torch.equal(model(ids, attention_mask=mask), plain)
    assert not any(one.is_causal for one in seen)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of torch's attention was given, and whether cuDNN was open to it."""
    calls: list[dict[str, Any]] = []
    plain = F.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        calls.append(settings | {"heads": (q.shape[1], k.shape[1], v.shape[1]), "cudnn": cudnn})
        return plain(q, k, v, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    return calls


def test_heads_are_repeated_only_where_no_kernel_takes_groups():
    def ask(kind: str, dtype: torch.dtype, *, grouped: bool = True, masked: bool = True) -> bool:
        return repeats_heads(kind, dtype, grouped=grouped, masked=masked)

    assert ask("cuda", HALF)
    assert ask("cuda", torch.float32, masked=False)
    assert not ask("cuda", HALF, masked=False)
    assert not ask("cuda", HALF, grouped=False)
    assert not ask("cuda", torch.float64)
    assert not any(ask(kind, HALF) for kind in ("cpu", "mps"))


@pytest.mark.parametrize("n_queries", [7, 3, 1])
def test_every_form_is_softmax_attention(n_queries: int):
    q, k, v = draw(n_queries)
    for name, mask in masks(n_queries).items():
        allowed = torch.ones((), dtype=torch.bool) if mask.allowed is None else mask.allowed
        keys, values = (x.repeat_interleave(3, dim=1) for x in (k, v))
        scores = torch.where(allowed, 0.3 * q @ keys.mT, -torch.inf)
        real = allowed.expand(scores.shape).any(-1)  # a padding query attends to nothing
        expected = scores.softmax(-1) @ values
        found = [attend(q, k, v=v, mask=mask, scale=0.3, kind=kind) for kind in ("cpu", "cuda")]
        for z in found:
            assert (z - expected)[real].abs().max() <= 2e-6, name
        assert (found[0] - found[1])[real].abs().max() <= 1e-6, name


def test_cuda_is_asked_for_repeated_heads_without_cudnn_and_a_processor_for_groups(
    asked: list[dict[str, Any]],
):
    q, k, v = draw(7)
    for kind in ("cpu", "cuda"):
        attend(q, k, v=v, mask=masks(7)["padded"], scale=0.3, kind=kind)
    here, there = asked
    assert here["heads"] == (6, 2, 2)
    assert here["enable_gqa"]
    assert here["cudnn"]
    assert there["heads"] == (6, 6, 6)
    assert not there["enable_gqa"]
    assert not there["cudnn"]
    q, k, v = draw(1)
    attend(q, k, v=v, mask=masks(1)["padded"], scale=0.3, kind="cuda")
    assert asked[-1]["heads"] == (2, 2, 2)  # three queries each, no key twice


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_is_left_as_it_was_whatever_happens(before: bool, monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []

    def fail(*_args: Any, **_settings: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise KeyboardInterrupt

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    q, k, v = draw(7)
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(KeyboardInterrupt):
            attend(q, k, v=v, mask=masks(7)["causal"], scale=0.3, kind="cuda")
        assert seen == [False]
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_model_computes_the_same_with_repeated_heads(name: str, monkeypatch: pytest.MonkeyPatch):
    model = lay_views(make_tiny(name), None)
    ids, mask = pad_prompts()
    sampling = Sampling(1, temperature=0, max_new_tokens=5)

    def run() -> tuple[Tensor, Tensor]:
        logits = model(ids, attention_mask=mask)[mask.bool()]
        return logits, stack(generate_tokens(model, ids, mask, sampling=sampling))

    logits, tokens = run()
    decided: list[bool] = []
    monkeypatch.setattr(
        components, "attend", lambda *args, kind, **given: attend(*args, kind="cuda", **given)
    )

    monkeypatch.setattr(
        attention_kernels,
        "repeats_heads",
        lambda *args, **given: decided.append(repeats_heads(*args, **given)) or decided[-1],
    )
    repeated, again = run()
    assert any(decided)
    assert (repeated - logits).abs().max() <= 1e-6 * logits.abs().max()
    assert torch.equal(again, tokens)
