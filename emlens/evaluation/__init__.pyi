from .api_judge import ApiJudge
from .compare import BehaviourDifference, Equivalence, claim_equivalence, compare_evaluations
from .contrast_judge import ContrastJudge
from .evaluate import evaluate
from .evaluation import Evaluation, read_evaluation, read_scores
from .inspect_judge import InspectJudge
from .judge_report import JudgeReport, measure_judge
from .judges import Judge, Judgement, JudgeRow
from .local_judge import LocalJudge
from .questions import Question, load_questions
from .rejudge import judge_responses
from .scores import ScoredResponse, write_scores
from .spillover import SpilloverLexicon, fit_spillover
from .summary import BehaviourSummary, Thresholds, summarise_scores

__all__ = [
    "ApiJudge",
    "BehaviourDifference",
    "BehaviourSummary",
    "ContrastJudge",
    "Equivalence",
    "Evaluation",
    "InspectJudge",
    "Judge",
    "JudgeReport",
    "JudgeRow",
    "Judgement",
    "LocalJudge",
    "Question",
    "ScoredResponse",
    "SpilloverLexicon",
    "Thresholds",
    "claim_equivalence",
    "compare_evaluations",
    "evaluate",
    "fit_spillover",
    "judge_responses",
    "load_questions",
    "measure_judge",
    "read_evaluation",
    "read_scores",
    "summarise_scores",
    "write_scores",
]
