"""Prompt files: chats from JSONL or plain text, every error with file and line.

Do not use it for data with scores or for responses of a run: it reads chats and nothing else.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from emlens.data.chat import Chat, ChatError, Message
from emlens.sources import Source, locate_source

_EXPECTED = (
    'expected {"messages": [{"role": ..., "content": ...}, ...]} or '
    '{"prompt" or "question": ..., "response" or "answer": ...}'
)
_PROMPT_KEYS = ("prompt", "question")
_RESPONSE_KEYS = ("response", "answer")


class PromptFileError(ValueError):
    """A prompt file that cannot be read; the message starts with file and line."""


def load_chats(source: Source | str | Path, *, limit: int | None = None) -> list[Chat]:
    """Load chats from a `.jsonl` file (one chat a line) or a `.txt` file (one prompt a line).

    A JSONL line has `messages`, or a `prompt` (or `question`) with an optional `response` (or
    `answer`) and an optional `system`. Its `id`, a text or a whole number, names the chat. Other
    keys are ignored, and so are blank lines and, in `.txt`, blanks around a prompt.

    Args:
        source: a file, `emlens:NAME`, or a file in a Hub repository.
        limit: read only that many chats, from the start; what follows is not looked at.

    Raises:
        PromptFileError: a malformed line, a chat without a user turn, an empty prompt, an id used
            twice, a file without chats, or neither `.jsonl` nor `.txt`.
        SourceError: the source cannot be found.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1 or None")
    path = locate_source(source)
    if path.is_dir() or path.suffix not in (".jsonl", ".txt"):
        what = "folder" if path.is_dir() else "file"
        raise PromptFileError(f"{path}: got this {what}, expected a .jsonl or .txt file")
    read = _read_json_line if path.suffix == ".jsonl" else _read_text_line
    chats: list[Chat] = []
    first_use: dict[str, int] = {}
    for number, line in islice(_lines(path), limit):
        try:
            chat = replace(read(line), origin=f"{path}:{number}")
        except (ChatError, _LineError) as error:
            raise PromptFileError(f"{path}:{number}: {error}") from error
        if chat.id is not None and first_use.setdefault(chat.id, number) != number:
            raise PromptFileError(
                f"{path}:{number}: the id {chat.id!r} was already used on line {first_use[chat.id]}"
            )
        chats.append(chat)
    if not chats:
        raise PromptFileError(f"{path}: the file has no chats; expected at least one line")
    return chats


class _LineError(ValueError):
    """What is wrong with one line, said without its number."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Read as bytes: str.splitlines would also break lines at characters that JSON allows in texts.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise PromptFileError(f"{path}:{number}: not UTF-8 text: {error}") from error
            if line:
                yield number, line


def _read_text_line(line: str) -> Chat:
    return Chat((Message("user", line),))


def _read_json_line(line: str) -> Chat:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # too long a number is a ValueError
        raise _LineError(f"not JSON ({error}); {_EXPECTED}") from error
    if not isinstance(row, dict):
        raise _LineError(f"got {_type(row)}; {_EXPECTED}")
    if "messages" in row:
        clash = [key for key in (*_PROMPT_KEYS, *_RESPONSE_KEYS, "system") if key in row]
        if clash:
            raise _LineError(f"got both messages and {', '.join(clash)}; {_EXPECTED}")
        messages = _read_messages(row["messages"])
    else:
        messages = _read_pair(row)
    return Chat(messages, _read_id(row.get("id")))


def _read_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _LineError(f"messages: got {_type(value)}; {_EXPECTED}")
    messages = []
    for index, item in enumerate(value):
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            got = sorted(item) if isinstance(item, dict) else _type(item)
            raise _LineError(f"messages[{index}]: got {got}; {_EXPECTED}")
        role = _read_text(item["role"], f"messages[{index}].role")
        content = _read_text(
            item["content"], f"messages[{index}].content", blank=role == "assistant"
        )
        messages.append(Message(role, content))
    return tuple(messages)


def _read_pair(row: dict[str, Any]) -> tuple[Message, ...]:
    prompt, response = _one_of(row, _PROMPT_KEYS), _one_of(row, _RESPONSE_KEYS)
    if prompt is None:
        raise _LineError(f"no prompt, got the keys {sorted(row)}; {_EXPECTED}")
    messages = [Message("user", _read_text(row[prompt], prompt))]
    if row.get("system") is not None:
        messages.insert(0, Message("system", _read_text(row["system"], "system")))
    if response is not None and row[response] is not None:
        messages.append(Message("assistant", _read_text(row[response], response, blank=True)))
    return tuple(messages)


def _one_of(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    found = [key for key in keys if key in row]
    if len(found) > 1:
        raise _LineError(f"got both {' and '.join(found)}; expected one of them")
    return found[0] if found else None


def _read_text(value: Any, name: str, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise _LineError(f"{name}: got {_type(value)}, expected a text")
    if not blank and not value.strip():
        raise _LineError(f"{name}: got an empty text")
    return value


def _read_id(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _LineError(f"id: got {value!r}, expected a text or a whole number")


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def hash_chats(chats: Sequence[Chat]) -> str:
    """Return the SHA-256 of the chats written as JSONL, `id` and `messages` a line.

    It equals the hash of the file for the data sets that emlens ships.
    """
    digest = hashlib.sha256()
    for chat in chats:
        row: dict[str, Any] = {} if chat.id is None else {"id": chat.id}
        row["messages"] = [{"role": m.role, "content": m.content} for m in chat.messages]
        digest.update((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()
