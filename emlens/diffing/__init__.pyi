from .compare import compare_activations, compare_logits, compare_models
from .null_band import compare_nulls
from .results import (
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
