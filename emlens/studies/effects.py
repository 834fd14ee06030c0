"""What interventions do to a model without sampling: damage to neutral text, odds of fixed text.

For behaviour, sample and judge: `remove_direction`.
"""

from collections.abc import Sequence
from typing import Any

from emlens.data import Chat, ContrastTexts, tokenize_chat
from emlens.diffing import compare_logits
from emlens.interventions import Intervention, intervene
from emlens.models.attach import attach_adapter, attached_adapter
from emlens.models.pair import ModelPair
from emlens.models.score import score_responses
from emlens.models.views import share_model


def measure_kl(
    base: Any, model: Any, interventions: Sequence[Intervention], chats: Sequence[Chat]
) -> float:
    """KL(model || model under the interventions), nats a token of the responses.

    Args:
        base: the model that an adapter attached to `model` was attached to.
        model: the model that is disturbed.
        interventions: act on the second copy alone.
        chats: answered chats that have nothing to do with the behaviour.
    """
    adapter = attached_adapter(model)
    changed = share_model(model) if adapter is None else attach_adapter(base, adapter)
    beside = ModelPair(base=model, tuned=changed, adapter=None, proof=None)
    with intervene(changed, interventions):
        return compare_logits(beside, chats, examples=0).kl_base_tuned


def measure_odds(model: Any, interventions: Sequence[Intervention], texts: ContrastTexts) -> float:
    """Log-probability of the positive responses less that of the negative ones, nats a token.

    Args:
        model: the model that is asked.
        interventions: act on it meanwhile.
        texts: answered chats; each counts the same within its class.

    Raises:
        ValueError: a class without texts.
    """
    if not texts.positive or not texts.negative:
        raise ValueError(
            f"texts: {len(texts.positive)} positive and {len(texts.negative)} negative, expected "
            "at least one of each: the odds are between the two"
        )
    means = []
    for chats in (texts.positive, texts.negative):
        tokenized = [tokenize_chat(chat, model.tokenizer) for chat in chats]
        with intervene(model, interventions):
            scores = score_responses(model, tokenized)
        means.append(sum(score.mean for score in scores) / len(scores))
    return means[0] - means[1]
