"""What a search for persona features is given: fine-tunes, texts, and how much of everything.

Plain values, without a model; `find_persona_features` is the study.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emlens.data import Batching, Chat, ContrastTexts
from emlens.evaluation.judges import Judge
from emlens.features.rank import Order, check_order
from emlens.features.screen_settings import ScreenSettings
from emlens.models.sampling import Sampling
from emlens.organisms.trajectory import AdapterTrajectory
from emlens.sources import Source
from emlens.vectors import Direction

Tuned = Any
"""A `Source`, a `LoraAdapter`, a loaded model, or a `ModelPair` over the same base."""
Speaker = Literal["given", "base", "own"]
"""Whose responses are read: those of the chats as they are, the base's, or each model's own."""


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """One fine-tune of a search."""

    number: int
    """Its place, from 1: those with the behaviour first, then their twins."""
    source: Tuned
    misaligned: bool
    """Whether it has the behaviour in question."""
    domain: str | None
    """What it was trained on."""

    @property
    def name(self) -> str:
        """As the user wrote it."""
        if isinstance(self.source, str | Path | Source):
            return str(self.source)
        # A pair's, an adapter's; a model has neither.
        found = (getattr(self.source, name, None) for name in ("tuned_name", "name"))
        return str(next(filter(None, found), f"fine-tune {self.number}"))


@dataclass(frozen=True, kw_only=True)
class FineTunes:
    """Fine-tunes of one base, and what is known of them before anything is measured.

    Raises:
        ValueError: none, twins or domains that are not one for each, or one that comes twice.
    """

    tuned: tuple[Tuned, ...]
    """Those with the behaviour in question."""
    careful: tuple[Tuned, ...] = ()
    """The twin of each, which differs in harm alone, in the same order; empty where there are
    none."""
    domains: tuple[str, ...] = ()
    """What each pair was trained on, such as `finance`; left out together when models are told
    apart."""

    def __post_init__(self) -> None:
        if not self.tuned:
            raise ValueError("tuned: got none, expected at least one fine-tune")
        for name in ("careful", "domains"):
            given = getattr(self, name)
            if given and len(given) != len(self.tuned):
                raise ValueError(
                    f"{name}: got {len(given)} for {len(self.tuned)} fine-tunes, expected one for "
                    "each, in the same order, or none"
                )
        names = [one.name for one in self]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tuned, careful: {name} comes more than once")

    def __iter__(self) -> Iterator[FineTune]:
        """All of them, those with the behaviour first."""
        kinds = [(one, True) for one in self.tuned] + [(one, False) for one in self.careful]
        for place, (source, misaligned) in enumerate(kinds):
            domain = self.domains[place % len(self.tuned)] if self.domains else None
            yield FineTune(number=place + 1, source=source, misaligned=misaligned, domain=domain)


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """How fine-tunes are compared with their base.

    Raises:
        ValueError: an unknown speaker, or responses that nothing says how to sample.
    """

    positions: str | None = None
    """Which tokens; by default those that the codec was trained on."""
    responses: Speaker = "given"
    """`own`: a difference of texts mixes with one of representations, which results say."""
    sampling: Sampling | None = None
    """Of responses that are not given."""
    batching: Batching = Batching()  # noqa: RUF009 - frozen
    """Tokens run at once; it may change between calls."""
    seed: int = 0
    """Of the flipped signs, resamples and random directions."""

    def __post_init__(self) -> None:
        if self.responses not in ("given", "base", "own"):
            raise ValueError(f"responses: got {self.responses!r}, expected given, base or own")
        if (self.sampling is None) != (self.responses == "given"):
            raise ValueError(
                f"sampling: got {self.sampling} with responses={self.responses!r}; responses of "
                "the base or of each model are sampled, given ones are not"
            )


@dataclass(frozen=True, kw_only=True)
class PersonaTexts:
    """What models are compared on, and what latents are explained and tried on.

    Raises:
        ValueError: fewer than two chats.
    """

    chats: tuple[Chat, ...]
    """Prompts that elicit the behaviour, or answered chats."""
    corpus: tuple[Chat, ...] = ()
    """What windows of the cards are cut from, the more various the better; empty takes `chats`."""
    contrast: ContrastTexts | None = None
    """Fixed misaligned and aligned responses: for the causal screen, attribution, and odds along a
    training."""

    def __post_init__(self) -> None:
        if len(self.chats) < 2:
            raise ValueError(
                f"chats: got {len(self.chats)}, expected at least two; prompts are the units of "
                "every test"
            )


@dataclass(frozen=True, kw_only=True)
class PersonaSettings:
    """How much of everything; nothing here decides what a number means.

    Raises:
        ValueError: a number below its least, or an order that comparisons do not give.
    """

    comparison: ComparisonSettings = ComparisonSettings()
    """How fine-tunes are compared with their base."""
    orders: tuple[Order, ...] = ("delta", "abs_delta", "t", "cosine")
    """Orderings whose ends are looked at, besides the contrast where there are twins."""
    attribute: bool = False
    """Whether the first fine-tune's fixed responses are attributed, an ordering of its own; takes
    gradients."""
    n_latents: int = 20
    """Latents that are chosen, from both ends of each ordering in turn; these are screened."""
    n_cards: int = 12
    """How many of them get a card."""
    n_signature: int = 1
    """Latents by which models are told apart."""
    n_top: int = 6
    """Windows of a card in which the latent is most active."""
    per_decile: int = 1
    """Windows of a card from each tenth of its strengths."""

    def __post_init__(self) -> None:
        least = {"n_latents": 1, "n_cards": 0, "n_signature": 1, "n_top": 1, "per_decile": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {bound}")
        if not self.orders:
            raise ValueError("orders: got none, expected at least one, such as 'delta'")
        for order in self.orders:
            check_order("orders", order)


@dataclass(frozen=True, kw_only=True)
class LatentPath:
    """A training along which latents and the odds of fixed responses are followed.

    Raises:
        ValueError: a number below 1.
    """

    trajectory: AdapterTrajectory
    """Of a fine-tune of the base; best of one that had no part in choosing the latents."""
    twin: AdapterTrajectory | None = None
    """Of its careful twin, with the same checkpoints: the base of the bands, or else harmless
    changes leave them, too."""
    every: int = 1
    """Checkpoints from one that is taken to the next."""
    n_latents: int = 3
    """The first of the chosen latents, each followed."""

    def __post_init__(self) -> None:
        for name in ("every", "n_latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class PersonaProbe:
    """What is asked beyond the comparison: do latents cause the behaviour, how early do they warn.

    Raises:
        ValueError: a screen that samples, without anybody to judge.
    """

    screen: ScreenSettings | None = None
    """Of the causal screen on the first fine-tune; None leaves it out."""
    judge: Judge | None = None
    """Of what is sampled in the screen; another judge is another plan."""
    path: LatentPath | None = None
    """Of the early warning; None leaves it out."""
    directions: tuple[Direction, ...] = ()
    """What cards are compared with, beside the mean differences and what the adapter writes."""

    def __post_init__(self) -> None:
        if self.screen is not None and self.screen.n_sampled and self.judge is None:
            raise ValueError(
                "judge: got none, and the screen samples responses; n_sampled=0 leaves the second "
                "stage out"
            )
