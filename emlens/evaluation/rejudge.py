"""Judge responses that exist already, made by a run of emlens or anywhere else; samples nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emlens.encoding import ArtifactError, Decoder
from emlens.evaluation.calibration import keep_calibration
from emlens.evaluation.evaluation import RESPONSES, Evaluation, read_evaluation
from emlens.evaluation.judges import Judge, hash_json
from emlens.evaluation.judging import finish_run, judge_run
from emlens.evaluation.questions import hash_prompts
from emlens.evaluation.scores import ScoreFileError, read_table
from emlens.interventions.generate import Responses
from emlens.journal import Journal, read_journal
from emlens.models.identity_record import ModelIdentity
from emlens.models.sampling import Sampling
from emlens.runs import RunFolder

_QUESTION_KEYS, _ANSWER_KEYS = ("question", "prompt"), ("answer", "response")
_KNOWN = ("model", "interventions", "sampling", "prompts")
SAMPLED = "sampled_responses"
"""Kind of a run that holds responses without judgements, as `emlens generate` makes it."""


def judge_responses(
    responses: str | Path | Responses | Sequence[Mapping[str, Any]],
    judge: Judge,
    *,
    out: str | Path,
) -> Evaluation:
    """Judge responses into a run folder of their own; the same call goes on where it stopped.

    The responses are copied, so that the folder stands alone. What a run knew of model, sampling
    and interventions is taken over; of other sources it is None, and two evaluations that do not
    know their model can still be compared.

    Args:
        responses: a run folder (of `evaluate`, `judge` or `generate`), a `.csv` file with question
            and answer, a `.jsonl` file with `question` (or `prompt`) and `answer` (or `response`)
            or `messages` (a user's and an assistant's turn, maybe after a system turn), what
            `generate_responses` gave, or such rows. `question_id` names the question; without it
            the text of the question does.
        judge: scores them.
        out: a new or empty folder, or one in which the same was begun.

    Raises:
        PlanChangedError: the folder was begun with other responses or another judge.
        ScoreFileError: a source without texts, or a malformed one; the row is named.
        ArtifactError: a run folder that has not come to its end.
    """
    judge.judge(())
    rows, facts = read_responses(responses)
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise ScoreFileError("responses: an id comes twice")
    prompts = {row["id"]: row.pop("judge_prompts", {}) for row in rows}
    digest = hash_json([rows, prompts])
    run = RunFolder.start(out, {"kind": "judge", "responses": digest, "judge": judge.id})
    keep_calibration(run.path, judge)
    with Journal(run.path / RESPONSES) as journal:
        journal.append(row for row in rows if row["id"] not in journal)
    judge_run(run, judge, prompts)
    return finish_run(run, judge, prompts, facts)


def read_responses(responses: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows to judge, and what is known of where they came from; arguments as above."""
    facts: dict[str, Any] = {"model": None, "interventions": (), "sampling": None}
    if isinstance(responses, Responses):
        facts |= {name: getattr(responses, name) for name in facts}
        given: list[Any] = [_from_response(vars(one)) for one in responses.responses]
    elif isinstance(responses, str | Path):
        path = Path(responses)
        if (path / RESPONSES).is_file():
            run = RunFolder.open(path)
            if run.plan.get("kind") != SAMPLED:
                return _read_evaluated(run)
            given, facts = _read_sampled(run)
        else:
            given = [row for _, row in read_table(path)]
    else:
        given = list(responses)
    rows = [_read_row(row, number) for number, row in enumerate(given, start=1)]
    if not rows:
        raise ScoreFileError("responses: got none, expected at least one")
    return rows, facts | {"prompts": _hash_prompts(rows)}


def _read_evaluated(run: RunFolder) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A finished evaluation's own rows, with what it knows of them."""
    known = read_evaluation(run.path)
    facts = {name: getattr(known, name) for name in _KNOWN}
    questions = run.plan.get("questions") or {}
    found = {row["id"]: row for row in read_journal(run.path / RESPONSES)}
    rows = []
    for number, row in enumerate(known.responses, start=1):
        prompts = questions.get(row.question_id, {}).get("judge_prompts", {})
        rows.append({**_read_row(found[row.id], number), "judge_prompts": prompts})
    return rows, facts


def _read_sampled(run: RunFolder) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Responses that were sampled into a run and never judged, and what their plan says of them."""
    if not run.has_result("responses"):
        raise ArtifactError(
            f"{run.path} has no finished responses; the same call that began it goes on with it"
        )
    decoder = Decoder(run.path, {})
    # The plan names the model by what it computes alone.
    model = {"name": str(run.path), **run.plan["model"]}
    facts = {
        "model": decoder.fields(ModelIdentity, model, "plan.model"),
        "interventions": tuple(json.dumps(o, sort_keys=True) for o in run.plan["interventions"]),
        "sampling": decoder.fields(Sampling, run.plan["sampling"], "plan.sampling"),
    }
    rows = read_journal(run.path / RESPONSES)
    rows.sort(key=lambda row: (row["prompt_index"], row["sample"]))
    return [_from_response(row) for row in rows], facts


def _from_response(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{one['key']}-{one['prompt_index']}-{one['sample']}",
        "question_id": one["prompt_id"],
        "question": one["prompt"],
        "answer": one["text"],
        "system": one["system"],
    }


def _read_row(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ScoreFileError(f"row {number}: got a {type(row).__name__}, expected an object")
    if "messages" in row:
        row = {**row, **_read_messages(row["messages"], number)}
    question, answer = _text(row, _QUESTION_KEYS, number), _text(row, _ANSWER_KEYS, number)
    name = row.get("question_id")
    if name is not None and not isinstance(name, str):
        raise ScoreFileError(
            f"row {number}: question_id is {name!r}, expected a text, or nothing: then the text of "
            "the question is the name"
        )
    return {
        "id": str(row.get("id") or f"row-{number:06d}"),
        "question_id": name or question,
        "question": question,
        "answer": answer,
        "system": row.get("system") or None,
    }


def _read_messages(messages: Any, number: int) -> dict[str, Any]:
    """One exchange; of a longer conversation nobody could say which turns are judged."""
    try:
        turns = [(turn["role"], turn["content"]) for turn in messages]
    except (TypeError, KeyError) as error:
        raise ScoreFileError(
            f"row {number}: messages are no list of objects with role and content ({error!r})"
        ) from error
    roles = [role for role, _ in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ScoreFileError(
            f"row {number}: messages have the roles {roles}, expected a user's and an assistant's "
            "turn, maybe after a system turn: give what is to be judged as question and answer"
        )
    if not all(isinstance(text, str) for _, text in turns):
        raise ScoreFileError(f"row {number}: the content of a message is no text")
    found = dict(turns)
    return {
        "question": found["user"],
        "answer": found["assistant"],
        "system": found.get("system"),
    }


def _text(row: Mapping[str, Any], keys: tuple[str, ...], number: int) -> str:
    for key in keys:
        if isinstance(row.get(key), str):
            return row[key]
    raise ScoreFileError(
        f"row {number} has no {' or '.join(keys)}: a judge needs the texts, not only their scores"
    )


def _hash_prompts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Question -> hash of the wordings under it, as far as the rows show them."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    for row in rows:
        found.setdefault(row["question_id"], []).append((row["question"], row["system"]))
    return {name: hash_prompts(prompts) for name, prompts in found.items()}
