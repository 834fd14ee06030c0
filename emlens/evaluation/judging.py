"""Judge the responses that a run folder holds, keeping each judgement; makes no responses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from emlens.data import track
from emlens.evaluation.calibration import calibration_of
from emlens.evaluation.evaluation import (
    JUDGEMENTS,
    RESPONSES,
    RESULT,
    SCORES,
    Evaluation,
    collect_evaluation,
)
from emlens.evaluation.judge_prompts import hash_own_prompts
from emlens.evaluation.judges import (
    Judge,
    Judgement,
    JudgeRow,
    JudgeUnavailableError,
    hash_json,
)
from emlens.evaluation.scores import write_scores
from emlens.journal import Journal, read_journal
from emlens.runs import RunFolder

JUDGED_TOGETHER = 32
"""Rows that are handed to a judge at once; judged again together unless it judges one by one."""


def judge_run(run: RunFolder, judge: Judge, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Judge the responses of a run folder that have no judgement by this judge yet.

    Args:
        run: the folder, with all responses.
        judge: scores them.
        rows: id of each response, in the order of the plan, with its question's judge prompts.

    Raises:
        ValueError: a judge that gives more or fewer judgements than it was asked for.
        JudgeUnavailableError: a judge that cannot go on; what it had finished is kept.
    """
    answers = {row["id"]: row for row in read_journal(run.path / RESPONSES)}
    ids, every = list(rows), _name_judgements(judge.id, _hash_read(judge, rows))
    chunks = [ids[i : i + JUDGED_TOGETHER] for i in range(0, len(ids), JUDGED_TOGETHER)]
    with Journal(run.path / JUDGEMENTS) as journal:
        for chunk in track(chunks, "judging (responses)", sizes=map(len, chunks)):
            names = {row_id: every[row_id] for row_id in chunk}
            left = [row_id for row_id in chunk if names[row_id] not in journal]
            if not left:
                continue
            # A batch in a model here decides the last digits of its rows: it is judged as a whole.
            again = left if getattr(judge, "one_by_one", False) else chunk
            asked = [_ask(answers[row_id], rows[row_id]) for row_id in again]
            try:
                found = judge.judge(asked)
            except JudgeUnavailableError as error:
                _keep(journal, names, error.finished)
                done = sum(name in journal for name in every.values())
                raise JudgeUnavailableError(
                    f"{error}; {done} of {len(ids)} responses are judged and kept in {run.path}, "
                    f"{len(ids) - done} are not: the same call goes on with them",
                    error.finished,
                ) from error
            if len(found) != len(asked):
                raise ValueError(f"judge {judge.id} gave {len(found)} judgements for {len(asked)}")
            _keep(journal, names, {row.id: one for row, one in zip(asked, found, strict=True)})


def _keep(journal: Journal, names: Mapping[str, str], found: Mapping[str, Judgement]) -> None:
    """Store judgements by response id, but not those that are there."""
    journal.append(
        {
            "id": names[row_id],
            "response": row_id,
            "aligned": judgement.aligned,
            "coherent": judgement.coherent,
            "raw": dict(judgement.raw),
        }
        for row_id, judgement in found.items()
        if names[row_id] not in journal
    )


def judgement_id(row_id: str, judge: str, prompts: str | None = None) -> str:
    """Name a judgement by all that decides it.

    Args:
        row_id: of the response.
        judge: its id, which may take time to find.
        prompts: `hash_own_prompts` of the instructions that it read in place of its own.
    """
    own = {} if prompts is None else {"prompts": prompts}
    return hash_json({"response": row_id, "judge": judge, **own})


def _hash_read(judge: Judge, rows: Mapping[str, Mapping[str, str]]) -> dict[str, str | None]:
    """Row -> hash of its question's own instructions, where the judge reads any."""
    # A judge that does not say is taken to read them: else other instructions to it, which its id
    # does not hold, would be answered with the judgements of these.
    reads = getattr(judge, "reads_prompts", True)
    return {row_id: hash_own_prompts(own) if reads else None for row_id, own in rows.items()}


def _name_judgements(named: str, read: Mapping[str, str | None]) -> dict[str, str]:
    """Row -> id of its judgement."""
    return {row_id: judgement_id(row_id, named, own) for row_id, own in read.items()}


def finish_run(
    run: RunFolder,
    judge: Judge,
    rows: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, Any],
) -> Evaluation:
    """Write what a complete run comes to, and return it.

    Args:
        run: the folder, with all responses and judgements.
        judge: whose judgements are meant.
        rows: as for `judge_run`, in the order of the final table.
        facts: fields of the evaluation that are not read from the folder.
    """
    named, read = judge.id, _hash_read(judge, rows)
    planned = list(_name_judgements(named, read).items())
    own = {name: getattr(judge, name) for name in ("claim", "meaning")}
    own |= {"judge_name": getattr(judge, "name", ""), **_measured(judge)}
    found = collect_evaluation(run.path, planned, {**facts, "judge": named, **own})
    prompts = {one.question_id: name for one in found.responses if (name := read[one.id])}
    found = replace(found, judge_prompts=prompts)
    write_scores(found.responses, run.path / SCORES)
    run.save_result(RESULT, found)
    return found


def _measured(judge: Judge) -> dict[str, Any]:
    """The areas of a judge on texts whose side is known, as far as they were measured."""
    fitted, report = calibration_of(judge), getattr(judge, "report", None)
    if fitted is not None:
        return {"measured": fitted.measured, "measured_coherence": fitted.measured_coherence}
    if report is not None:
        return {"measured": report.aligned, "measured_coherence": report.coherent}
    return {}


def _ask(answer: Mapping[str, Any], judge_prompts: Mapping[str, str]) -> JudgeRow:
    return JudgeRow(
        id=answer["id"],
        question=answer["question"],
        answer=answer["answer"],
        system=answer["system"],
        judge_prompts=dict(judge_prompts),
    )
