from .compare_by_latents import LatentComparisons, compare_by_latents
from .compare_solutions import GradientPath, SolutionTexts, compare_solutions
from .diff_finetunes import DiffRun, DiffSettings, diff_finetunes, plan_diff
from .export_model import ExportedModel, export_model
from .find_persona_features import find_persona_features
from .follow_latents import FollowedTexts, follow_latents
from .judge_scores import judge_scores
from .measure_narrowness import Narrowness, NarrownessProbe, measure_narrowness
from .persona_features import PersonaFeatures
from .persona_settings import (
    ComparisonSettings,
    FineTunes,
    LatentPath,
    PersonaProbe,
    PersonaSettings,
    PersonaTexts,
)
from .plain_difference import PlainDifference, measure_plain_difference
from .removal import Arm, DirectionRemoval, RemovalQuestions, RemovalSettings
from .remove_direction import remove_direction
from .run_demo import DemoResult, run_demo
from .sample_responses import SampledResponses, sample_responses
from .screen_ablations import AblationScreen, screen_ablations
from .solution_curves import SolutionComparison, SolutionSettings
from .solutions import VectorSolution, load_solution
from .trace_transition import trace_transition, trace_weights
from .train_sae_on_chats import TextSae, train_sae_on_chats
from .transition_trace import BehaviourProbe, TraceSettings, TransitionTrace

__all__ = [
    "AblationScreen",
    "Arm",
    "BehaviourProbe",
    "ComparisonSettings",
    "DemoResult",
    "DiffRun",
    "DiffSettings",
    "DirectionRemoval",
    "ExportedModel",
    "FineTunes",
    "FollowedTexts",
    "GradientPath",
    "LatentComparisons",
    "LatentPath",
    "Narrowness",
    "NarrownessProbe",
    "PersonaFeatures",
    "PersonaProbe",
    "PersonaSettings",
    "PersonaTexts",
    "PlainDifference",
    "RemovalQuestions",
    "RemovalSettings",
    "SampledResponses",
    "SolutionComparison",
    "SolutionSettings",
    "SolutionTexts",
    "TextSae",
    "TraceSettings",
    "TransitionTrace",
    "VectorSolution",
    "compare_by_latents",
    "compare_solutions",
    "diff_finetunes",
    "export_model",
    "find_persona_features",
    "follow_latents",
    "judge_scores",
    "load_solution",
    "measure_narrowness",
    "measure_plain_difference",
    "plan_diff",
    "remove_direction",
    "run_demo",
    "sample_responses",
    "screen_ablations",
    "trace_transition",
    "trace_weights",
    "train_sae_on_chats",
]
