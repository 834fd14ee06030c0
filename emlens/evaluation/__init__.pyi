from .compare import BehaviourDifference, Equivalence, claim_equivalence, compare_evaluations
from .evaluate import evaluate
from .evaluation import Evaluation, read_evaluation, read_scores
from .judges import Judge, Judgement, JudgeRow
from .questions import Question, load_questions
from .rejudge import judge_responses
from .scores import ScoredResponse, write_scores
from .summary import BehaviourSummary, Thresholds, summarise_scores

__all__ = [
    "BehaviourDifference",
    "BehaviourSummary",
    "Equivalence",
    "Evaluation",
    "Judge",
    "JudgeRow",
    "Judgement",
    "Question",
    "ScoredResponse",
    "Thresholds",
    "claim_equivalence",
    "compare_evaluations",
    "evaluate",
    "judge_responses",
    "load_questions",
    "read_evaluation",
    "read_scores",
    "summarise_scores",
    "write_scores",
]
