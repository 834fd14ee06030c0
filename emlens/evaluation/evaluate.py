"""Ask a model questions and have its answers judged, in a folder that survives being killed.

For answers that exist already see `judge_responses`; nothing here changes a model.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emlens.data import Batching
from emlens.evaluation.calibration import keep_calibration
from emlens.evaluation.evaluation import RESPONSES, RESULT, Evaluation
from emlens.evaluation.judges import Judge
from emlens.evaluation.judging import finish_run, judge_run
from emlens.evaluation.plan import PlannedRow, plan_rows
from emlens.evaluation.questions import Question
from emlens.interventions import (
    Intervention,
    active_interventions,
    describe_interventions,
)
from emlens.interventions.generate import Response, ResponseRequest
from emlens.interventions.kept import ResponseStore, describe_conditions, keep_responses
from emlens.interventions.plan import plan_interventions
from emlens.interventions.seen_prompts import check_unseen
from emlens.journal import Journal
from emlens.models.identity import identify_model, refuse_foreign_hooks
from emlens.models.protocol import HookedModel
from emlens.models.sampling import Sampling
from emlens.models.tokenizer_needs import require_tokenizer
from emlens.runs import RunFolder


def evaluate(
    model: HookedModel,
    questions: Sequence[Question],
    *,
    judge: Judge,
    out: str | Path,
    sampling: Sampling,
    interventions: Sequence[Intervention] = (),
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> Evaluation:
    """Sample answers to questions and judge them; the same call on the same folder goes on.

    `out` becomes a run folder: `manifest.json` (the plan), `responses.jsonl`, `judgements.jsonl`,
    `results/`. Batches are planned from the whole run, and one that a kill cut short is made again
    as a whole, so that the result does not depend on how often it was killed.

    Args:
        model: a model loaded by emlens, with its tokenizer.
        questions: what to ask; `samples_per_paraphrase`, where set, stands over `sampling.n`.
        judge: scores the answers; interventions on `model` must not act on it.
        out: a new or empty folder, or one in which the same plan was begun.
        sampling: how answers are sampled.
        interventions: act while answers are made; those of an `intervene` around this call do too,
            and both enter the ids of the rows.
        batching: rows that run together.

    Raises:
        PlanChangedError: the folder holds a run of another plan; what differs is named.
        ValueError: no questions, ids used twice, no tokenizer, or hooks of unknown effect.
        OverlappingPromptsError: an intervention whose direction was fitted on prompts that are
            asked; `directions.without_prompts("fit")` lets it.
        JournalLockedError: another process is writing this run.
        HookNeverFiredError: interventions that met no token in any row, those of earlier calls
            counted.
    """
    _check(model, questions)
    everything = (*active_interventions(model), *interventions)
    check_unseen(everything, [chat for question in questions for chat in question.chats()])
    judge.judge(())  # a judge that cannot judge says so before anything is sampled
    identity = identify_model(model)
    acting = describe_interventions(everything)
    decided = describe_conditions(model, identity, acting)
    plan_interventions(model, everything)  # what cannot act says so before a folder is begun
    run = RunFolder.start(out, _plan(decided, questions, judge, sampling, batching))
    keep_calibration(run.path, judge)
    planned = plan_rows(questions, sampling, decided)
    rows = {row.id: row for row in planned}
    with Journal(run.path / RESPONSES) as journal:
        store = ResponseStore(
            journal,
            lambda response: _record(rows[response.key], response),
            finished=run.has_result(RESULT),
        )
        keep_responses(
            model,
            list(map(_request, planned)),
            store,
            sampling=sampling,
            interventions=interventions,
            batching=batching,
        )
    asked = {row.id: row.question.judge_prompts for row in planned}
    judge_run(run, judge, asked)
    facts = {
        "model": identity,
        "interventions": tuple(json.dumps(one, sort_keys=True) for one in acting),
        "sampling": sampling,
        "prompts": {question.id: question.prompt_hash() for question in questions},
    }
    return finish_run(run, judge, asked, facts)


def _check(model: HookedModel, questions: Sequence[Question]) -> None:
    if not questions:
        raise ValueError("questions: got none, expected at least one")
    names = [question.id for question in questions]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"questions: the ids {doubled[:3]} come twice")
    require_tokenizer(model.tokenizer, "model: it")
    refuse_foreign_hooks(model)


def _plan(
    decided: Mapping[str, Any],
    questions: Sequence[Question],
    judge: Judge,
    sampling: Sampling,
    batching: Batching,
) -> dict[str, Any]:
    return {
        "kind": RESULT,
        **decided,
        "questions": {question.id: question for question in questions},
        "sampling": sampling,
        "judge": judge.id,
        "batching": batching,
    }


def _request(row: PlannedRow) -> ResponseRequest:
    return ResponseRequest(row.chat, row.sample, key=row.id, repeat=row.repeat)


def _record(row: PlannedRow, response: Response) -> dict[str, Any]:
    return {
        "id": row.id,
        "question_id": row.question.id,
        "paraphrase": row.paraphrase,
        "sample": row.sample,
        "system": row.question.system,
        "question": row.question.paraphrases[row.paraphrase],
        "answer": response.text,
        "ids": list(response.ids),
        "prompt_tokens": response.prompt_tokens,
        "ended": response.ended,
    }
