"""What is asked of a model's tokenizer: that there is one, and that it can pad and begin.

Missing tokens are filled in on a copy: the tokenizer that was given is never changed, and files get
it as it was.
"""

import copy
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

_WANTED = ("pad_token", "bos_token")
"""What text input and left padding need; the end of text stands in, as in ``set_tokenizer``."""
_FILLED: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()
"""Which of them were filled in, by copy."""


def fill_special_tokens(tokenizer: Any) -> Any:
    """Return a tokenizer that can pad and begin: missing tokens are its end of text.

    No new token is made, so ids and ``fingerprint_tokenizer`` stay the same. A token that the chat
    template names stays missing, because chats would read otherwise than before.

    Args:
        tokenizer: a tokenizer, or None.

    Returns:
        A copy over the same vocabulary; the argument itself where nothing is filled in.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    named, template = tokenizer.special_tokens_map, str(tokenizer.chat_template or "")
    missing = tuple(name for name in _WANTED if name not in named and name not in template)
    end = named.get("eos_token")
    if end is None or not missing:
        return tokenizer
    filled = _copy_tokens(tokenizer, dict.fromkeys(missing, end))
    _FILLED[filled] = missing
    return filled


def strip_filled_tokens(tokenizer: Any) -> Any:
    """Return a tokenizer as its files had it: without what was filled in and is still there."""
    filled = _FILLED.get(tokenizer, ()) if tokenizer is not None else ()
    end = getattr(tokenizer, "eos_token", None)
    names = [name for name in filled if getattr(tokenizer, name) == end]
    if not names:
        return tokenizer
    stripped = _copy_tokens(tokenizer, dict.fromkeys(names))
    stripped("")  # the vocabulary they share remembers the last call's padding, and would write it
    return stripped


def require_tokenizer(tokenizer: Any, whose: str) -> Any:
    """Return a tokenizer.

    Args:
        tokenizer: a model's, or None.
        whose: the model or argument it belongs to, for the message.

    Raises:
        ValueError: there is none, and how to give one.
    """
    if tokenizer is None:
        raise ValueError(
            f"{whose} has no tokenizer, so text cannot be turned into tokens: none lay where it "
            "was loaded from. Set the model's own: model.tokenizer = "
            "transformers.AutoTokenizer.from_pretrained(FOLDER or 'org/name')"
        )
    return tokenizer


def _copy_tokens(tokenizer: Any, changes: dict[str, Any]) -> Any:
    """A shallow copy with a table of special tokens of its own."""
    copied = copy.copy(tokenizer)
    copied._special_tokens_map = {**tokenizer._special_tokens_map, **changes}
    return copied
