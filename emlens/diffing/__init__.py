"""Comparing a base with its fine-tune: activations, outputs, and what chance would do."""

from emlens.diffing.compare import compare_activations, compare_logits, compare_models
from emlens.diffing.null_band import compare_nulls
from emlens.diffing.results import (
    ActivationDiff,
    ExampleComparison,
    LogitDiff,
    ModelDiff,
    NullBand,
    PromptDivergence,
    TokenChange,
)

__all__ = [
    "ActivationDiff",
    "ExampleComparison",
    "LogitDiff",
    "ModelDiff",
    "NullBand",
    "PromptDivergence",
    "TokenChange",
    "compare_activations",
    "compare_logits",
    "compare_models",
    "compare_nulls",
]
