"""Ask a model questions and have its answers judged, in a folder that survives being killed.

For answers that exist already see `judge_responses`; nothing here changes a model.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emlens.data import Batching, track
from emlens.evaluation.calibration import keep_calibration
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
from emlens.interventions.met import meets
from emlens.interventions.seen_prompts import check_unseen
from emlens.journal import Journal
from emlens.models.generate import stop_tokens
from emlens.models.hooks import HookNeverFiredError
from emlens.models.identity import ModelIdentity, identify_model, refuse_foreign_hooks
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
    decided = _decide(model, identity, acting)
    run = RunFolder.start(out, _plan(decided, questions, judge, sampling, batching))
    keep_calibration(run.path, judge)
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
    refuse_foreign_hooks(model)


def _decide(
    model: Any, identity: ModelIdentity, acting: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What decides a response beside its question and the sampling.

    The model by what it computes: the same weights under another path are the same. The stop
    tokens stand beside the tokenizer, whose fingerprint holds which tokens are special, not which
    of them ends an answer.
    """
    return {
        "model": {k: v for k, v in dataclasses.asdict(identity).items() if k != "name"},
        "interventions": list(acting),
        "stop_tokens": list(stop_tokens(model)),
    }


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


def _generate(
    model: HookedModel,
    planned: Sequence[PlannedRow],
    run: RunFolder,
    sampling: Sampling,
    interventions: Sequence[Intervention],
    batching: Batching,
) -> None:
    with Journal(run.path / RESPONSES) as journal:
        _check_strangers(journal, planned)
        missing = [row for row in planned if row.id not in journal]
        resumed, proven = len(journal) > 0, not interventions
        try:
            if missing:
                # Once around all groups: positions that only long answers have may miss in one.
                with intervene(model, interventions):
                    _answer(model, planned, journal, sampling, batching)
                proven = True
        except HookNeverFiredError:
            if not resumed:
                raise
        if not proven and not run.has_result(RESULT):
            again = _rows_to_act_on(planned, journal, interventions)
            requests = list(map(_request, again))
            with intervene(model, interventions):
                list(stream_responses(model, requests, sampling=sampling, batching=batching))


def _answer(
    model: HookedModel,
    planned: Sequence[PlannedRow],
    journal: Journal,
    sampling: Sampling,
    batching: Batching,
) -> None:
    groups = list(group_rows(model, planned, sampling, batching))
    for group in track(groups, "answering (responses)", sizes=map(len, groups)):
        if all(row.id in journal for row in group):
            continue
        rows = {row.id: row for row in group}
        requests = list(map(_request, group))
        for batch in stream_responses(model, requests, sampling=sampling, batching=batching):
            journal.append(
                _record(rows[response.key], response)
                for response in batch
                if response.key not in journal
            )


def _rows_to_act_on(
    planned: Sequence[PlannedRow], journal: Journal, interventions: Sequence[Intervention]
) -> list[PlannedRow]:
    """For each positions a finished row that has such tokens; any row if there is none.

    Rows of earlier calls say what the positions select, not that anything was done there. Made
    once more, they prove it for a call whose own rows have no such token, or that makes none.
    """
    found: dict[str, None] = {}
    kept = journal.rows()
    for positions in dict.fromkeys(one.where for one in interventions):
        met = (row for row in kept if meets(positions, len(row["ids"]), row["prompt_tokens"]))
        found |= {row["id"]: None for row in itertools.islice(met, 1)}
    return [row for row in planned if row.id in found] or [planned[0]]


def _request(row: PlannedRow) -> ResponseRequest:
    return ResponseRequest(row.chat, row.sample, key=row.id, repeat=row.repeat)


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
