"""One evaluation of a study, in a folder of its own: read where it is finished, else gone on with.

For studies that ask many models the same. What decides the evaluation stands in the study's plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emlens.data import Batching, tokenize_chat
from emlens.encoding import ArtifactError
from emlens.evaluation import Evaluation, Judge, Question, evaluate, read_evaluation
from emlens.evaluation.evaluation import RESULT
from emlens.interventions import Intervention
from emlens.models.sampling import Sampling
from emlens.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Whose answers are judged, and how they are sampled."""

    judge: Judge
    sampling: Sampling
    batching: Batching = field(default_factory=Batching)

    def ask(
        self,
        model: Any,
        questions: Sequence[Question],
        folder: Path,
        interventions: Sequence[Intervention] = (),
    ) -> Evaluation:
        """Sample and judge answers to questions, if that was not done to the end.

        Args:
            model: answers; not looked at where the folder holds a finished evaluation.
            questions: what is asked.
            folder: of this evaluation alone.
            interventions: act while answers are made.
        """
        if is_asked(folder):
            return read_evaluation(folder)
        return evaluate(
            model,
            questions,
            judge=self.judge,
            out=folder,
            sampling=self.sampling,
            interventions=interventions,
            batching=self.batching,
        )


def is_asked(folder: Path) -> bool:
    """Whether a folder holds a finished evaluation."""
    try:
        return RunFolder.open(folder).has_result(RESULT)
    except ArtifactError:
        return False  # not begun, or cut short before its plan was written


def count_responses(questions: Sequence[Question], samples: int) -> int:
    """Responses to questions, where a wording gets `samples` unless the question says otherwise."""
    return sum(
        len(question.paraphrases) * (question.samples_per_paraphrase or samples)
        for question in questions
    )


def count_prompt_tokens(questions: Sequence[Question], samples: int, *, tokenizer: Any) -> int:
    """Tokens of the prompts of all responses, as if each were read anew for every sample.

    Args:
        questions: as for `count_responses`, and so is `samples`.
        samples: of a wording.
        tokenizer: of the model that answers, with its chat template.
    """
    return sum(
        len(tokenize_chat(chat, tokenizer, for_generation=True).ids)
        * (question.samples_per_paraphrase or samples)
        for question in questions
        for chat in question.chats()
    )
