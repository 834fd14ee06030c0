"""A model's identity as results keep it; reading one back needs no model library.

For the identity of a model in memory see ``identity``.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """One model, told from any other that would give other numbers."""

    name: str
    """As the user wrote it, with what was merged or attached; it decides nothing."""
    weights: str
    """`hash_weights`: after merging, folding and editing in place."""
    dtype: str
    """Of the weights, such as `bfloat16`."""
    adapter: str | None
    """Hash of the attached adapter's factors and scales; None without one."""
    tokenizer: str
    """Fingerprint of vocabulary, special tokens and chat template; empty without a tokenizer."""
