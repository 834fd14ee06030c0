"""Results of many latents as a page has room for them: their rows instead of a number a latent.

Not for results that are to be loaded again: the whole of them is in the saved result.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emlens import __version__
from emlens.artifacts import Result
from emlens.encoding import encode, field_names

_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag")
LENGTHY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "feature_diff": (
            *("mean_base", "mean_tuned", "delta", "frequency_base", "frequency_tuned"),
            *("prompts_fired", "t", "p_value", "q_value", "p_method", "decoder_cosine"),
            *("mean_difference", "prompts"),
        ),
        "feature_contrast": ("contrast", "pairs_agreeing", "t", "p_value", "q_value", "p_method"),
        "feature_ranking": ("latents", "scores"),
        "feature_screen": ("before", "steered", "controls", "mean_difference"),
        "latent_codes": ("prompts", "latents", "codes"),
        "sae": _WEIGHTS,
        "crosscoder": _WEIGHTS,
    }
)
"""Kind -> fields that are left out."""
WITH_ROWS = frozenset(LENGTHY) | frozenset(
    ("persona_features", "sae_health", "model_classification", "early_warning", "plain_difference")
)
"""Kinds whose rows stand beside the fields; others are written as they are."""
WITH_PARTS = WITH_ROWS | {"feature_cards"}
"""Those, and kinds that hold another result, which is written as briefly."""
_SIDES = ("base", "tuned")


def describe_briefly(result: Result) -> dict[str, Any]:
    """Schema, version, the fields that are short, and the rows of a result."""
    head = {"schema": result.schema(), "emlens_version": __version__}
    return {**head, **_list_fields(result)}


def _list_fields(result: Result) -> dict[str, Any]:
    left_out = LENGTHY.get(result.kind, ())
    names = [name for name in field_names(result) if name not in left_out]
    fields = {name: _value(getattr(result, name), name) for name in names}
    held: Any = result
    if result.kind == "feature_screen":
        fields["curves"] = _list_curves(held)
        fields["trials"] = encode(held.trials(), "trials")
    if result.kind == "sae_health":
        fields["cautions"] = list(held.cautions)
    if result.kind in WITH_ROWS:
        fields["rows"] = encode(result.rows(), "rows")
    return fields


def _value(value: Any, name: str) -> Any:
    """A field, results inside it as briefly as the one that holds them."""
    if isinstance(value, Result):
        return _list_fields(value)
    if isinstance(value, tuple) and any(isinstance(item, Result) for item in value):
        return [_value(item, name) for item in value]
    return encode(value, name)


def _list_curves(screen: Any) -> dict[str, Any]:
    """Change of the log-odds by strength: latents, random directions, the mean difference."""
    return {
        side: {
            "latents": encode(screen.forced_curves(side), "curves"),
            "controls": encode(screen.control_curves(side), "curves"),
            "mean_difference": encode(screen.mean_difference_curve(side), "curves"),
        }
        for side in _SIDES
    }
