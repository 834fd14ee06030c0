"""Chats: rendered by the tokenizer's template, tokenised once, with the span of every turn.

Do not use it to generate text or to pad rows: it turns one chat into one row of token ids.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

_MARKER = "\ue000emlens\ue001"  # private-use characters: no template and hardly a text has them


class ChatError(ValueError):
    """A chat that cannot be used: no user turn, unusable text, or a role the template refuses."""


class SpanError(ChatError):
    """The template rewrites a message, so that its place in the rendered text is not certain."""


@runtime_checkable
class TokenizerLike(Protocol):
    """What is asked of a tokenizer: a fast one of `transformers` has all of it."""

    @property
    def is_fast(self) -> bool:
        """Whether it can return the character offsets of its tokens."""
        ...

    @property
    def chat_template(self) -> Any:
        """The Jinja template of a chat, or None."""
        ...

    @property
    def all_special_ids(self) -> Any:
        """Ids of the tokens with a special role (beginning and end of text, padding)."""
        ...

    def get_added_vocab(self) -> Mapping[str, int]:
        """Tokens that are matched as a whole before the text is split."""
        ...

    def apply_chat_template(
        self, conversation: Any, /, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """Render a chat as text."""
        ...

    def __call__(
        self, text: str, /, *, add_special_tokens: bool, return_offsets_mapping: bool
    ) -> Mapping[str, Any]:
        """Tokenise a text."""
        ...


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """`user`, `assistant`, `system`, or whatever else the template knows."""
    content: str
    """The text of the turn, as the author wrote it."""

    def __post_init__(self) -> None:
        if not self.role:
            raise ChatError("role: got an empty text; expected 'user', 'assistant' or 'system'")
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"content of a {self.role} turn is not valid Unicode: {error}"
            ) from error


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one user turn."""

    messages: tuple[Message, ...]
    """The turns, oldest first."""
    id: str | None = None
    """A name for error messages and tables."""
    origin: str | None = field(default=None, compare=False, repr=False)
    """Where it was read, as FILE:LINE, for error messages; no part of what the chat is."""

    def __post_init__(self) -> None:
        if not any(message.role == "user" for message in self.messages):
            roles = [message.role for message in self.messages]
            raise ChatError(
                f"messages{_named(self.id)}: no user turn, roles are {roles}; expected at least one"
            )

    @property
    def response(self) -> Message | None:
        """The final turn if it is the assistant's, else None: there is something to answer."""
        return self.messages[-1] if self.messages[-1].role == "assistant" else None

    def without_response(self) -> "Chat":
        """Return the chat up to where its response begins, ready for `for_generation=True`."""
        return self if self.response is None else replace(self, messages=self.messages[:-1])


