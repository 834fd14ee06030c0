"""Token views: a chat's text coloured by divergence, with what each model expected in each place.

For chats whose divergence was kept token by token; means over many chats are in the tables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emlens.reports.sections import Json
from emlens.reports.visible import read_number, show_change, show_number, show_running, show_token

N_LEVELS = 10
"""Shades of the colour scale."""
N_LIKELIEST = 5
"""Likeliest tokens shown of each model."""
_CAP_QUANTILE = 0.98
"""Share of the counted tokens that the colour scale spans: one outlier must not bleach the rest."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token in running text."""

    text: str
    level: int | None
    """Shade from 0 to N_LEVELS; None for a token that was not counted."""


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One chat, ready to be laid out."""

    chat: str
    mean_kl: float | None
    """Over the counted tokens, nats."""
    pieces: tuple[Piece, ...]
    details: list[Any]
    """For each token: token, KL, KL back, entropy change, base's and tuned's likeliest tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenViews:
    """All example chats on one colour scale."""

    cap: float
    """Nats at which the scale ends."""
    views: tuple[TokenView, ...]


def view_tokens(logits: Json) -> TokenViews:
    """Token views of a LogitDiff's JSON: its examples on a scale that they share."""
    examples = logits["examples"]
    counted = [kl for example in examples for kl in _counted_kl(example)]
    cap = find_cap(counted)
    return TokenViews(cap=cap, views=tuple(_view(example, cap) for example in examples))


def find_cap(values: Sequence[float]) -> float:
    """End of the colour scale: a high quantile of the values, rounded up to two digits."""
    finite = sorted(value for value in values if math.isfinite(value) and value > 0)
    if not finite:
        return 1.0
    value = finite[min(int(len(finite) * _CAP_QUANTILE), len(finite) - 1)]
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


def find_level(value: float, cap: float) -> int:
    """Shade of a divergence: 0 for none, N_LEVELS from the cap on and for what is not finite."""
    if not math.isfinite(value):
        return N_LEVELS
    return min(max(math.ceil(N_LEVELS * value / cap - 1e-9), 0), N_LEVELS)


def _counted_kl(example: Json) -> list[float]:
    pairs = zip(example["kl"], example["counted"], strict=True)
    return [read_number(kl) for kl, counted in pairs if counted]


def _view(example: Json, cap: float) -> TokenView:
    counted = _counted_kl(example)
    pieces = tuple(
        Piece(text=show_running(token), level=find_level(read_number(kl), cap) if is_in else None)
        for token, kl, is_in in zip(
            example["tokens"], example["kl"], example["counted"], strict=True
        )
    )
    return TokenView(
        chat=str(example["chat"]),
        mean_kl=sum(counted) / len(counted) if counted else None,
        pieces=pieces,
        details=_list_details(example),
    )


def _list_details(example: Json) -> list[Any]:
    columns = ("tokens", "kl", "kl_back", "entropy_change", "base_top", "tuned_top")
    return [
        [
            show_token(token),
            show_number(kl),
            show_number(back),
            show_change(entropy),
            _list_likeliest(base),
            _list_likeliest(tuned),
        ]
        for token, kl, back, entropy, base, tuned in zip(
            *(example[name] for name in columns), strict=True
        )
    ]


def _list_likeliest(top: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[show_token(token), round(read_number(p), 4)] for token, p in top[:N_LIKELIEST]]
