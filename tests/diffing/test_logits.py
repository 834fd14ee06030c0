"""Slices of predictions against numpy and scipy, and how often a device is asked about them."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emlens.diffing.logits import LogitDifferences, PredictionRows
from emlens.diffing.results import ExampleComparison, LogitDiff

D_VOCAB = 61
N_CHATS = 3


class Counted(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor, PredictionRows]:
    """Predictions of two models for n tokens of three chats, of which the first two are shown."""
    generator = np.random.default_rng(seed)
    log_p, log_q = (
        torch.from_numpy(log_softmax(generator.normal(size=(n, D_VOCAB)), axis=1)).float()
        for _ in range(2)
    )
    chat = torch.arange(n) % N_CHATS
    rows = PredictionRows(
        chat=chat,
        token=torch.arange(n) // N_CHATS + 1,
        counted=torch.arange(n) % 4 != 0,
        shown=chat < 2,
    )
    return log_p, log_q, rows


def example(differences: LogitDifferences, chat: int, n_tokens: int) -> ExampleComparison:
    return differences.example(
        chat, name="c", pieces=["w"] * n_tokens, counted=[True] * n_tokens, decode=str
    )


def finish(differences: LogitDifferences) -> LogitDiff:
    names = [(str(chat), "") for chat in range(N_CHATS)]
    return differences.result(positions="all", names=names, examples=(), decode=str)


@pytest.mark.parametrize("n", [1, 12, 20])
def test_shown_tokens_are_those_of_numpy_row_by_row(n: int):
    log_p, log_q, rows = draw(n)
    differences = LogitDifferences(D_VOCAB, N_CHATS)
    differences.update(log_p, log_q, rows)
    p, q = log_p.double().exp().numpy(), log_q.double().exp().numpy()
    checked = 0
    for chat in range(N_CHATS):
        found = example(differences, chat, n // N_CHATS + 2)
        for row in range(n):
            if rows.chat[row] != chat:
                continue
            token = int(rows.token[row])
            if chat == 2:
                assert found.base_top[token] == ()
                continue
            checked += 1
            assert found.kl[token] == pytest.approx(entropy(p[row], q[row]), rel=1e-4)
            assert found.kl_back[token] == pytest.approx(entropy(q[row], p[row]), rel=1e-4)
            change = entropy(q[row]) - entropy(p[row])
            assert found.entropy_change[token] == pytest.approx(change, abs=1e-5)
            for top, chances in ((found.base_top, p[row]), (found.tuned_top, q[row])):
                likeliest = np.argsort(-chances)[:5]
                assert [name for name, _ in top[token]] == [str(i) for i in likeliest]
                np.testing.assert_allclose([c for _, c in top[token]], chances[likeliest], 1e-5)
    assert checked == int(rows.shown.sum())


def test_the_device_is_asked_once_a_model_whatever_is_shown():
    log_p, log_q, rows = draw(30)
    differences = LogitDifferences(D_VOCAB, N_CHATS)
    with Counted() as counted:
        differences.update(log_p, log_q, rows)
    assert counted.calls["aten.topk.default"] == 2
    waits = counted.calls["aten._local_scalar_dense.default"]
    assert waits <= 4  # none of them for a row
    assert set(differences._shown) == {0, 1}


def test_the_vocabulary_comes_to_the_host_when_all_is_seen(monkeypatch: pytest.MonkeyPatch):
    differences = LogitDifferences(D_VOCAB, N_CHATS)
    moved: list[tuple[int, ...]] = []
    plain = Tensor.cpu

    def watch(x: Tensor) -> Tensor:
        moved.append(tuple(x.shape))
        return plain(x)

    monkeypatch.setattr(Tensor, "cpu", watch)
    drawn = [draw(n, seed=n) for n in (8, 12)]
    for log_p, log_q, rows in drawn:
        differences.update(log_p, log_q, rows)
    assert moved
    assert all(D_VOCAB not in shape for shape in moved)
    found = finish(differences)
    counted = [(p[rows.counted], q[rows.counted]) for p, q, rows in drawn]
    gap = sum((q.double().exp() - p.double().exp()).sum(0) for p, q in counted)
    assert isinstance(gap, Tensor)
    n = sum(len(p) for p, _ in counted)
    assert found.n_tokens == n
    assert [t.token_id for t in found.risen_tokens] == gap.topk(20).indices.tolist()
    assert [t.token_id for t in found.fallen_tokens] == gap.topk(20, largest=False).indices.tolist()
    changes = [token.change for token in found.risen_tokens]
    np.testing.assert_allclose(changes, gap.topk(20).values / n, rtol=1e-5)
