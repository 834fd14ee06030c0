"""Streaming differences of next-token predictions: divergences, entropies, changed tokens.

Log-probabilities in, ``LogitDiff`` out; the shell that meets the models is ``compare``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens.diffing.results import ExampleComparison, LogitDiff, PromptDivergence, TokenChange
from emlens.numerics.predictions import PredictionPair, compare_predictions

N_CHANGED = 20
"""Risen and fallen tokens listed."""
N_TOP = 5
"""Likeliest next tokens shown for each position of an example."""


@dataclass(frozen=True, kw_only=True)
class PredictionRows:
    """Where a slice of predictions belongs: one entry a row."""

    chat: Int[Tensor, " n"]
    """Index of the chat."""
    token: Int[Tensor, " n"]
    """Index in the chat of the token predicted."""
    counted: Bool[Tensor, " n"]
    """Whether it lies in the positions compared."""
    shown: Bool[Tensor, " n"]
    """Whether its chat is an example."""


class LogitDifferences:
    """Accumulates the comparison of two models' predictions.

    Args:
        d_vocab: size of the vocabulary.
        n_chats: chats in the whole run.
    """

    def __init__(self, d_vocab: int, n_chats: int):
        self._mass = torch.zeros(2, d_vocab, dtype=torch.float64)
        self._sums = torch.zeros(n_chats, 6, dtype=torch.float64)
        self._shown: dict[int, dict[int, tuple]] = {}

    def update(
        self,
        log_p: Float[Tensor, "n d_vocab"],
        log_q: Float[Tensor, "n d_vocab"],
        rows: PredictionRows,
    ) -> None:
        """Take in a slice of base (p) and tuned (q) log-probabilities."""
        counted = rows.counted.to(log_p.device)
        everything = bool(counted.all())
        pair = compare_predictions(log_p, log_q)
        part = pair if everything else compare_predictions(log_p[counted], log_q[counted])
        self._mass = self._mass.to(log_p.device)  # with the first slice; it stays there
        self._mass[0] += part.mass_p
        self._mass[1] += part.mass_q
        columns = (part.kl, part.kl_back, part.entropy_p, part.entropy_q, part.same_top)
        values = torch.stack([torch.ones_like(part.kl), *(c.to(part.kl) for c in columns)], dim=1)
        self._sums.index_add_(0, rows.chat[rows.counted], values.double().cpu())
        if bool(rows.shown.any()):
            self._keep_shown(log_p, log_q, pair, rows)

    def _keep_shown(
        self, log_p: Tensor, log_q: Tensor, pair: PredictionPair, rows: PredictionRows
    ) -> None:
        places = rows.shown.nonzero()[:, 0]
        there = places.to(log_p.device)
        changes = pair.entropy_q - pair.entropy_p
        columns = (x[there].tolist() for x in (pair.kl, pair.kl_back, changes))
        tops = (_tops(log[there]) for log in (log_p, log_q))
        cells = zip(*columns, *tops, strict=True)
        chats, tokens = rows.chat[places].tolist(), rows.token[places].tolist()
        for chat, token, cell in zip(chats, tokens, cells, strict=True):
            self._shown.setdefault(chat, {})[token] = cell

    def example(
        self,
        chat: int,
        *,
        name: str,
        pieces: Sequence[str],
        counted: Sequence[bool],
        decode: Callable[[int], str],
    ) -> ExampleComparison:
        """Return one shown chat token by token; the first token has no prediction."""
        nothing = (0.0, 0.0, 0.0, (), ())
        cells = [self._shown.get(chat, {}).get(i, nothing) for i in range(len(pieces))]

        def decoded(top: tuple) -> tuple[tuple[str, float], ...]:
            return tuple((decode(token), chance) for token, chance in top)

        return ExampleComparison(
            chat=name,
            tokens=tuple(pieces),
            counted=tuple(bool(c) for c in counted),
            kl=tuple(cell[0] for cell in cells),
            kl_back=tuple(cell[1] for cell in cells),
            entropy_change=tuple(cell[2] for cell in cells),
            base_top=tuple(decoded(cell[3]) for cell in cells),
            tuned_top=tuple(decoded(cell[4]) for cell in cells),
        )

    def result(
        self,
        *,
        positions: str,
        names: Sequence[tuple[str, str]],
        examples: Sequence[ExampleComparison],
        decode: Callable[[int], str],
    ) -> LogitDiff:
        """Return the comparison of everything taken in.

        Args:
            positions: label of the positions compared.
            names: (name, beginning of the text) of every chat.
            examples: what ``example`` gave.
            decode: token id -> its text.
        """
        total = self._sums.sum(0)
        n = total[0].item()
        if n == 0:
            raise ValueError(f"positions: {positions} holds no token that a model predicts")
        means = (total[1:] / n).tolist()
        return LogitDiff(
            positions=positions,
            n_tokens=int(n),
            kl_base_tuned=means[0],
            kl_tuned_base=means[1],
            entropy_base=means[2],
            entropy_tuned=means[3],
            agreement=means[4],
            prompts=self._prompts(names),
            risen_tokens=self._changes(n, decode, risen=True),
            fallen_tokens=self._changes(n, decode, risen=False),
            examples=tuple(examples),
        )

    def _prompts(self, names: Sequence[tuple[str, str]]) -> tuple[PromptDivergence, ...]:
        rows = [
            PromptDivergence(
                chat=name,
                text=text,
                n_tokens=int(sums[0]),
                kl_base_tuned=float(sums[1] / sums[0]),
                kl_tuned_base=float(sums[2] / sums[0]),
            )
            for (name, text), sums in zip(names, self._sums, strict=True)
            if sums[0]
        ]
        return tuple(sorted(rows, key=lambda row: -row.kl_base_tuned))

    def _changes(
        self, n: float, decode: Callable[[int], str], *, risen: bool
    ) -> tuple[TokenChange, ...]:
        mass = self._mass.cpu()
        change = (mass[1] - mass[0]) / n
        ids = change.topk(min(N_CHANGED, len(change)), largest=risen).indices.tolist()
        return tuple(
            TokenChange(
                token_id=i,
                token=decode(i),
                base=float(mass[0, i] / n),
                tuned=float(mass[1, i] / n),
            )
            for i in ids
            if (change[i] > 0) == risen and change[i] != 0
        )


def _tops(log_p: Tensor) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of each row and their chances, one question a slice to the device."""
    values, ids = log_p.topk(min(N_TOP, log_p.shape[-1]))
    pairs = zip(ids.tolist(), values.exp().tolist(), strict=True)
    return [tuple(zip(*row, strict=True)) for row in pairs]
