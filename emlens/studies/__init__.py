"""Questions that need several packages at once, one a file."""

from emlens.studies.answer_questions import Answer, Answers, answer_questions
from emlens.studies.diff_finetunes import DiffRun, DiffSettings, diff_finetunes, plan_diff
from emlens.studies.run_demo import DemoResult, run_demo

__all__ = [
    "Answer",
    "Answers",
    "DemoResult",
    "DiffRun",
    "DiffSettings",
    "answer_questions",
    "diff_finetunes",
    "plan_diff",
    "run_demo",
]
