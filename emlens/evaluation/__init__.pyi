from .questions import Question, load_questions
from .scores import ScoredResponse, read_scores, write_scores
from .summary import BehaviourSummary, Thresholds, summarise_scores

__all__ = [
    "BehaviourSummary",
    "Question",
    "ScoredResponse",
    "Thresholds",
    "load_questions",
    "read_scores",
    "summarise_scores",
    "write_scores",
]
