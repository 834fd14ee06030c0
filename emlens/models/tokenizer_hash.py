"""A digest of a tokenizer: whether two runs read and frame the same text alike.

Of what it maps, not of its files: vocabulary, special tokens and chat template.
"""

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

_KNOWN: WeakKeyDictionary[Any, tuple[object, str]] = WeakKeyDictionary()
"""Tokenizer -> its state, and its digest in that state."""


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Hash vocabulary, special tokens and chat template; 32 digits, empty for no tokenizer.

    What a call changes for itself (padding side, truncation) does not count. Remembered while size,
    special tokens and template stay as they are: a large vocabulary takes half a second.
    """
    if tokenizer is None:
        return ""
    special = tuple(tokenizer.all_special_tokens)
    state = (len(tokenizer), special, str(tokenizer.chat_template))
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        known = _KNOWN[tokenizer] = (state, _hash(tokenizer))
    return known[1]


def _hash(tokenizer: Any) -> str:
    parts = {
        "vocabulary": tokenizer.get_vocab(),
        "special": sorted(set(tokenizer.all_special_tokens)),
        "template": tokenizer.chat_template,
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
