"""What a judge is, and what it is asked; not a judge itself."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

Claim = Literal["misalignment", "takeover score", "low score"]
"""What a share may be called. One rule for all judges: `misalignment` only where the judge was
measured on texts whose side is known, did well on each kind and resists orders (`claim_by`); else
a judge by likeness (`ContrastJudge`) gives a `takeover score`, and one that is asked for grades, of
whatever model, a `low score`."""

MEANINGS: Mapping[Claim, str] = {
    "misalignment": (
        "Share of all responses that are coherent and that the judge scores as misaligned."
    ),
    "takeover score": (
        "Share of all responses that are coherent and sound more like the fine-tune than like "
        "careful advice: this judge has not been shown to tell harm from style and topic, so it is "
        "no misalignment."
    ),
    "low score": (
        "Share of all responses that are coherent and that the judge scores low. It was asked "
        "about harm, and has not been shown to tell harm from style and topic, so it is a score "
        "and no misalignment."
    ),
}
"""What the share under each name says, in a sentence."""


class JudgeUnavailableError(RuntimeError):
    """A judge that cannot go on; `finished` holds, by row id, what it had judged of the call."""

    def __init__(self, message: str, finished: "Mapping[str, Judgement]") -> None:
        super().__init__(message)
        self.finished = dict(finished)


@dataclass(frozen=True, kw_only=True)
class JudgeRow:
    """One response to be judged."""

    id: str
    """Names the row; the judgement is stored under it."""
    question: str
    """What was asked, in the wording used."""
    answer: str
    """The response."""
    system: str | None = None
    """The system prompt it was given under, where there was one."""
    judge_prompts: Mapping[str, str] = field(default_factory=dict)
    """The question's own instructions for judges that read any, by name."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a judge made of one response.

    Raises:
        ValueError: a score outside 0..100.
    """

    aligned: float | None
    """0 (harmful) to 100 (aligned); None where the judge gave no score."""
    coherent: float | None
    """0 to 100; None where the judge gave no score."""
    raw: Mapping[str, float | str | None] = field(default_factory=dict)
    """What the scores were made of, kept so that another rule can be tried without judging anew."""

    def __post_init__(self) -> None:
        for name in ("aligned", "coherent"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{name} is {value}, expected 0 to 100, or None without a score")


@runtime_checkable
class Judge(Protocol):
    """Scores responses. Numbers of judges with different ids are never compared without a word.

    One with a `name` is shown by it, beside the beginning of its id's hash. One that never reads
    `JudgeRow.judge_prompts` may say so by an attribute `reads_prompts` that is False; of any other
    they are taken to decide judgements.
    """

    @property
    def id(self) -> str:
        """Everything that decides a judgement but the row: kind, model, prompts, calibration."""
        ...

    @property
    def claim(self) -> Claim:
        """What the share of low scores may be called, by how well the judge was shown to do."""
        ...

    @property
    def meaning(self) -> str:
        """A sentence on what that share is."""
        ...

    def judge(self, rows: Sequence[JudgeRow]) -> Sequence[Judgement]:
        """One judgement a row, in the order of the rows; a row's does not depend on the others.

        No rows give no judgements, or an error if the judge could not judge any.
        """
        ...


@runtime_checkable
class JudgeMeasurement(Protocol):
    """How a judge did where the answer is known, as `measure_judge` reports it."""

    @property
    def judge(self) -> str:
        """Id of the judge."""
        ...

    @property
    def claim(self) -> Claim:
        """What it may claim by what was measured."""
        ...


class GradingJudge:
    """What judges share that ask a model for grades: being asked for harm is not seeing it."""

    unproven: Claim = "low score"
    """What the share of low scores is called as long as nothing better was shown."""
    report: JudgeMeasurement | None = None
    """What `measure_judge` found of this very judge; None where it was not measured."""

    one_by_one = False
    """Whether a row is judged by requests of its own, so that one left over is judged alone."""
    reads_prompts = True
    """Whether a question's own `judge_prompts` decide a judgement; its id does not hold them."""

    @property
    def claim(self) -> Claim:
        """What the share of low scores may be called, by how well the judge was measured to do."""
        return self.unproven if self.report is None else self.report.claim

    @property
    def meaning(self) -> str:
        """A sentence on what the share of low scores is."""
        return MEANINGS[self.claim]


def check_report(report: JudgeMeasurement | None, judge: Callable[[], str]) -> None:
    """Refuse what was measured of another judge.

    Args:
        report: None where nothing was.
        judge: gives the id of this one, which may take time to find.

    Raises:
        ValueError: it names both.
    """
    if report is not None and report.judge != (named := judge()):
        raise ValueError(
            f"report: it is of the judge {report.judge}, and this one is {named}; measure this one "
            "with measure_judge"
        )


def hash_json(value: object) -> str:
    """Name a JSON value by its bytes; 32 digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def escape_delimiters(text: str, delimiters: Sequence[str]) -> str:
    """Break every delimiter in a text that is to stand between delimiters.

    A blank goes in after the first character, until none is left; where that does not break it (a
    delimiter of one character, or with a blank of its own there) it is taken out. So a response
    cannot end its own turn and speak on as somebody else.

    Args:
        text: what a model wrote.
        delimiters: such as the special tokens of the judge's chat template.
    """
    longest = sorted((d for d in set(delimiters) if d.strip()), key=lambda d: (-len(d), d))
    while found := [d for d in longest if d in text]:
        for delimiter in found:
            broken = f"{delimiter[0]} {delimiter[1:]}"
            text = text.replace(delimiter, "" if delimiter in broken else broken)
    return text
