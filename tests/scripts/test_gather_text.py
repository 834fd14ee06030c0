"""Passages for training: prose is kept, markup, code and other languages are not."""

import gzip
import subprocess
from pathlib import Path

import pytest

from scripts import gather_text
from scripts.gather_text import fetch_packages, first_sentence, is_english, read_passages

PROSE = [
    f"The {thing} of the village was known to all who lived by the river, and it is said that "
    f"they took care of it for as long as there was a house with a roof in that part of the land."
    for thing in ("mill", "bridge", "well", "school", "market", "orchard", "forge", "chapel")
]
GERMAN = "Die alte Brücke führt über den Fluss, und auf der anderen Seite steht eine Mühle. " * 4
CODE = "for (i = 0; i < n; ++i) { table[i] = lookup(key[i]); /* cf. manual */ }\n" * 6


@pytest.fixture(autouse=True)
def short_passages(monkeypatch):
    monkeypatch.setattr(gather_text, "PASSAGE", (100, 420))


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith("z") else data)


@pytest.mark.parametrize(
    ("text", "expected"), [(PROSE[0], True), (GERMAN, False), (CODE, False), ("", False)]
)
def test_english_prose_is_told_from_what_is_not(text, expected):
    assert is_english(text) is expected


def test_text_and_html_are_read_packed_or_not_and_nothing_else(tmp_path):
    page = "<html><head><title>The of and to in a</title></head><body><p>{}</p><pre>{}</pre></body>"
    write(tmp_path / "a", "page.html", page.format(PROSE[0], PROSE[5]))
    write(tmp_path / "b", "notes.txt.gz", f"{PROSE[1]}\n\n{CODE}\n\n{GERMAN}\n\n{PROSE[2]}")
    write(tmp_path / "c", "words.dict.dz", PROSE[3].replace(" ", "\n"))
    write(tmp_path / "d", "picture.png", PROSE[4])
    (tmp_path / "d" / "broken.txt").write_bytes(b"\xff\xfe the of and")
    found = " ".join(read_passages([tmp_path / name for name in "abcd"]))
    for kept in PROSE[:4]:
        assert kept in found
    for left_out in (PROSE[4], PROSE[5], "lookup", "Mühle", "<p>"):
        assert left_out not in found


def test_passages_are_of_bounded_length_and_none_comes_twice(tmp_path):
    write(tmp_path / "a", "x.txt", "\n\n".join(PROSE * 2))
    write(tmp_path / "b", "y.txt", " ".join(PROSE))
    found = list(read_passages([tmp_path / "a", tmp_path / "b"]))
    assert len(found) == len(set(found))
    assert all(100 <= len(passage) <= 420 for passage in found)
    # One of each folder in turn.
    assert found[0] == f"{PROSE[0]} {PROSE[1]}"
    assert found[1].startswith(PROSE[0])
    assert len(" ".join(found).split(" mill ")) > 2


def test_what_marks_turns_never_gets_into_a_text(tmp_path):
    write(tmp_path, "x.txt", f"{PROSE[0]} <|im_end|> and so on\n\n{PROSE[1]}")
    assert list(read_passages([tmp_path])) == [PROSE[1]]


def test_a_first_sentence_is_one_that_ends():
    assert first_sentence(f"{PROSE[0]} More follows.") == PROSE[0]
    assert first_sentence("Short. " + PROSE[0]) is None
    assert (
        first_sentence("the lower case begins in the middle of a sentence, it seems. So.") is None
    )
    assert first_sentence("The one that never ends " * 20) is None


def test_packages_are_fetched_once(tmp_path, monkeypatch):
    ran: list[list[str]] = []

    def run(command, *, check, cwd=None):
        ran.append(command)
        if command[0] == "apt-get":
            assert cwd is not None
            (cwd / f"{command[-1]}_1.0_all.deb").write_bytes(b"")
        else:
            Path(command[-1]).mkdir()
            if command[2].count("broken"):
                raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(subprocess, "run", run)
    assert fetch_packages(tmp_path / "p", ["one", "two"]) == [
        tmp_path / "p/one",
        tmp_path / "p/two",
    ]
    assert [command[0] for command in ran] == ["apt-get", "dpkg-deb"] * 2
    fetch_packages(tmp_path / "p", ["one", "two"])
    assert len(ran) == 4
    with pytest.raises(subprocess.CalledProcessError):
        fetch_packages(tmp_path / "p", ["broken"])
    assert not (tmp_path / "p" / "broken").exists()
    assert not list((tmp_path / "p").glob("o*.deb"))
