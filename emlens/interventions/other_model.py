"""The refusal to use a vector, unasked, on another model than those it was made from."""

from typing import Any
from weakref import WeakKeyDictionary

from emlens.interventions.intervention import Intervention, MadeFor
from emlens.models.attach import attached_adapter
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.views import origin_of
from emlens.vectors import UNPROCESSED

_KNOWN: WeakKeyDictionary[Any, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()
"""Tokenizer -> what would show a change, and the fingerprint it had with that."""


class OtherModelError(ValueError):
    """An intervention was made from another model than the one it is to act on."""


def check_model(model: Any, intervention: Intervention) -> None:
    """Require that an intervention was made for a model, or for any.

    Weights, attached adapter, tokenizer and processing are compared as far as both sides know
    them. A base without an adapter takes what was made on a fine-tune of it.

    Raises:
        OtherModelError: it was made for another; what differs is named.
    """
    origin = origin_of(model)
    if intervention.made_for is None:
        return
    differs = _list_differences(model, intervention.made_for)
    if differs:
        raise OtherModelError(
            f"interventions: the {intervention.label} vector at {intervention.site} was made "
            f"{'; and '.join(differs)} (in {origin.name}). Pass allow_other_model=True "
            "(--allow-other-model) where transfer is what you want to see"
        )


def _list_differences(model: Any, made: MadeFor) -> list[str]:
    differs = []
    origin = origin_of(model)
    # What was made on a model may act on what was merged or folded from it, as on what is attached.
    if made.weights and not set(origin.lineage) & set(made.weights):
        known = ", ".join(one or "no model that is on record" for one in made.weights)
        differs.append(f"from weights {known}, not {origin.fingerprint}")
    tokenizer = _fingerprint(model.tokenizer) if made.tokenizer else ""
    if tokenizer and tokenizer != made.tokenizer:
        differs.append(
            f"with tokenizer {made.tokenizer}, not {tokenizer}: vocabulary, special tokens or "
            "chat template differ"
        )
    adapter = attached_adapter(model)
    if adapter is not None and made.adapter and adapter.fingerprint != made.adapter:
        differs.append(
            f"from the fine-tune by adapter {made.adapter}, not {adapter.fingerprint} "
            f"({adapter.name})"
        )
    if made.processing not in ("", UNPROCESSED):
        differs.append(f"from weights that are {made.processing!r}, not {UNPROCESSED!r}")
    return differs


def _fingerprint(tokenizer: Any) -> str:
    """Remembered while the tokenizer stays as it is: a large vocabulary takes a while to hash."""
    if tokenizer is None:
        return ""
    template, special = str(tokenizer.chat_template), tuple(tokenizer.all_special_tokens)
    state = (len(tokenizer), template, special)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        known = _KNOWN[tokenizer] = (state, fingerprint_tokenizer(tokenizer))
    return known[1]