@dataclass(frozen=True)
class Turn:
    """Which tokens hold the content of one message, without header and end-of-turn token."""

    role: str
    """The message's role."""
    start: int
    """Index of the first token of the content."""
    stop: int
    """Index after the last token of the content."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedChat:
    """Token ids of one chat, without padding, and where its parts lie.

    A token belongs to a message if it holds at least one of its characters. So a token that
    straddles the border of prompt and response (such as a header's last space, merged with the
    first word) belongs to the response, and no token of the prompt holds any of the response. A
    token that straddles the end of the response belongs to the response as well.
    """

    ids: Int[Tensor, " pos"]
    """Token ids, unpadded."""
    prompt_end: int
    """Number of prompt tokens: everything before the response, generation header included."""
    response: tuple[int, int] | None
    """First token and token after the last of the last assistant turn's content; None without."""
    response_eot: int | None
    """Index after the end-of-turn token of the response; None where none is written."""
    awaits_response: bool
    """Whether the ids end exactly where a response would begin."""
    turns: tuple[Turn, ...]
    """Content span of every message, in order."""
    text: str
    """The text that was tokenised."""
    ends: tuple[int, ...]
    """Character of `text` after the last of each token; never falling."""
    id: str | None = None
    """The chat's own name."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """Text of each token; joined, they are `text`.

        Of several tokens that share one character (an emoji in bytes) the first one gets it.
        """
        bounds = [0, *self.ends[:-1], len(self.text)]
        return tuple(self.text[a:b] for a, b in pairwise(bounds))


def as_chats(chats: Sequence[Chat | str]) -> tuple[Chat, ...]:
    """Return chats; a str becomes a chat of one user turn.

    Raises:
        ChatError: no chats at all, or one bare str where a sequence is expected.
    """
    if isinstance(chats, str):
        raise ChatError(f"chats: got one str, expected a sequence; write [{chats[:40]!r}]")
    if not chats:
        raise ChatError("chats: got an empty sequence; expected at least one chat")
    return tuple(
        Chat((Message("user", chat),)) if isinstance(chat, str) else chat for chat in chats
    )


def tokenize_chat(
    chat: Chat, tokenizer: TokenizerLike, *, for_generation: bool = False
) -> TokenizedChat:
    """Render a chat, tokenise it once and find its spans by character offsets.

    The ids come from a single rendering. Where each message lies in it is learned by rendering
    again with a placeholder instead of that message; those renderings are never tokenised.
    `response` is the last assistant turn, also when another user turn follows it.

    The template writes all special tokens. Text in a message that spells a special token becomes
    that token, as in `apply_chat_template`; spans stay right, because they do not look for it.

    A tokenizer without a template takes one user turn and, after it, one assistant turn. Their
    texts are joined as they are, nothing between them, and get the tokenizer's own special tokens.

    Prompt ids equal those of `chat.without_response()` for generation when the template writes
    the same prompt in both cases, unless the response begins with blanks: a tokenizer may merge
    them into the header.

    Args:
        chat: the chat.
        tokenizer: a fast tokenizer.
        for_generation: end with the header of the answer to come; the chat must end before one.

    Raises:
        ChatError: a slow tokenizer, a role the template refuses, a chat with a response for
            generation, more turns than plain text can hold, or no token at all.
        SpanError: the template drops, repeats or rewrites a message.
    """
    if not tokenizer.is_fast:
        raise ChatError("tokenizer: got a slow one; expected a fast one, which reports offsets")
    if for_generation and chat.response is not None:
        raise ChatError(
            f"chat{_named(chat.id)} already ends with a response; for generation pass "
            "chat.without_response()"
        )
    templated = bool(tokenizer.chat_template)
    if templated:
        text, spans = _render_with_spans(chat, tokenizer, for_generation)
    else:
        text, spans = _plain_text(chat)
    encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    starts, ends = _characters_of_tokens(encoded["offset_mapping"])
    kept = len(starts)
    if for_generation and not templated:
        # An end-of-text token that the tokenizer appends would end the answer before it begins.
        kept = bisect_left(starts, len(text))
    ids = list(encoded["input_ids"])[:kept]
    if not ids:
        raise ChatError(f"chat{_named(chat.id)} has no token: its text is {text!r}")
    turns = tuple(
        Turn(message.role, *_tokens_of(span, starts, ends))
        for message, span in zip(chat.messages, spans, strict=True)
    )
    answers = [] if for_generation else [turn for turn in turns if turn.role == "assistant"]
    last = answers[-1] if answers else None
    return TokenizedChat(
        ids=torch.tensor(ids, dtype=torch.int64),
        prompt_end=last.start if last else len(ids),
        response=(last.start, last.stop) if last else None,
        response_eot=_end_of_turn(ids, ends, text, last.stop, tokenizer) if last else None,
        awaits_response=for_generation or (not templated and last is None),
        turns=turns,
        text=text,
        ends=tuple(ends[:kept]),
        id=chat.id,
    )


def _named(chat_id: str | None) -> str:
    return "" if chat_id is None else f" (id {chat_id!r})"


def _render(messages: Sequence[Message], tokenizer: TokenizerLike, header: bool) -> str:
    from jinja2 import TemplateError

    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=header)
    except TemplateError as error:
        roles = [message.role for message in messages]
        raise ChatError(f"the chat template refuses a chat with roles {roles}: {error}") from error


def _render_with_spans(
    chat: Chat, tokenizer: TokenizerLike, header: bool
) -> tuple[str, list[tuple[int, int]]]:
    text = _render(chat.messages, tokenizer, header)
    marker = _MARKER
    while any(marker in message.content for message in chat.messages) or marker in text:
        marker += "\ue001"
    return text, [
        _locate_message(chat, index, text, tokenizer, header, marker)
        for index in range(len(chat.messages))
    ]


def _locate_message(
    chat: Chat, index: int, text: str, tokenizer: TokenizerLike, header: bool, marker: str
) -> tuple[int, int]:
    message = chat.messages[index]
    probe = list(chat.messages)
    probe[index] = replace(message, content=marker)
    around = _render(probe, tokenizer, header).split(marker)
    span = None
    if len(around) == 2:
        span = _span_between(text, around[0], around[1], message.content)
        if span is None and message.role == "assistant" and index:
            # A template may write an empty reasoning block unless the response brings its own.
            start = _render(chat.messages[:index], tokenizer, True)
            span = _span_between(text, start, around[1], message.content)
    if span is None:
        raise SpanError(
            f"chat{_named(chat.id)}: the template drops, repeats or rewrites message {index} "
            f"(role {message.role}), so its place in the text is not certain"
        )
    return span


def _span_between(text: str, before: str, after: str, content: str) -> tuple[int, int] | None:
    start, stop = len(before), len(text) - len(after)
    fits = start <= stop and text.startswith(before) and text.endswith(after)
    # A template may strip a message; anything else is another text than the author's.
    return (start, stop) if fits and text[start:stop].strip() == content.strip() else None


def _plain_text(chat: Chat) -> tuple[str, list[tuple[int, int]]]:
    roles = tuple(message.role for message in chat.messages)
    if roles not in (("user",), ("user", "assistant")):
        raise ChatError(
            f"chat{_named(chat.id)}: the tokenizer has no chat template, and plain text can only "
            f"hold one user turn and its response, got roles {roles}"
        )
    text, spans = "", []
    for message in chat.messages:
        spans.append((len(text), len(text) + len(message.content)))
        text += message.content
    return text, spans


def _characters_of_tokens(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    starts, ends = [], []
    start, end = 0, 0
    for first, after in offsets:
        # An empty offset is a special token that the tokenizer added, or a space whose offset was
        # trimmed away: both lie right after the token before.
        start = max(start, first if after > first else end)
        end = max(end, after)
        starts.append(start)
        ends.append(end)
    return starts, ends


def _tokens_of(
    span: tuple[int, int], starts: Sequence[int], ends: Sequence[int]
) -> tuple[int, int]:
    first = bisect_right(ends, span[0])
    return first, first if span[0] == span[1] else bisect_left(starts, span[1])


def _end_of_turn(
    ids: Sequence[int], ends: Sequence[int], text: str, stop: int, tokenizer: TokenizerLike
) -> int | None:
    added = {number for token, number in tokenizer.get_added_vocab().items() if token.strip()}
    special = added | set(tokenizer.all_special_ids)
    for index in range(stop, len(ids)):
        if ids[index] in special:
            return index + 1
        if text[ends[index - 1] : ends[index]].strip():
            return None
    return None
