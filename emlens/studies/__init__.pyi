from .compare_solutions import SolutionComparison, SolutionSettings, compare_solutions
from .diff_finetunes import DiffRun, DiffSettings, diff_finetunes, plan_diff
from .export_model import ExportedModel, export_model
from .removal import Arm, DirectionRemoval, RemovalQuestions, RemovalSettings
from .remove_direction import remove_direction
from .run_demo import DemoResult, run_demo
from .sample_responses import SampledResponses, sample_responses
from .screen_ablations import AblationScreen, screen_ablations
from .trace_transition import TraceSettings, TransitionTrace, trace_transition

__all__ = [
    "AblationScreen",
    "Arm",
    "DemoResult",
    "DiffRun",
    "DiffSettings",
    "DirectionRemoval",
    "ExportedModel",
    "RemovalQuestions",
    "RemovalSettings",
    "SampledResponses",
    "SolutionComparison",
    "SolutionSettings",
    "TraceSettings",
    "TransitionTrace",
    "compare_solutions",
    "diff_finetunes",
    "export_model",
    "plan_diff",
    "remove_direction",
    "run_demo",
    "sample_responses",
    "screen_ablations",
    "trace_transition",
]
