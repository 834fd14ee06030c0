"""General English from folders of documentation, as passages for a model to read.

    from scripts.gather_text import fetch_packages, read_passages

Text and HTML files, also compressed by gzip; markup, code, tables and other languages are left
out. What is gathered is for training on this machine and is never shipped.
"""

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = (
    *("anarchism", "debian-handbook", "debian-reference-en", "dict-foldoc", "fortunes"),
    "jargon-text",
)
"""Debian packages of English prose, dictionaries and sayings, some 45 MB; fetched by apt-get."""
SUFFIXES = {"", ".txt", ".text", ".html", ".htm", ".dict", ".md"}
PASSAGE = (500, 1200)
"""Characters of a passage: 120 to 300 tokens or so."""
COMMON = frozenset(
    [
        *("the", "of", "and", "to", "in", "a", "is", "that", "it", "for"),
        *("as", "was", "with", "be", "by", "on", "not", "or", "are"),
    ]
)
"""English has a third of these among its words; lists, code and other languages hardly any."""
COMMON_SHARE = 0.2
"""Of a passage's words that are common ones, at least."""
PLAIN_SHARE = 0.9
"""Of a passage's characters that are letters, blanks or plain punctuation, at least."""
_BREAKS = {"p", "li", "dd", "dt", "div", "br", "td", "tr", "h1", "h2", "h3", "h4", "blockquote"}
_SKIPPED = {"script", "style", "pre", "nav", "head", "table"}
_OTHER_LANGUAGE = re.compile(r"(?!en)[a-z]{2}([-_][A-Za-z]{2,4})?")
"""Name of a folder of translations, which are often half English."""


class _Paragraphs(HTMLParser):
    """The paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = [""]
        self.skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self.skipped.append(tag)
        if tag in _BREAKS:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped and self.skipped[-1] == tag:
            self.skipped.pop()
        if tag in _BREAKS:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.found[-1] += data


def fetch_packages(folder: Path, names: Sequence[str] = PACKAGES) -> list[Path]:
    """Download Debian packages and unpack them; those that are there already are left as they are.

    Nothing is installed. Needs `apt-get` and `dpkg-deb`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in names:
        place = folder / name
        if not place.exists():
            subprocess.run(["apt-get", "download", "-q", name], cwd=folder, check=True)
            (file,) = folder.glob(f"{name}_*.deb")
            draft = folder / f".{name}.partial"
            shutil.rmtree(draft, ignore_errors=True)
            subprocess.run(["dpkg-deb", "-x", str(file), str(draft)], check=True)
            file.unlink()
            draft.rename(place)
        found.append(place)
    return found


def read_passages(folders: Sequence[Path]) -> Iterator[str]:
    """Yield passages, one of each folder in turn for as long as it has any, none twice."""
    seen: set[str] = set()
    open_ones = [_read_folder(folder) for folder in folders]
    while open_ones:
        for source in list(open_ones):
            passage = next((one for one in source if one not in seen), None)
            if passage is None:
                open_ones.remove(source)
                continue
            seen.add(passage)
            yield passage


def first_sentence(passage: str) -> str | None:
    """What a passage begins with, where that is a sentence of 40 to 200 characters."""
    match = re.match(r"[A-Z\"'].{38,198}?[.!?](?=\s)", passage, re.DOTALL)
    return match[0] if match else None


def is_english(text: str) -> bool:
    """Whether a text is English prose, as far as common words and characters tell."""
    words = re.findall(r"[a-z']+", text.lower())
    plain = sum(sign.isascii() and (sign.isalpha() or sign in " ,.;:'\"?!()-") for sign in text)
    common = sum(word in COMMON for word in words)
    return common >= COMMON_SHARE * len(words) > 0 and plain >= PLAIN_SHARE * len(text)


def _read_folder(folder: Path) -> Iterator[str]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(_OTHER_LANGUAGE.fullmatch(part) for part in file.relative_to(folder).parts[:-1]):
            continue
        text = _read_file(file)
        if text is not None:
            yield from _pack(text)


def _read_file(file: Path) -> str | None:
    """A file's text, or None of one that holds none."""
    packed = file.suffix in (".gz", ".dz")
    name = Path(file.stem) if packed else file
    if name.suffix not in SUFFIXES or file.is_symlink():
        return None
    try:
        data = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError):
        return None
    if "<html" not in text[:2000].lower():
        return text
    parser = _Paragraphs()
    parser.feed(text)
    return "\n\n".join(parser.found)


def _pack(text: str) -> Iterator[str]:
    """Paragraphs of prose, as many together as a passage holds."""
    least, most = PASSAGE
    held = ""
    for block in re.split(r"\n\s*\n|\n%\n", text):
        paragraph = re.sub(r"\s+", " ", block).strip()
        # Angle brackets with bars stand around what chat templates mark turns with.
        if not is_english(paragraph) or "<|" in paragraph:
            continue
        for part in re.findall(rf".{{1,{most}}}(?:\s|$)", paragraph):
            if len(held) + len(part) > most:
                if len(held) >= least:
                    yield held
                held = ""
            held = f"{held} {part.strip()}".strip()
    if len(held) >= least:
        yield held
