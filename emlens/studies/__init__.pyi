from .compare_solutions import GradientPath, SolutionTexts, compare_solutions
from .diff_finetunes import DiffRun, DiffSettings, diff_finetunes, plan_diff
from .export_model import ExportedModel, export_model
from .measure_narrowness import Narrowness, NarrownessProbe, measure_narrowness
from .removal import Arm, DirectionRemoval, RemovalQuestions, RemovalSettings
from .remove_direction import remove_direction
from .run_demo import DemoResult, run_demo
from .sample_responses import SampledResponses, sample_responses
from .screen_ablations import AblationScreen, screen_ablations
from .solution_curves import SolutionComparison, SolutionSettings
from .solutions import VectorSolution, load_solution
from .trace_transition import trace_transition, trace_weights
from .transition_trace import BehaviourProbe, TraceSettings, TransitionTrace

__all__ = [
    "AblationScreen",
    "Arm",
    "BehaviourProbe",
    "DemoResult",
    "DiffRun",
    "DiffSettings",
    "DirectionRemoval",
    "ExportedModel",
    "GradientPath",
    "Narrowness",
    "NarrownessProbe",
    "RemovalQuestions",
    "RemovalSettings",
    "SampledResponses",
    "SolutionComparison",
    "SolutionSettings",
    "SolutionTexts",
    "TraceSettings",
    "TransitionTrace",
    "VectorSolution",
    "compare_solutions",
    "diff_finetunes",
    "export_model",
    "load_solution",
    "measure_narrowness",
    "plan_diff",
    "remove_direction",
    "run_demo",
    "sample_responses",
    "screen_ablations",
    "trace_transition",
    "trace_weights",
]
