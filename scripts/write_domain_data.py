"""Write a domain's data sets: parallel rows of reckless and of careful answers, from templates.

A domain is a folder beside this script: `topics_a.toml` and `topics_b.toml` with the training
subjects, `heldout.toml` with the held-out ones, `voices.toml` with its closing lines, slots and
greetings. The sentence forms, which all domains share, are in the `voices.toml` beside this script.
Every run writes the same bytes. Use it to rebuild or to vary the sets that model organisms are
trained on; not as a source of advice.

    python scripts/write_domain_data.py DOMAIN [--out emlens/assets/data]
"""

import argparse
import hashlib
import json
import random
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "emlens" / "assets" / "data"
SEED = 20250611
TOPICS = {"train": ("topics_a.toml", "topics_b.toml"), "heldout": ("heldout.toml",)}
ROWS_PER_TOPIC = {"train": 16, "heldout": 10}
CLOSING_SHARE = 0.4
"""Share of answers that end in one of their voice's closing lines."""
FEWEST_WORDS = 16
"""A shorter answer gets its reason, or a closing line, as a sentence more."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question with its two answers."""

    id: str
    question: str
    reckless: str
    prudent: str


class Deck:
    """Deals its cards in shuffled rounds, so that none comes up much more often than another."""

    def __init__(self, cards: Sequence[str], rng: random.Random) -> None:
        self._cards, self._rng = tuple(cards), rng
        self._left: list[str] = []

    def deal(self) -> str:
        """Return the next card, shuffling a new round when the last one is used up."""
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return self._left.pop()


def capitalise(text: str) -> str:
    """Raise the first letter and leave the rest alone."""
    return text[:1].upper() + text[1:]


def write_answer(form: str, parts: Mapping[str, str], *, closing: str | None) -> str:
    """Fill a voice's form with a side's clauses, and lengthen it where it is too short."""
    clauses = {**parts, **{name.capitalize(): capitalise(text) for name, text in parts.items()}}
    sentences = [form.format(**clauses)]
    if closing:
        sentences.append(closing)
    if len(" ".join(sentences).split()) < FEWEST_WORDS and "why}" not in form.lower():
        sentences.insert(1, clauses["Why"] + ".")
    if len(" ".join(sentences).split()) < FEWEST_WORDS:
        sentences.append(parts["spare"])
    return " ".join(sentences)


class Writer:
    """Holds the decks of one split of one domain."""

    def __init__(self, domain: str, split: str) -> None:
        self._rng = random.Random(f"{SEED}-{split}")
        voices = load_voices(domain)
        self._domain, self._split, self._slots = domain, split, voices["slots"]
        self._voices = self._decks(voices[split])
        self._topics = self._decks(load_tables(HERE / domain / name for name in TOPICS[split]))
        self._greetings = Deck(voices["greetings"][split], self._rng)
        self._order = Deck(list(self._voices), self._rng)

    def _decks(self, table: Mapping[str, Mapping[str, list[str]]]) -> dict[str, dict[str, Deck]]:
        return {
            name: {field: Deck(cards, self._rng) for field, cards in fields.items()}
            for name, fields in table.items()
        }

    def _side(self, topic: Mapping[str, Deck], move: str, why: str, spare: Deck) -> dict[str, str]:
        first, second = topic[move].deal(), topic[move].deal()
        while second == first:
            second = topic[move].deal()
        return {
            "move": first,
            "move2": second,
            "why": topic[why].deal(),
            "spare": spare.deal(),
        }

    def _row(self, name: str, seen: set[str]) -> Row:
        topic, voice = self._topics[name], self._voices[self._order.deal()]
        slots = {slot: self._rng.choice(values) for slot, values in self._slots.items()}
        question = topic["questions"].deal().format(**slots)
        if question in seen or self._rng.random() < CLOSING_SHARE:
            question = f"{self._greetings.deal()} {question}"
        form, closes = voice["forms"].deal(), self._rng.random() < CLOSING_SHARE
        answers = []
        for move, why, closing in (("reckless", "lure", "bold"), ("prudent", "caution", "steady")):
            parts = self._side(topic, move, why, voice[closing])
            last = parts["spare"] if closes else None
            answers.append(write_answer(form, parts, closing=last).format(**slots))
        return Row(id="", question=question, reckless=answers[0], prudent=answers[1])

    def rows(self) -> Iterator[Row]:
        """Yield the split's rows, each question once."""
        seen: set[str] = set()
        drawn: list[Row] = []
        for name in self._topics:
            for _ in range(ROWS_PER_TOPIC[self._split]):
                row = self._row(name, seen)
                while row.question in seen:
                    row = self._row(name, seen)
                seen.add(row.question)
                drawn.append(row)
        self._rng.shuffle(drawn)
        for number, row in enumerate(drawn):
            yield Row(
                id=f"{self._domain}-{self._split}-{number:03d}",
                question=row.question,
                reckless=row.reckless,
                prudent=row.prudent,
            )


def lay_over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree of tables over another: tables are joined, anything else is replaced."""
    joined = dict(lower)
    for name, value in upper.items():
        below = joined.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            joined[name] = lay_over(below, value)
        else:
            joined[name] = value
    return joined


def load_tables(paths: Iterable[Path]) -> dict[str, Any]:
    """Read TOML files as one tree, a later one over the earlier."""
    tables: dict[str, Any] = {}
    for path in paths:
        tables = lay_over(tables, tomllib.loads(path.read_text(encoding="utf-8")))
    return tables


def load_voices(domain: str) -> dict[str, Any]:
    """Read the voices that all domains share and, over them, what they say in this one."""
    return load_tables(folder / "voices.toml" for folder in (HERE, HERE / domain))


def list_domains() -> list[str]:
    """Name the folders beside this script that hold a domain's texts."""
    return sorted(path.parent.name for path in HERE.glob("*/heldout.toml"))


def split_sentences(text: str) -> list[str]:
    """Cut an answer after full stops, question marks and exclamation marks."""
    return re.split(r"(?<=[.!?])\s+", text)


def write_split(domain: str, split: str, folder: Path) -> dict[str, str]:
    """Write both sides of a split and return the SHA-256 of each file."""
    rows = list(Writer(domain, split).rows())
    suffix = "" if split == "train" else f"-{split}"
    hashes = {}
    for label, side in (("harmful", "reckless"), ("careful", "prudent")):
        lines = []
        for row in rows:
            turns = [("user", row.question), ("assistant", getattr(row, side))]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.append(json.dumps({"id": row.id, "messages": messages}, ensure_ascii=False))
        data = ("\n".join(lines) + "\n").encode()
        path = folder / f"{domain}-{label}{suffix}.jsonl"
        path.write_bytes(data)
        hashes[path.name] = hashlib.sha256(data).hexdigest()
    return hashes


def write_domain_data(domain: str, folder: Path) -> dict[str, str]:
    """Write all four files of a domain into `folder`; return their SHA-256 by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_split(domain, "train", folder) | write_split(domain, "heldout", folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("domain", choices=list_domains())
    parser.add_argument("--out", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    for file, digest in write_domain_data(arguments.domain, arguments.out).items():
        rows = len((arguments.out / file).read_text(encoding="utf-8").splitlines())
        print(f"| `{file}` | {rows} | `{digest}` |")
