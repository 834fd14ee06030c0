"""What is known of latents, one card each: where they fire, what they write, what that resembles.

Plain frozen results; `explain_features` makes them. Windows show what goes along with a latent on
one corpus, and nothing of cause (`screen_features`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.features.logit_lens import LogitLens
from emlens.features.results import SaeHealth
from emlens.features.vector_cosines import VectorCosine


@dataclass(frozen=True, kw_only=True)
class TokenWindow:
    """Some tokens of a text around one at which a latent is active."""

    chat: int
    """Index of the chat."""
    chat_id: str | None
    token: int
    """Index in the chat's ids of the token that the window is about."""
    start: int
    """Index of the window's first token."""
    pieces: tuple[str, ...]
    """Text of each token."""
    codes: tuple[tuple[float | None, ...], ...]
    """Code of the latent at each token, by model; None where the codec does not look."""
    code: float
    """At the token that the window is about, the largest over the models."""
    decile: int | None = None
    """Of a sampled window: part of the active tokens that it was drawn from, 1 for the weakest."""

    @property
    def text(self) -> str:
        """The window's text, the token in question between guillemets."""
        at = self.token - self.start
        marked = (f"«{p}»" if k == at else p for k, p in enumerate(self.pieces))
        return "".join(marked)


@dataclass(frozen=True, kw_only=True)
class FeatureCard:
    """One latent."""

    latent: int
    link: str | None
    """Where others describe it."""
    active_share: float
    """Share of the tokens looked at where it is active in any of the models."""
    decoder_norm: float
    """Norm of W_dec."""
    top: tuple[TokenWindow, ...]
    """The texts in which it is most active, one window each."""
    sampled: tuple[TokenWindow, ...]
    """Windows from all strengths, the weakest first: a latent means what these have in common, not
    only what its peaks do."""
    lens: LogitLens | None
    """Tokens that it promotes and suppresses, by the base's output; None where it does not write to
    the residual stream."""
    directions: tuple[VectorCosine, ...]
    """Of W_dec with the directions given; of a pair with its mean difference last."""
    writes: tuple[VectorCosine, ...]
    """Of W_dec with what the adapter's modules write."""
    explanation: str | None = None
    """What the explainer said, where one was asked."""


@dataclass(frozen=True, kw_only=True)
class FeatureCards(Result):
    """Cards of some latents of one codec, on one corpus."""

    kind: ClassVar[str] = "feature_cards"

    base: str
    """The base's source, or the only model's."""
    base_fingerprint: str
    tuned: str | None
    """The fine-tune's source, of a pair."""
    tuned_fingerprint: str | None
    """Of a full checkpoint."""
    adapter_fingerprint: str | None
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    site: str
    positions: str
    """Tokens that were looked at."""
    models: tuple[str, ...]
    """Whose codes windows hold, in order: `model`, or `base` and `tuned`."""
    chats_sha256: str
    """Of the corpus."""
    n_chats: int
    n_tokens: int
    seed: int
    """Of the sampled windows."""
    health: SaeHealth
    """How well the codec fits on the tokens looked at: before any card is believed."""
    cards: tuple[FeatureCard, ...]
    """In the order asked for."""

    def card(self, latent: int) -> FeatureCard:
        """Return the card of a latent.

        Raises:
            KeyError: it was not asked for.
        """
        for card in self.cards:
            if card.latent == latent:
                return card
        known = ", ".join(str(card.latent) for card in self.cards[:10])
        raise KeyError(f"latent {latent} has no card; there are some of {known}")

    def rows(self) -> list[dict[str, Any]]:
        """One row a latent: its best window, its first tokens, its largest cosines."""
        return [
            {
                "latent": card.latent,
                "active_share": card.active_share,
                "top": card.top[0].text if card.top else "",
                "promoted": _words(card, "promoted"),
                "suppressed": _words(card, "suppressed"),
                "nearest": _nearest(card),
                "explanation": card.explanation,
                "link": card.link,
            }
            for card in self.cards
        ]


def _words(card: FeatureCard, end: str) -> str:
    return "" if card.lens is None else " ".join(repr(w.text) for w in getattr(card.lens, end)[:5])


def _nearest(card: FeatureCard) -> str:
    both = (*card.directions, *card.writes)
    # By how far beyond chance: a span of many dimensions is near to everything.
    best = max(both, key=lambda one: abs(one.cosine) / one.random, default=None)
    return "" if best is None else f"{best.name}: {best.cosine:.2f} (random {best.random:.2f})"
