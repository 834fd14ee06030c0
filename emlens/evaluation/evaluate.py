"""Ask a model questions and have its answers judged, in a folder that survives being killed.

For answers that exist already see `judge_responses`; nothing here changes a model.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from emlens.data import Batching, track
from emlens.evaluation.evaluation import RESPONSES, RESULT, Evaluation
from emlens.evaluation.judges import Judge
from emlens.evaluation.judging import finish_run, judge_run
from emlens.evaluation.plan import PlannedRow, group_rows, plan_rows
from emlens.evaluation.questions import Question
from emlens.interventions import (
    Intervention,
    active_interventions,
    describe_interventions,
    intervene,
)
from emlens.interventions.generate import Response, ResponseRequest, stream_responses
from emlens.journal import Journal
from emlens.models.identity import ModelIdentity, foreign_hooks, identify_model
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
        JournalLockedError: another process is writing this run.
    """
    _check(model, questions)
    judge.judge(())  # a judge that cannot judge says so before anything is sampled
    identity = identify_model(model)
    acting = describe_interventions((*active_interventions(model), *interventions))
    run = RunFolder.start(out, _plan(identity, acting, questions, judge, sampling, batching))
    decided = {"model": _without_name(identity), "interventions": acting}
    planned = plan_rows(questions, sampling, decided)
    _generate(model, planned, run, sampling, interventions, batching)
    judge_run(run, judge, {row.id: row.question.judge_prompts for row in planned})
    facts = {
        "model": identity,
        "interventions": tuple(json.dumps(one, sort_keys=True) for one in acting),
        "sampling": sampling,
        "prompts": {question.id: question.prompt_hash() for question in questions},
    }
    return finish_run(run, judge, [row.id for row in planned], facts)


def _check(model: HookedModel, questions: Sequence[Question]) -> None:
    if not questions:
        raise ValueError("questions: got none, expected at least one")
    names = [question.id for question in questions]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"questions: the ids {doubled[:3]} come twice")
    require_tokenizer(model.tokenizer, "model: it")
    if hooked := list(foreign_hooks(model)):
        raise ValueError(
            f"model has hooks that are no Interventions, at {', '.join(hooked[:3])}: rows could "
            "not say what acted on them. Pass interventions= or remove the hooks"
        )


def _plan(
    identity: ModelIdentity,
    acting: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    judge: Judge,
    sampling: Sampling,
    batching: Batching,
) -> dict[str, Any]:
    return {
        "kind": RESULT,
        "model": _without_name(identity),
        "interventions": list(acting),
        "questions": {question.id: question for question in questions},
        "sampling": sampling,
        "judge": judge.id,
        "batching": batching,
    }


def _without_name(identity: ModelIdentity) -> dict[str, Any]:
    """The model by what it computes: the same weights under another path are the same."""
    return {k: v for k, v in dataclasses.asdict(identity).items() if k != "name"}


def _generate(
    model: HookedModel,
    planned: Sequence[PlannedRow],
    run: RunFolder,
    sampling: Sampling,
    interventions: Sequence[Intervention],
    batching: Batching,
) -> None:
    with Journal(run.path / RESPONSES) as journal, ExitStack() as stack:
        _check_strangers(journal, planned)
        groups = list(group_rows(model, planned, sampling, batching))
        if any(row.id not in journal for row in planned):
            # Once around all groups: positions that only long answers have may miss in one.
            stack.enter_context(intervene(model, interventions))
        for group in track(groups, "answering (responses)", sizes=map(len, groups)):
            if all(row.id in journal for row in group):
                continue
            rows = {row.id: row for row in group}
            requests = [ResponseRequest(row.chat, row.sample, key=row.id) for row in group]
            for batch in stream_responses(model, requests, sampling=sampling, batching=batching):
                journal.append(
                    _record(rows[response.key], response)
                    for response in batch
                    if response.key not in journal
                )


def _check_strangers(journal: Journal, planned: Sequence[PlannedRow]) -> None:
    if strangers := set(journal.ids) - {row.id for row in planned}:
        raise ValueError(
            f"{journal.path} holds {len(strangers)} rows that are not in the plan: it was written "
            "by another version of emlens, or by hand; give another folder"
        )


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
