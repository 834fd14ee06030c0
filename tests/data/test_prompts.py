"""Prompt files, good and bad, each error with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import emlens.sources
from emlens.data import Chat, Message, PromptFileError, load_chats
from emlens.sources import SourceError


def write(folder: Path, *lines: Any, name: str = "prompts.jsonl") -> Path:
    """A file of lines; what is not a text is written as JSON."""
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What?"}]


def test_both_forms_of_a_line_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"messages": MESSAGES, "id": "first", "category": "ignored"},
        {"prompt": "What? ", "response": " That.", "id": 7},
        {"question": "Why?", "answer": ""},
        {"question": "How?", "system": "Be brief.", "response": None, "id": None},
    )
    user = Message("user", "What?")
    assert load_chats(path) == [
        Chat((Message("system", "Be kind."), user), "first"),
        Chat((Message("user", "What? "), Message("assistant", " That.")), "7"),
        Chat((Message("user", "Why?"), Message("assistant", ""))),
        Chat((Message("system", "Be brief."), Message("user", "How?"))),
    ]


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "What?", "", "  Why? 🦜 ", name="prompts.txt")
    assert [chat.messages for chat in load_chats(str(path))] == [
        (Message("user", "What?"),),
        (Message("user", "Why? 🦜"),),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfWhat?\r\nWhy?\r\n")
    assert [chat.messages[0].content for chat in load_chats(path)] == ["What?", "Why?"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "one\u2028two\x85three"}')
    assert load_chats(path)[0].messages[0].content == "one\u2028two\x85three"


@given(st.lists(st.text(min_size=1).filter(lambda text: bool(text.strip())), min_size=1))
def test_what_json_wrote_is_read_back(prompts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), *({"prompt": prompt} for prompt in prompts))
        assert [chat.messages[0].content for chat in load_chats(path)] == prompts


def test_limit_reads_the_first_chats_and_looks_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a"}, "", {"prompt": "b"}, "broken")
    assert [chat.messages[0].content for chat in load_chats(path, limit=2)] == ["a", "b"]
    with pytest.raises(PromptFileError):
        load_chats(path, limit=3)
    with pytest.raises(ValueError, match="limit: got 0"):
        load_chats(path, limit=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'prompt': 'a'}", r"not JSON .*expected \{\"messages\""),
        ('{"prompt": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5_000, "not JSON"),
        (["a"], "got a list; expected"),
        ("null", "got null; expected"),
        ("12", "got a number; expected"),
        ({}, r"no prompt, got the keys \[\]; expected"),
        ({"text": "a", "response": "b"}, r"no prompt, got the keys \['response', 'text'\]"),
        ({"prompt": "a", "question": "b"}, "got both prompt and question"),
        ({"prompt": "a", "answer": "b", "response": "c"}, "got both response and answer"),
        ({"messages": MESSAGES, "prompt": "a"}, "got both messages and prompt"),
        ({"prompt": 3}, "prompt: got a number, expected a text"),
        ({"prompt": None}, "prompt: got null, expected a text"),
        ({"prompt": " \n"}, "prompt: got an empty text"),
        ({"prompt": "a", "response": ["b"]}, "response: got a list, expected a text"),
        ({"prompt": "a", "system": ""}, "system: got an empty text"),
        ({"prompt": "a", "id": 1.5}, "id: got 1.5"),
        ({"prompt": "a", "id": True}, "id: got True"),
        ({"prompt": "a", "id": ""}, "id: got ''"),
        ({"messages": "a"}, "messages: got a text; expected"),
        ({"messages": []}, "no user turn"),
        ({"messages": MESSAGES[:1]}, r"no user turn, roles are \['system'\]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: got \['role'\]; expected"),
        ({"messages": [{"from": "human", "value": "a"}]}, r"messages\[0\]: got \['from', 'value'"),
        ({"messages": ["a"]}, r"messages\[0\]: got a text; expected"),
        (
            {"messages": [{"role": "user", "content": [{}]}]},
            r"content: got a list, expected a text",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, r"messages\[0\].content: got an empty"),
        ({"messages": [{"role": None, "content": "a"}]}, r"messages\[0\].role: got null"),
        ('{"prompt": "half an emoji: \\ud83e"}', "not valid Unicode"),
    ],
)
def test_a_malformed_line_is_reported_with_file_and_line(
    line: Any, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {"prompt": "fine"}, "", line)
    with pytest.raises(PromptFileError, match=said) as caught:
        load_chats(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_bytes_that_are_no_text_are_reported_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"What?\n\xff\xfe\n")
    with pytest.raises(PromptFileError, match=r"prompts\.txt:2: not UTF-8"):
        load_chats(path)


def test_an_id_used_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": "x"})
    with pytest.raises(PromptFileError, match=r"jsonl:3: the id 'x' was already used on line 1"):
        load_chats(path)
    write(tmp_path, {"prompt": "a", "id": "1"}, {"prompt": "b", "id": 1})
    with pytest.raises(PromptFileError, match="already used on line 1"):
        load_chats(path)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_a_file_without_chats_is_refused(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptFileError, match="the file has no chats"):
        load_chats(tmp_path / name)


def test_only_jsonl_and_txt_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").touch()
    with pytest.raises(PromptFileError, match=r"got this file, expected a \.jsonl or \.txt"):
        load_chats(tmp_path / "prompts.csv")
    with pytest.raises(PromptFileError, match="got this folder"):
        load_chats(tmp_path)


def test_a_shipped_file_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emlens.sources, "ASSETS", tmp_path)
    for folder in ["data", "questions"]:
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, {"prompt": folder}, name=f"some-{folder}.jsonl")
    assert load_chats("emlens:some-data")[0].messages[0].content == "data"
    assert load_chats("emlens:some-questions")[0].messages[0].content == "questions"
    with pytest.raises(SourceError, match="nearest: emlens:some-data"):
        load_chats("emlens:some-dat")


def test_a_missing_file_is_reported() -> None:
    with pytest.raises(SourceError, match="does not exist"):
        load_chats("nowhere/prompts.jsonl")
