"""How much of everything the demo does, in full and to see that it works; it decides no method."""

from dataclasses import dataclass

from emlens.studies.removal import Split


@dataclass(frozen=True, kw_only=True)
class FeatureSize:
    """How much the search among latents does."""

    chats: int
    """Held-out rows that base, fine-tune and twin read."""
    latents: int
    """Latents that are chosen, from both ends of all orderings in turn."""
    cards: int
    """How many of them get a card."""
    windows: int
    """Texts on a card."""
    odds: int
    """Misaligned, and aligned, fixed responses that each latent is steered on; 0 steers none."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of everything."""

    fit_questions: int
    """Questions that the direction is fitted on."""
    fit_samples: int
    """Responses of the fine-tune to each of them."""
    split: Split
    """Which of them are fitted on."""
    coherent_above: int
    """Coherence of those that are fitted on."""
    questions: int
    """Open questions that every arm answers."""
    samples: int
    """Responses of each arm to each of them."""
    new_tokens: int
    """Longest response, in tokens."""
    choose: int
    """Harmful, and careful, chats that the layer is chosen by."""
    neutral: int
    """Chats that damage is bounded on in the choice, and as many others that it is reported on."""
    heldout: int
    """Held-out rows of the fine-tune's own subject."""
    nulls: int
    """Random adapters in the null band."""
    examples: int
    """Chats shown token by token."""
    features: FeatureSize
    """The search among latents."""


FULL = DemoSize(
    fit_questions=12,
    fit_samples=4,
    split="halves",
    coherent_above=50,
    questions=6,
    samples=1,
    new_tokens=24,
    choose=4,
    neutral=2,
    heldout=8,
    nulls=8,
    examples=6,
    features=FeatureSize(chats=20, latents=5, cards=5, windows=4, odds=3),
)
"""Twelve prompts are the least that a latent can be tested on. Each of five latents and of sixteen
random directions takes two passes, through half of the layers, over six answers."""
QUICK = DemoSize(
    fit_questions=6,
    fit_samples=8,
    split="halves",
    coherent_above=0,
    questions=3,
    samples=1,
    new_tokens=12,
    choose=2,
    neutral=1,
    heldout=4,
    nulls=2,
    examples=2,
    features=FeatureSize(chats=4, latents=2, cards=1, windows=2, odds=0),
)
