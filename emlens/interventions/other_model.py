"""The refusal to use a vector, unasked, on another model than those it was made from."""

from typing import Any

from emlens.interventions.intervention import Intervention, MadeFor
from emlens.models.attach import attached_adapter
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.views import origin_of
from emlens.vectors import UNPROCESSED


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
            "(--allow-other-model) to what makes it, or loads its codec, where transfer is what "
            "you want to see"
        )


def _list_differences(model: Any, made: MadeFor) -> list[str]:
    differs = []
    origin = origin_of(model)
    # What was made on a model may act on what was merged or folded from it, as on what is attached.
    if made.weights and not set(origin.lineage) & set(made.weights):
        known = ", ".join(one or "no model that is on record" for one in made.weights)
        differs.append(f"from weights {known}, not {origin.fingerprint}")
    tokenizer = fingerprint_tokenizer(model.tokenizer) if made.tokenizer else ""
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
