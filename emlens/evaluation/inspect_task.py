"""Judging as a task of inspect_ai: stored responses go in, judgements come out of its log.

It samples nothing and chooses no model; see `InspectJudge`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emlens.evaluation.asking import Ask, ask_for_scores, call_beside_loops, fill_prompts
from emlens.evaluation.judge_prompts import PROMPTS
from emlens.evaluation.judges import Judgement, JudgeRow

TASK, SOLVER, SCORER = "emlens_judging", "emlens_replay", "emlens_judge"
"""Names in logs."""


def make_task(rows: Sequence[JudgeRow], ask: Ask, *, samples: int) -> Any:
    """A task that replays responses and has them graded.

    Args:
        rows: the responses.
        ask: sends a prompt to the judging model.
        samples: answers drawn where log-probabilities do not serve.
    """
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample

    asked = [
        Sample(
            id=row.id,
            input=row.question,
            metadata={"answer": row.answer, "system": row.system},
        )
        for row in rows
    ]
    scorer = _make_scorer(rows, ask, samples)
    return Task(name=TASK, dataset=MemoryDataset(asked), solver=_make_solver(), scorer=scorer)


def _make_solver() -> Any:
    from inspect_ai.model import ModelOutput
    from inspect_ai.solver import Generate, TaskState, solver

    @solver(name=SOLVER)
    def replay() -> Any:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            state.output = ModelOutput.from_content("stored", state.metadata["answer"])
            return state

        return solve

    return replay()


def _make_scorer(rows: Sequence[JudgeRow], ask: Ask, samples: int) -> Any:
    from inspect_ai.scorer import Score, Target, mean, scorer
    from inspect_ai.solver import TaskState
    from inspect_ai.util import collect

    prompts = {row.id: fill_prompts(row) for row in rows}

    # Its means are of those that have a score; it counts those that have none beside them.
    @scorer(metrics={name: [mean()] for name in PROMPTS}, name=SCORER)
    def graded() -> Any:
        async def score(state: TaskState, target: Target) -> Score:
            asked = prompts[str(state.sample_id)]
            found = await ask_for_scores(asked, ask, samples=samples, gather=collect)
            scores = {"aligned": found.aligned, "coherent": found.coherent}
            value = {name: math.nan if one is None else one for name, one in scores.items()}
            return Score(value=value, metadata=dict(found.raw))

        return score

    return graded()


def read_judgements(log: str | Path) -> dict[str, Judgement]:
    """What a log of the task says, by row id; responses that were not judged are left out.

    Raises:
        ValueError: a log of another task.
    """
    from inspect_ai.log import read_eval_log

    # Inside a running loop it would patch asyncio for the whole process.
    read = call_beside_loops(lambda: read_eval_log(str(log)))
    if read.eval.task != TASK:
        raise ValueError(f"log: {log} is of the task {read.eval.task}, expected {TASK}")
    found: dict[str, Judgement] = {}
    for sample in read.samples or []:
        score = (sample.scores or {}).get(SCORER)
        if score is not None:
            value = score.as_dict()
            found[str(sample.id)] = Judgement(
                aligned=_read_score(value["aligned"]),
                coherent=_read_score(value["coherent"]),
                raw=dict(score.metadata or {}),
            )
    return found


def _read_score(value: Any) -> float | None:
    return None if value is None or math.isnan(float(value)) else float(value)
