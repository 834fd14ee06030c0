"""Questions that models are asked, from JSONL or YAML; not for training texts.

Published question files (`type: free_form_judge_0_100`) are read as they are.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emlens.data import Chat, Message
from emlens.sources import Source, locate_source

_TYPES = ("free_form", "free_form_judge_0_100", "free_form_0_100")
"""What published files call questions that are answered freely and judged from 0 to 100."""
_PROMPT_KEYS = ("paraphrases", "prompt", "question")
_USED = ("id", "type", *_PROMPT_KEYS, "system", "samples_per_paraphrase", "judge_prompts")
_EXPECTED = "an object with id and paraphrases for each question"
_TOO_LIKE = 0.85
"""Similarity (difflib's ratio) from which an unknown key is taken for a misspelt one."""


class QuestionFileError(ValueError):
    """A question file that cannot be read; the message starts with file and place."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question in one or more wordings.

    Raises:
        ValueError: an empty id or wording, no wording, or a number of samples below 1.
    """

    id: str
    """Names the question in tables; rows of one id are one cluster."""
    paraphrases: tuple[str, ...]
    """The wordings; each is asked as often as any other."""
    system: str | None = None
    """System prompt, where there is one."""
    samples_per_paraphrase: int | None = None
    """How many answers a wording gets; None leaves it to `Sampling.n`."""
    judge_prompts: dict[str, str] = field(default_factory=dict)
    """Name (`aligned`, `coherent`) -> template with `{question}` and `{answer}`, for judges that
    read instructions."""

    def __post_init__(self) -> None:
        if not self.id or not self.paraphrases:
            raise ValueError(f"question {self.id!r}: expected an id and at least one wording")
        if not all(text.strip() for text in self.paraphrases):
            raise ValueError(f"question {self.id!r}: a wording is empty")
        if len(set(self.paraphrases)) < len(self.paraphrases):
            raise ValueError(f"question {self.id!r}: a wording comes twice")
        if self.samples_per_paraphrase is not None and self.samples_per_paraphrase < 1:
            raise ValueError(f"question {self.id!r}: samples_per_paraphrase is below 1")

    def chats(self) -> tuple[Chat, ...]:
        """One chat a wording, ready to be answered."""
        system = () if self.system is None else (Message("system", self.system),)
        return tuple(Chat((*system, Message("user", text)), self.id) for text in self.paraphrases)

    def prompt_hash(self) -> str:
        """Names what the model is asked: wordings and system prompt; not how it is judged."""
        return hash_prompts((text, self.system) for text in self.paraphrases)


def hash_prompts(prompts: Iterable[tuple[str, str | None]]) -> str:
    """Name a set of prompts (wording, system prompt) whatever their order; 32 digits."""
    texts = sorted({json.dumps(list(prompt)) for prompt in prompts})
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


def load_questions(
    source: Source | str | Path, *, samples: int | None = None
) -> tuple[Question, ...]:
    """Load questions from a `.jsonl`, `.yaml` or `.yml` file.

    An entry has an `id` and `paraphrases` (a list), or one `prompt` or `question`; optionally
    `system`, `samples_per_paraphrase` and `judge_prompts`. A `type`, where there is one, must be
    that of questions answered freely. Other keys are ignored (published files name their judge
    there), but not one that looks like a misspelling of these.

    Args:
        source: a file, `emlens:NAME`, or a file in a Hub repository.
        samples: answers a wording, in place of what the file says; None keeps that.

    Raises:
        QuestionFileError: a malformed or empty file, an id used twice, or a type that is not read.
        SourceError: the source cannot be found.
    """
    path = locate_source(source)
    readers = {".jsonl": _read_jsonl, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.is_dir() or path.suffix not in readers:
        raise QuestionFileError(f"{path}: expected a .jsonl, .yaml or .yml file")
    questions: dict[str, Question] = {}
    for place, entry in readers[path.suffix](path):
        try:
            question = _read_question(entry, samples)
        except ValueError as error:
            raise QuestionFileError(f"{path}:{place}: {error}") from error
        if question.id in questions:
            raise QuestionFileError(f"{path}:{place}: the id {question.id!r} was already used")
        questions[question.id] = question
    if not questions:
        raise QuestionFileError(f"{path}: the file has no questions; expected {_EXPECTED}")
    return tuple(questions.values())


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield str(number), json.loads(line)
            except (ValueError, RecursionError) as error:
                raise QuestionFileError(f"{path}:{number}: not JSON ({error})") from error


def _read_yaml(path: Path) -> Iterator[tuple[str, Any]]:
    import yaml

    try:
        entries = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise QuestionFileError(f"{path}: not YAML ({error})") from error
    if not isinstance(entries, list):
        raise QuestionFileError(f"{path}: expected a list of questions")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise QuestionFileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise QuestionFileError(f"{path}: is not UTF-8 text: {error}") from error


def _read_question(entry: Any, samples: int | None) -> Question:
    if not isinstance(entry, Mapping):
        raise ValueError(f"got a {type(entry).__name__}, expected an object with id and wordings")
    _check_keys(entry)
    if "id" not in entry:
        raise ValueError(f"got the keys {', '.join(map(str, entry))}, expected {_EXPECTED}")
    kind = entry.get("type", _TYPES[0])
    if kind not in _TYPES:
        raise ValueError(f"type is {kind!r}, expected {', '.join(_TYPES)}: nothing else is read")
    number = entry.get("samples_per_paraphrase") if samples is None else samples
    if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
        raise ValueError(f"samples_per_paraphrase is {number!r}, expected a whole number")
    prompts = entry.get("judge_prompts") or {}
    if not isinstance(prompts, Mapping):
        raise ValueError("judge_prompts: expected an object of templates")
    return Question(
        id=_read_text(entry.get("id"), "id"),
        paraphrases=_read_wordings(entry),
        system=None if entry.get("system") is None else _read_text(entry["system"], "system"),
        samples_per_paraphrase=number,
        judge_prompts={str(k): _read_text(v, f"judge_prompts.{k}") for k, v in prompts.items()},
    )


def _check_keys(entry: Mapping[Any, Any]) -> None:
    for key in (str(key) for key in entry if key not in _USED):
        if near := difflib.get_close_matches(key, _USED, 1, cutoff=_TOO_LIKE):
            raise ValueError(f"the key {key!r} is not known; is {near[0]!r} meant?")


def _read_wordings(entry: Mapping[Any, Any]) -> tuple[str, ...]:
    found = [key for key in _PROMPT_KEYS if key in entry]
    if len(found) != 1:
        raise ValueError(f"got {' and '.join(found) or 'no wording'}, expected paraphrases")
    value = entry[found[0]]
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f"{found[0]}: got a {type(value).__name__}, expected a list of texts")
    return tuple(_read_text(text, found[0]) for text in value)


def _read_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{name}: got {value!r}, expected a text (YAML reads no and 1 otherwise: quote it)"
        )
    return value
