"""The chats of a run as token ids, made when a batch asks for them: only their lengths are kept.

For a few chats, or one that is to be looked at, use `tokenize_chat`.
"""

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import overload

from emlens.data.chat import Chat, TokenizedChat, TokenizerLike, tokenize_chat

REMEMBERED = 4096
"""Chats whose ids are kept in case they are asked for again: more than a batch has."""


class TokenizedChats(Sequence[TokenizedChat]):
    """Chats by their place in the run; one without a response is framed up to where it begins.

    Each is tokenised here once for its length, and again when it is asked for, unless it is among
    the last few thousand: so memory does not grow with the number of chats.

    Args:
        chats: the run; kept as they are.
        tokenizer: of the model that will read them.
        check: called with each, and raises for one that cannot be used.
    """

    def __init__(
        self,
        chats: Sequence[Chat],
        tokenizer: TokenizerLike,
        *,
        check: Callable[[TokenizedChat], object] = lambda _chat: None,
    ) -> None:
        def tokenize(row: int) -> TokenizedChat:
            chat = chats[row]
            return tokenize_chat(chat, tokenizer, for_generation=chat.response is None)

        self._tokenize = lru_cache(REMEMBERED)(tokenize)
        self.lengths: array[int] = array("q")
        """Tokens of each chat."""
        for row in range(len(chats)):
            chat = self._tokenize(row)
            check(chat)
            self.lengths.append(len(chat.ids))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, row: int, /) -> TokenizedChat: ...
    @overload
    def __getitem__(self, row: slice, /) -> tuple[TokenizedChat, ...]: ...
    def __getitem__(self, row: int | slice, /) -> TokenizedChat | tuple[TokenizedChat, ...]:
        if isinstance(row, slice):
            return tuple(self[place] for place in range(len(self))[row])
        return self._tokenize(range(len(self))[row])
