"""Any model that inspect_ai knows as a judge, with its caching and its log viewer.

Stored responses are replayed, none is sampled. Not imported unless it is used: it is an extra.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emlens.evaluation.api_judge import (
    ALTERNATIVES,
    LONGEST,
    SPECIAL,
    average_answers,
    read_weights,
)
from emlens.evaluation.judge_prompts import FEWEST_MASS, PROMPTS, fill_prompt, weigh_numbers
from emlens.evaluation.judges import (
    MEANINGS,
    Claim,
    Judgement,
    JudgeRow,
    JudgeUnavailableError,
    hash_json,
)

SCORER = "emlens_judge"
"""Name of the scorer in logs."""
VERSION = 1
"""Of the rule by which answers become scores; part of the judge's id."""


@dataclass(frozen=True, kw_only=True)
class InspectJudge:
    """Scores stored responses as a task of inspect_ai; its log stays and can be looked at.

    The score is made as `ApiJudge` makes it.

    Raises:
        ValueError: a number out of its range.
    """

    model: str
    """As inspect_ai calls it, such as `openai/gpt-4o` or `vllm/Qwen/Qwen2.5-7B-Instruct`."""
    log_dir: str
    """Folder of its `.eval` logs."""
    samples: int = 5
    """Answers drawn where log-probabilities do not serve."""
    cache: bool = True
    """Whether inspect_ai keeps answers, so that a judge that was stopped does not ask again."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: got {self.samples}, expected at least 1")

    @property
    def id(self) -> str:
        """`inspect/MODEL/` and a hash of prompts and rule."""
        return (
            f"inspect/{self.model}/{hash_json([dict(PROMPTS), VERSION, FEWEST_MASS, self.samples])}"
        )

    @property
    def claim(self) -> Claim:
        """What it was asked for."""
        return "misalignment"

    @property
    def meaning(self) -> str:
        """A sentence on what the share of low scores is."""
        return MEANINGS[self.claim]

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        """Score rows as one run of a task.

        Raises:
            JudgeUnavailableError: the run did not come to its end; its log is named.
        """
        if not rows:
            return []
        from inspect_ai import eval as run_task

        (log,) = run_task(
            make_task(rows, samples=self.samples, cache=self.cache),
            model=self.model,
            log_dir=self.log_dir,
            display="none",
        )
        found = read_judgements(log.location)
        if log.status != "success" or len(found) < len(rows):
            raise JudgeUnavailableError(
                f"judge {self.id}: inspect_ai ended with {log.status}, {len(found)} of {len(rows)} "
                f"responses judged; see {log.location}",
                found,
            )
        return [found[row.id] for row in rows]


def make_task(rows: Sequence[JudgeRow], *, samples: int, cache: bool) -> Any:
    """A task of inspect_ai over stored responses: it replays them, and the model grades them."""
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample

    asked = [
        Sample(
            id=row.id,
            input=row.question,
            metadata={
                "answer": row.answer,
                **{name: fill_prompt(name, row, delimiters=SPECIAL) for name in PROMPTS},
            },
        )
        for row in rows
    ]
    return Task(
        name="emlens_judging",
        dataset=MemoryDataset(asked),
        solver=_make_solver(),
        scorer=_make_scorer(samples=samples, cache=cache),
    )


def read_judgements(log: str | Path) -> dict[str, Judgement]:
    """What a log of the task says, by row id; samples without a score are left out.

    Raises:
        ValueError: a log of another task.
    """
    from inspect_ai.log import read_eval_log

    read = read_eval_log(str(log))
    found: dict[str, Judgement] = {}
    for sample in read.samples or []:
        score = (sample.scores or {}).get(SCORER)
        if score is None:
            continue
        value: Any = score.value
        if not isinstance(value, Mapping):
            raise ValueError(f"{log}: the scores of {SCORER} are no {', '.join(PROMPTS)}")
        found[str(sample.id)] = Judgement(
            aligned=_number(value.get("aligned")),
            coherent=_number(value.get("coherent")),
            raw=dict(score.metadata or {}),
        )
    return found


def _make_solver() -> Any:
    from inspect_ai.model import ModelOutput
    from inspect_ai.solver import Generate, TaskState, solver

    @solver(name="emlens_replay")
    def replay() -> Any:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            state.output = ModelOutput.from_content("stored", state.metadata["answer"])
            return state

        return solve

    return replay()


def _make_scorer(*, samples: int, cache: bool) -> Any:
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import SampleScore, Score, Target, metric, scorer
    from inspect_ai.solver import TaskState

    @metric(name="mean_of_scored")
    def mean_of_scored() -> Any:
        def compute(scores: list[SampleScore]) -> float:
            known = [one.score.as_float() for one in scores if one.score.value is not None]
            known = [value for value in known if not math.isnan(value)]
            return sum(known) / len(known) if known else math.nan

        return compute

    @scorer(metrics={name: [mean_of_scored()] for name in PROMPTS}, name=SCORER)
    def graded() -> Any:
        async def score(state: TaskState, target: Target) -> Score:
            model = get_model()
            if not state.metadata["answer"].split():
                return Score(value=dict.fromkeys(PROMPTS, math.nan))
            values: dict[str, float] = {}
            raw: dict[str, Any] = {}
            weighed = GenerateConfig(
                max_tokens=LONGEST, temperature=0.0, logprobs=True, top_logprobs=ALTERNATIVES
            )
            drawn = GenerateConfig(max_tokens=LONGEST, temperature=1.0)
            for name in PROMPTS:
                prompt = state.metadata[name]
                first = await model.generate(prompt, config=weighed, cache=cache)
                weights = read_weights(first)
                if weights is not None:
                    found, details = weigh_numbers(weights[0]), {"mass": weights[1]}
                else:
                    replies = [await model.generate(prompt, config=drawn) for _ in range(samples)]
                    found, details = average_answers([one.completion for one in replies])
                values[name] = math.nan if found is None else found
                raw |= {f"{name}_{key}": value for key, value in details.items()}
            return Score(value=values, answer=state.output.completion, metadata=raw)

        return score

    return graded()


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(float(value)) else float(value)
