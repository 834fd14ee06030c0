"""An evaluation as a result: who answered what under which change, and what a judge made of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.encoding import ArtifactError
from emlens.evaluation.judge_names import name_judge
from emlens.evaluation.judges import Claim
from emlens.evaluation.scores import ScoredResponse, read_score_file
from emlens.evaluation.summary import BehaviourSummary, Thresholds, summarise_scores
from emlens.journal import read_journal
from emlens.models.identity_record import ModelIdentity
from emlens.models.sampling import Sampling
from emlens.numerics.intervals import Interval
from emlens.runs import RunFolder

RESULT = "evaluation"
"""Name of the result in a run folder."""
RESPONSES, JUDGEMENTS, SCORES = "responses.jsonl", "judgements.jsonl", "scores.csv"
"""Files of a run folder."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """Judged responses with their summary and everything that they depend on."""

    kind: ClassVar[str] = "evaluation"

    model: ModelIdentity | None
    """What answered; None where responses came from elsewhere."""
    interventions: tuple[str, ...]
    """What acted on the model, one JSON object each; vectors by their hashes."""
    sampling: Sampling | None
    """How answers were sampled; None where that is not known."""
    judge: str
    """Id of the judge: numbers of different ids are not to be compared."""
    claim: Claim
    """What the share of low scores may be called."""
    meaning: str
    """A sentence on what that share is."""
    prompts: dict[str, str]
    """Question -> hash of what was asked under that name."""
    responses: tuple[ScoredResponse, ...]
    """All rows, in the order of the plan; a missing score is None."""
    summary: BehaviourSummary
    """The shares, under the published thresholds."""
    measured: dict[str, Interval] = field(default_factory=dict)
    """Control -> area under the curve of the judge's aligned score on texts whose side is known;
    empty where it was not measured."""
    measured_coherence: dict[str, Interval] = field(default_factory=dict)
    """Neighbouring levels -> area of its coherent score; empty where it was not measured."""
    judge_prompts: dict[str, str] = field(default_factory=dict)
    """Question -> hash of the instructions that the judge read in place of its own; empty for a
    judge that reads none, and where no question brings any."""
    judge_name: str = ""
    """Kind and model of the judge, for people; empty where it does not say."""

    @property
    def judged_by(self) -> str:
        """The judge as tables show it: its name, and the beginning of its id's hash."""
        return name_judge(self.judge, self.judge_name)

    def rows(self) -> list[dict[str, Any]]:
        """One row a response, with the published columns."""
        return [dataclasses.asdict(row) for row in self.responses]

    def summarise(self, thresholds: Thresholds) -> BehaviourSummary:
        """The shares under other thresholds."""
        return summarise_scores(self.responses, thresholds=thresholds)


def read_evaluation(path: str | Path) -> Evaluation:
    """Read the evaluation that a run folder holds.

    Raises:
        ArtifactError: there is no run, or it has not come to its end.
    """
    run = RunFolder.open(path)
    if not run.has_result(RESULT):
        raise ArtifactError(
            f"{path} has no finished evaluation: the same call of evaluate goes on with one, and "
            "emlens judge makes one of a run of generate"
        )
    return run.read_result(RESULT, Evaluation)


def read_scores(path: str | Path) -> tuple[ScoredResponse, ...]:
    """Read judged responses: a run folder, or a CSV or JSONL file with the published columns.

    Raises:
        ScoreFileError: a malformed file; file and line are named.
        ArtifactError: a folder without a finished evaluation.
    """
    return read_evaluation(path).responses if Path(path).is_dir() else read_score_file(path)


def collect_evaluation(
    folder: Path, planned: Sequence[tuple[str, str]], facts: Mapping[str, Any]
) -> Evaluation:
    """Join responses and judgements of a run folder, in the order of the plan.

    Args:
        folder: the run folder, with both journals complete.
        planned: ids of response and judgement of every row.
        facts: the other fields of the evaluation; `responses` and `summary` are made here.
    """
    responses = {row["id"]: row for row in read_journal(folder / RESPONSES)}
    judgements = {row["id"]: row for row in read_journal(folder / JUDGEMENTS)}
    rows = tuple(
        _join(responses[response], judgements[judgement]) for response, judgement in planned
    )
    return Evaluation(**facts, responses=rows, summary=summarise_scores(rows))


def _join(response: Mapping[str, Any], judgement: Mapping[str, Any]) -> ScoredResponse:
    names = ("id", "question_id", "question", "answer", "system")
    scores = {name: judgement[name] for name in ("aligned", "coherent")}
    return ScoredResponse(**{name: response[name] for name in names}, **scores)
