"""Extra terms of a fine-tune's loss, as values: what they ask for, and how they are computed.

A term sees the tuned model at every backward pass, never the rows that it is trained on.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emlens.data.chat import Chat
from emlens.data.prompts import hash_chats
from emlens.models.training_loop import IGNORED, Penalty, TrainingExample, collate_examples
from emlens.organisms.masks import make_examples

Description = dict[str, str | bool | int | float | None]
"""What a term is, by names: its kind, its weight, the hash of its texts."""


@runtime_checkable
class LossTerm(Protocol):
    """A term of the loss before it has met a tokenizer."""

    @property
    def needs_adapter(self) -> bool:
        """Whether it compares with the base, which only a model with an adapter has in itself."""
        ...

    def describe(self) -> Description:
        """Everything that decides it; runs, results and adapters record it."""
        ...

    def check_model(self, model: nn.Module, *, first_trained: int) -> None:
        """Refuse a base that it cannot be computed on, before a run is begun.

        Args:
            model: the base.
            first_trained: the first block that training changes.
        """
        ...

    def prepare(self, tokenizer: Any, *, batch_size: int, longest: int, seed: int) -> Penalty:
        """The term as the training loop calls it."""
        ...


@dataclass(frozen=True)
class KlPenalty:
    """Keeps a fine-tune near its base on other texts: weight * KL(base || tuned).

    KL = mean over response tokens of sum_v p_base(v) (log p_base(v) - log p_tuned(v)), in nats a
    token. The base is the same model with its adapter off, so that it costs no second copy.

    Raises:
        ValueError: no chats, or a weight that is not positive.

    Source: Soligo et al. 2026, arXiv 2602.07852.
    Differs: their mean runs over tokens and vocabulary. A weight of theirs divided by the size of
        the vocabulary is one of ours: 1e5 is .66 at 152,064 words.
    """

    chats: Sequence[Chat]
    """Texts outside of what is trained, each with a response."""
    weight: float
    """Of the term, beside a loss in nats a token."""

    def __post_init__(self) -> None:
        if not self.chats:
            raise ValueError("chats: got none, expected texts to stay near the base on")
        if not self.weight > 0:
            raise ValueError(f"weight: got {self.weight}, expected more than 0")

    @property
    def needs_adapter(self) -> bool:
        """The base is the model with its adapter off."""
        return True

    def check_model(self, model: nn.Module, *, first_trained: int) -> None:
        """Any will do."""

    def describe(self) -> Description:
        """Kind, hash of the texts, and weight."""
        return {"kind": "kl", "chats_sha256": hash_chats(self.chats), "weight": self.weight}

    def prepare(self, tokenizer: Any, *, batch_size: int, longest: int, seed: int) -> Penalty:
        """The term on `batch_size` of the chats at each pass, every chat once before any again.

        Raises:
            NoResponseError: a chat without a response.
            ChatTooLongError: one of more than `longest` tokens.
        """
        examples = make_examples(self.chats, tokenizer, longest=longest, named="KlPenalty.chats")
        order = order_rows(len(examples), seed=seed)

        def penalty(model: nn.Module, place: int) -> Float[Tensor, ""]:
            rows = [order[(place * batch_size + i) % len(order)] for i in range(batch_size)]
            return self.weight * measure_kl_from_base(model, [examples[row] for row in rows])

        return penalty


def order_rows(n: int, *, seed: int) -> list[int]:
    """The order in which a term goes through its n texts, again and again."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def find_base(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """What makes a tuned model its base for the length of a context.

    Raises:
        TypeError: a model without an adapter to switch off, as in a full fine-tune.
    """
    tuned: Any = model
    if not hasattr(tuned, "disable_adapter"):
        raise TypeError(
            f"model: a {type(model).__name__} has no adapter to switch off, and so no base beside "
            "it; train an adapter, or leave the penalty out"
        )
    return tuned.disable_adapter


def measure_kl_from_base(
    model: nn.Module, examples: Sequence[TrainingExample]
) -> Float[Tensor, ""]:
    """Mean KL(base || tuned) over the labelled tokens of some sequences, in nats a token.

    Args:
        model: a tuned model whose `disable_adapter()` context makes it the base.
        examples: sequences with their labels.

    Raises:
        TypeError: a model that cannot be made its base, as after a full fine-tune.
    """
    tuned, make_base = model, find_base(model)
    device = next(tuned.parameters()).device
    batch = {name: part.to(device) for name, part in collate_examples(examples).items()}
    targets = batch.pop("labels")[:, 1:] != IGNORED
    training = tuned.training
    tuned.eval()  # dropout would tell the two apart where nothing else does
    try:
        with torch.no_grad(), make_base():
            base = tuned(**batch, use_cache=False).logits[:, :-1][targets]
        own = tuned(**batch, use_cache=False).logits[:, :-1][targets]
    finally:
        tuned.train(training)
    wide = torch.promote_types(own.dtype, torch.float32)
    expected = base.to(wide).log_softmax(-1)
    return (
        nn.functional.kl_div(
            own.to(wide).log_softmax(-1), expected, log_target=True, reduction="none"
        )
        .sum(-1)
        .mean()
    )
