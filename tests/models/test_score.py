"""Log-probabilities of responses: Hugging Face's, however rows are batched and prompts shared."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from emlens.data import BatchError, Batching, Positions, TokenizedChat
from emlens.models import score as scoring
from emlens.models import unembed
from emlens.models.score import ResponseScore, score_responses
from emlens.models.tokens_in_flight import select_positions, tokens_in_flight
from emlens.models.views import lay_views
from emlens.numerics import blocks
from tests.models.test_parity import Float64Throughout
from tests.models.tiny import PLAIN, make_ids, make_tiny

PROMPTS = (7, 12, 5)
"""Lengths of three prompts."""
RESPONSES = ((0, 6), (1, 9), (0, 1), (2, 4), (0, 11), (1, 3), (0, 0))
"""Prompt and length of each response; one prompt has a single response, one response is empty."""


def make_chat(prompt: Tensor, response: Tensor, *, tail: int = 2) -> TokenizedChat:
    """A chat of given ids, a few tokens after its response."""
    stop = len(prompt) + len(response)
    return TokenizedChat(
        ids=torch.cat([prompt, response, make_ids(tail, seed=99)]),
        prompt_end=len(prompt),
        response=(len(prompt), stop),
        response_eot=None,
        awaits_response=False,
        turns=(),
        text="",
        ends=(),
    )


def make_chats() -> list[TokenizedChat]:
    prompts = [make_ids(n, seed=n) for n in PROMPTS]
    return [make_chat(prompts[p], make_ids(n, seed=50 + n)) for p, n in RESPONSES]


def expected_log_probs(hf: Any, chat: TokenizedChat) -> Tensor:
    assert chat.response is not None
    start, stop = chat.response
    with torch.no_grad():
        log_probs = hf(chat.ids[None]).logits[0].log_softmax(-1)
    return log_probs[torch.arange(start - 1, stop - 1), chat.ids[start:stop]]


@pytest.mark.parametrize("name", PLAIN)
def test_scores_are_hugging_faces_log_probabilities(name):
    hf: Any = make_tiny(name)
    chats = make_chats()
    for chat, score in zip(chats, score_responses(lay_views(hf, None), chats), strict=True):
        expected = expected_log_probs(hf, chat)
        torch.testing.assert_close(score.log_probs, expected, rtol=1e-5, atol=1e-5)
        assert score.total == pytest.approx(float(expected.double().sum()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_scores_are_hugging_faces_in_float64_beyond_rounding(name):
    with Float64Throughout():
        hf: Any = make_tiny(name, dtype=torch.float64)
        chats = make_chats()
        scores = score_responses(lay_views(hf, None), chats)
        expected = [expected_log_probs(hf, chat) for chat in chats]
    for score, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(score.log_probs, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 16, 40, 10_000])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_batching_and_sharing_change_nothing(name, tokens):
    model = lay_views(make_tiny(name, dtype=torch.float64), None)
    chats = make_chats()
    together = score_responses(model, chats, batching=Batching(tokens=tokens))
    for chat, score in zip(chats, together, strict=True):
        (alone,) = score_responses(model, [chat])
        torch.testing.assert_close(score.log_probs, alone.log_probs, rtol=0, atol=1e-10)


def count_columns(model: Any, chats: list[TokenizedChat], **settings: Any) -> list[tuple[int, int]]:
    """Shapes of everything that is embedded."""
    shapes = []
    handle = model.hook_embed.register_forward_hook(
        lambda _m, _a, out: shapes.append(tuple(out.shape[:2]))
    )
    score_responses(model, chats, **settings)
    handle.remove()
    return shapes


def test_a_shared_prompt_is_run_once():
    model: Any = lay_views(make_tiny("llama"), None)
    prompt = make_ids(20)
    chats = [make_chat(prompt, make_ids(4, seed=seed)) for seed in range(6)]
    # All but the last prompt token once; then, in each row, that one and what it predicts.
    assert count_columns(model, chats) == [(1, 19), (6, 4)]


def test_rows_with_prompts_of_their_own_take_one_pass():
    model: Any = lay_views(make_tiny("llama"), None)
    chats = [make_chat(make_ids(9, seed=s), make_ids(4, seed=s)) for s in range(3)]
    assert count_columns(model, chats) == [(3, 12)]


def test_no_batch_is_larger_than_its_budget():
    model: Any = lay_views(make_tiny("llama"), None)
    prompts = [make_ids(n, seed=n) for n in (8, 13)]
    shared = [make_chat(prompts[s % 2], make_ids(3 + s, seed=s)) for s in range(12)]
    shapes = count_columns(model, shared, batching=Batching(tokens=64))
    assert len(shapes) > 4
    for (_, prompt), (rows, response) in zip(shapes[::2], shapes[1::2], strict=True):
        assert rows * (prompt + response) <= 64 or rows == 1
    alone = [make_chat(make_ids(9, seed=80 + s), make_ids(4)) for s in range(12)]
    assert count_columns(model, alone, batching=Batching(tokens=64)) == [(5, 12), (5, 12), (2, 12)]


def test_long_prompts_and_long_responses_do_not_meet_beyond_the_context():
    model = lay_views(make_tiny("llama"), None)
    long, short = make_ids(50, seed=1), make_ids(3, seed=2)
    chats = [make_chat(long, make_ids(4, seed=s), tail=0) for s in (1, 2)]
    chats += [make_chat(short, make_ids(45, seed=s), tail=0) for s in (1, 2)]
    scores = score_responses(model, chats)
    (alone,) = score_responses(model, chats[3:])
    torch.testing.assert_close(scores[3].log_probs, alone.log_probs, rtol=0, atol=1e-4)


def test_logits_are_made_in_slices(monkeypatch: pytest.MonkeyPatch):
    model = lay_views(make_tiny("llama"), None)
    chats = make_chats()
    whole = score_responses(model, chats)
    sizes = []

    def watch(model: Any, resid: Tensor) -> Tensor:
        logits = unembed.compute_logits(model, resid)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(scoring, "compute_logits", watch)
    monkeypatch.setattr(blocks, "MAX_LOGITS", 1000)
    sliced = score_responses(model, chats)
    assert max(sizes) * 2 <= 1000 < sum(sizes)
    for a, b in zip(whole, sliced, strict=True):
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "prompt", "response", "all[-3:]", "last_prompt"])
def test_hooks_at_named_positions_see_the_same_tokens_where_prompts_are_shared(positions):
    model: Any = lay_views(make_tiny("llama", dtype=torch.float64), None)
    span, _, cut = positions.partition("[")
    chosen = Positions(span, -3) if cut else Positions(span)
    push = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def add(_module: Any, _args: Any, out: Tensor) -> Tensor:
        tokens = tokens_in_flight(model)
        assert tokens is not None
        return out + select_positions(tokens, chosen)[..., None] * push

    chats = make_chats()[:-1]
    plain = score_responses(model, chats)
    handle = model.blocks[1].hook_resid_pre.register_forward_hook(add)
    together = score_responses(model, chats)
    for chat, score, before in zip(chats, together, plain, strict=True):
        (alone,) = score_responses(model, [chat])
        torch.testing.assert_close(score.log_probs, alone.log_probs, rtol=0, atol=1e-10)
        if positions in ("all", "prompt"):
            assert not torch.allclose(score.log_probs, before.log_probs, atol=1e-3)
    handle.remove()


def test_totals_add_up_in_float64_and_an_empty_response_has_no_mean():
    score = ResponseScore(log_probs=torch.tensor([-(2.0**24), -1.0]))
    assert score.total == -(2.0**24) - 1
    assert score.mean == score.total / 2
    empty = ResponseScore(log_probs=torch.zeros(0))
    assert empty.total == 0
    assert math.isnan(empty.mean)


def test_what_cannot_be_scored_is_named():
    model = lay_views(make_tiny("llama"), None)
    prompt = make_ids(3)
    good = make_chat(prompt, make_ids(2))
    unanswered = dataclasses.replace(good, response=None)
    long = make_chat(prompt, make_ids(62))
    with pytest.raises(ValueError, match="row 1 has no response"):
        score_responses(model, [good, unanswered])
    with pytest.raises(ValueError, match="row 0 begins with its response"):
        score_responses(model, [make_chat(prompt[:0], make_ids(2))])
    with pytest.raises(BatchError, match="row 1 has 64 tokens"):
        score_responses(model, [good, long], batching=Batching(max_length=63))
    with pytest.raises(BatchError, match="no rows"):
        score_responses(model, [])


def test_scoring_leaves_nothing_behind():
    model: Any = lay_views(make_tiny("llama"), None)
    score_responses(model, make_chats())
    assert tokens_in_flight(model) is None
    assert not model.hook_embed._forward_hooks
