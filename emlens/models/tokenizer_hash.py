"""A digest of a tokenizer: whether two runs read and frame the same text alike.

Of what it maps, not of its files: vocabulary, special tokens and chat template.
"""

import hashlib
import json
from typing import Any


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Hash vocabulary, special tokens and chat template; 32 digits, empty for no tokenizer.

    What a call changes for itself (padding side, truncation) does not count.
    """
    if tokenizer is None:
        return ""
    parts = {
        "vocabulary": tokenizer.get_vocab(),
        "special": sorted(set(tokenizer.all_special_tokens)),
        "template": tokenizer.chat_template,
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
