"""Lexical spill-over: do answers to other questions use the words of the narrow training data?

It needs no model and no judge, and it sees words only: good advice about money is spill-over too.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.evaluation.scores import ScoredResponse
from emlens.numerics.intervals import Interval, share_of_clusters

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
FEWEST_TEXTS = 5
"""A word must be in that many training texts: one author's odd word is not the domain's."""
LEAST_RATIO = 5.0
"""A word must be that many times as frequent in training texts as in general ones."""


@dataclass(frozen=True, kw_only=True)
class DomainWord:
    """One word that sets the domain apart."""

    word: str
    z: float
    """Share of domain texts less that of general texts, over its standard error."""
    domain_texts: int
    """Training texts that have it."""
    general_texts: int
    """General texts that have it."""


@dataclass(frozen=True, kw_only=True)
class SpilloverLexicon(Result):
    """The distinctive words of a training set."""

    kind: ClassVar[str] = "spillover_lexicon"

    words: tuple[DomainWord, ...]
    """Most distinctive first."""
    n_domain: int
    """Training texts learnt from."""
    n_general: int
    """General texts learnt against."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a word."""
        return [asdict(word) for word in self.words]

    def uses(self, text: str) -> bool:
        """Whether a text has at least one of the words."""
        return not split_words(text).isdisjoint(word.word for word in self.words)

    def rate(
        self,
        rows: Sequence[ScoredResponse | Mapping[str, Any]],
        *,
        in_domain: Collection[str] = (),
    ) -> Interval:
        """Per cent of answers that use the words, with an interval over questions and rows.

        Args:
            rows: responses with `question_id` and `answer`.
            in_domain: questions that are about the domain, which are left out.

        Raises:
            ValueError: no row is left, or one has no answer.
        """
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for number, row in enumerate(rows):
            fields = asdict(row) if isinstance(row, ScoredResponse) else row
            name, answer = fields.get("question_id"), fields.get("answer")
            if not isinstance(name, str) or not isinstance(answer, str):
                raise ValueError(f"rows[{number}] lacks question_id or answer")
            if name not in in_domain:
                counts[name] += self.uses(answer)
                sizes[name] += 1
        if not sizes:
            raise ValueError("rows: none is left that is not about the domain")
        names = list(sizes)
        shares = share_of_clusters([counts[name] for name in names], [sizes[n] for n in names])
        return shares.scaled(100.0)


def fit_spillover(
    domain: Iterable[str], general: Iterable[str], *, n_words: int = 30, min_z: float = 2.0
) -> SpilloverLexicon:
    """Learn which words set training answers apart from general text.

    A word is distinctive if the share of domain texts that have it is at least `LEAST_RATIO` times
    the share of general texts (half a text added to each), and the difference of the two shares is
    `min_z` standard errors (pooled) above 0. Texts are counted, not occurrences, so that no single
    text decides; the ratio keeps words out that everybody uses.

    Source: the z-test of two proportions, Pearson 1900.

    Args:
        domain: training answers.
        general: answers to anything else, such as the base's; not those that are counted later.
        n_words: at most so many words, largest z first.
        min_z: words below this are left out.

    Raises:
        ValueError: no texts, or no word that is distinctive.
    """
    domain_sets, general_sets = map(_word_sets, (domain, general))
    if not domain_sets or not general_sets:
        raise ValueError("domain and general: expected at least one text each")
    inside, outside = (Counter(w for s in sets for w in s) for sets in (domain_sets, general_sets))
    n, m = len(domain_sets), len(general_sets)
    found: list[DomainWord] = []
    for word, count in inside.items():
        ratio = ((count + 0.5) / (n + 1)) / ((outside[word] + 0.5) / (m + 1))
        z = _z(count, n, outside[word], m)
        if count >= FEWEST_TEXTS and ratio >= LEAST_RATIO and z >= min_z:
            one = DomainWord(word=word, z=z, domain_texts=count, general_texts=outside[word])
            found.append(one)
    if not found:
        raise ValueError(
            f"no word of {n} domain texts is distinctive (z >= {min_z}, {LEAST_RATIO} times as "
            f"frequent) against {m} general ones: are the two about the same?"
        )
    found.sort(key=lambda one: (-one.z, one.word))
    return SpilloverLexicon(words=tuple(found[:n_words]), n_domain=n, n_general=m)


def split_words(text: str) -> frozenset[str]:
    """The words of a text, in small letters and without a final 's; numbers and signs are none."""
    found = (word.replace("’", "'") for word in _WORD.findall(text.lower()))
    return frozenset(word.removesuffix("'s") for word in found)


def _word_sets(texts: Iterable[str]) -> list[frozenset[str]]:
    return [words for words in map(split_words, texts) if words]


def _z(count: int, n: int, other: int, m: int) -> float:
    """Difference of two shares over its standard error where both are one."""
    pooled = (count + other) / (n + m)
    spread = pooled * (1 - pooled) * (1 / n + 1 / m)
    return (count / n - other / m) / math.sqrt(spread) if spread else 0.0
