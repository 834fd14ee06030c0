"""Continuations scored through a prefix tree: Hugging Face's probabilities, one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emlens.data import Batching
from emlens.models import continuations
from emlens.models.continuations import score_continuations
from emlens.models.views import lay_views
from tests.models.tiny import make_ids, make_tiny

CONTINUATIONS = ((5,), (5, 6), (5, 6, 7), (8, 5), (9,), (5, 8))
NEVER = torch.tensor([5, 6, 7, 8])


def expected(hf: Any, prompt: Tensor, tokens: tuple[int, ...], never: Tensor) -> float:
    whole = torch.cat([prompt, torch.tensor(tokens)])
    with torch.no_grad():
        logs = hf(whole[None]).logits[0].double().log_softmax(-1)
    start = len(prompt) - 1
    total = sum(float(logs[start + i, token]) for i, token in enumerate(tokens))
    return total + float(torch.log1p(-logs[-1, never].exp().sum()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("tokens", [16384, 40, 1])
def test_every_continuation_has_hugging_faces_probability(name: str, tokens: int):
    hf: Any = make_tiny(name)
    prompts = [make_ids(n, seed=n) for n in (7, 12, 5, 7)]
    found = score_continuations(
        lay_views(hf, None),
        prompts,
        CONTINUATIONS,
        never_next=NEVER,
        batching=Batching(tokens=tokens),
    )
    assert found.shape == (4, 6)
    for row, prompt in zip(found, prompts, strict=True):
        values = [expected(hf, prompt, one, NEVER) for one in CONTINUATIONS]
        torch.testing.assert_close(
            row.double(), torch.tensor(values).double(), rtol=1e-4, atol=1e-4
        )


def test_without_forbidden_tokens_plain_probabilities_are_left():
    hf: Any = make_tiny("llama")
    prompt, none = make_ids(6, seed=3), torch.zeros(0, dtype=torch.int64)
    found = score_continuations(lay_views(hf, None), [prompt], CONTINUATIONS, never_next=none)
    values = [expected(hf, prompt, one, none) for one in CONTINUATIONS]
    torch.testing.assert_close(found[0], torch.tensor(values).double(), rtol=1e-4, atol=1e-4)


def test_continuations_and_what_may_follow_make_a_distribution():
    # Every single token, and no token after it that is one of all: nothing is left.
    hf: Any = make_tiny("llama")
    vocabulary = range(hf.config.vocab_size)
    found = score_continuations(
        lay_views(hf, None),
        [make_ids(4, seed=1)],
        [(token,) for token in vocabulary],
        never_next=torch.zeros(0, dtype=torch.int64),
    )
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-5)


def count_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every pass from now on."""
    run: list[int] = []
    plain = continuations.run_cached

    def counting(model: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run.append(ids.numel())
        return plain(model, ids, *args, **kwargs)

    monkeypatch.setattr(continuations, "run_cached", counting)
    return run


def test_shared_prefixes_are_run_once(monkeypatch: pytest.MonkeyPatch):
    run = count_tokens(monkeypatch)
    score_continuations(
        lay_views(make_tiny("llama"), None), [make_ids(9)], CONTINUATIONS, never_next=NEVER
    )
    # The prompt, three first tokens, three pairs, one triple.
    assert run == [9, 3, 6, 3]


@pytest.mark.parametrize(
    ("tokens", "positions", "expected"),
    [
        # On a processor two first tokens fit beside nine of the prompt, and one pair.
        (20, None, [9, 2, 1, 2, 2, 2, 3]),
        (20, 1000, [9, 3, 6, 3]),
        # No less than on a processor, whatever memory there is; no more than eight times as much.
        (20, 1, [9, 2, 1, 2, 2, 2, 3]),
        (2, 1000, [9, 1, 1, 1, 2, 2, 2, 3]),
        # A cache of 25 positions holds two first tokens' rows, and two pairs'.
        (20, 25, [9, 2, 1, 4, 2, 3]),
        # It would hold three pairs' rows, six tokens; five may be run at once.
        (5, 1000, [9, 3, 4, 2, 3]),
    ],
)
def test_a_gpu_runs_as_many_prefixes_as_its_memory_holds(
    tokens: int, positions: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
):
    run = count_tokens(monkeypatch)
    model: Any = lay_views(make_tiny("llama"), None)
    cfg = model.cfg
    # Keys and values of every layer, in float32, and ten times that.
    bytes_of_one = 2 * cfg.n_layers * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head * 4
    memory = None if positions is None else 10 * positions * bytes_of_one
    monkeypatch.setattr(continuations, "_device_memory", lambda _: memory)
    given: dict[str, Any] = {"never_next": NEVER, "batching": Batching(tokens=tokens)}
    found = score_continuations(model, [make_ids(9)], CONTINUATIONS, **given)
    assert run == expected
    plain = score_continuations(model, [make_ids(9)], CONTINUATIONS, never_next=NEVER)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_scored_is_refused():
    model: Any = lay_views(make_tiny("llama"), None)
    prompt = make_ids(5)
    for prompts, given, message in (
        ([], [(1,)], "prompts: got none"),
        ([prompt], [], "continuations: got none"),
        ([prompt], [(1,), ()], "an empty one"),
        ([prompt], [(1,), (1,)], "comes twice"),
        ([prompt[:0]], [(1,)], r"prompts\[0\]: 0 tokens, expected 1 to 63"),
        ([make_ids(63)], [(1, 2)], r"prompts\[0\]: 63 tokens, expected 1 to 62"),
    ):
        with pytest.raises(ValueError, match=message):
            score_continuations(model, prompts, given, never_next=NEVER)
