"""How long a training would be, counted from its rows and its recipe without a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emlens.data.chat import Chat
from emlens.models.training_loop import TrainingExample, count_steps
from emlens.organisms.host_settings import trainer_settings
from emlens.organisms.masks import count_trained, make_examples
from emlens.organisms.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long a run would be."""

    rows: int
    tokens: int
    """Of one pass over all rows."""
    trained_tokens: int
    """Of these, response tokens."""
    kl_rows: int
    """Of a `KlPenalty`, which takes as many at a time as there are rows in a batch; 0 without."""
    kl_tokens: int
    """Of these; each that is taken is read by the base too."""
    latent_rows: int
    """Of a `LatentPenalty`, taken in the same way; 0 without."""
    latent_tokens: int
    """Of these; each that is taken is read by the base too."""
    steps: int
    """Optimiser steps, if nothing ends the run early."""
    checkpoints: int
    """States that would be kept, the one before the first step included; 0 for none."""


def plan_training(
    chats: Sequence[Chat],
    tokenizer: Any,
    *,
    settings: TrainSettings,
    n_ctx: int,
    kept_near: Sequence[Chat] = (),
    held_on: Sequence[Chat] = (),
) -> TrainingPlan:
    """Count what a run would take, without a model.

    Args:
        chats: rows, each with a response.
        tokenizer: of the base.
        settings: the recipe.
        n_ctx: tokens that the base can read.
        kept_near: chats of a `KlPenalty`, if there is one.
        held_on: chats of a `LatentPenalty`, if there is one.

    Raises:
        NoResponseError: a chat without a response; ChatTooLongError: one with too many tokens.
    """
    longest = min(settings.max_length, n_ctx)
    examples = make_examples(chats, tokenizer, longest=longest)
    near = make_examples(kept_near, tokenizer, longest=longest, named="KlPenalty.chats")
    held = make_examples(held_on, tokenizer, longest=longest, named="LatentPenalty.chats")
    steps = count_steps(trainer_settings(settings), len(examples))
    every = settings.checkpoint_every
    return TrainingPlan(
        rows=len(examples),
        tokens=_count_tokens(examples),
        trained_tokens=count_trained(examples),
        kl_rows=len(near),
        kl_tokens=_count_tokens(near),
        latent_rows=len(held),
        latent_tokens=_count_tokens(held),
        steps=steps,
        # The last step is kept too where it is none of the others.
        checkpoints=0 if every is None else 1 + -(-steps // every),
    )


def _count_tokens(examples: Sequence[TrainingExample]) -> int:
    return sum(len(example.ids) for example in examples)
