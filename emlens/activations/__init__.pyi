from .accumulate import ActivationAccumulator, StatisticsAccumulator
from .capture import ActivationShards, capture_activations
from .reading import ReadingPlan, plan_reading
from .results import ActivationStatistics
from .stream import accumulate_activations, stream_activations, summarise_activations

__all__ = [
    "ActivationAccumulator",
    "ActivationShards",
    "ActivationStatistics",
    "ReadingPlan",
    "StatisticsAccumulator",
    "accumulate_activations",
    "capture_activations",
    "plan_reading",
    "stream_activations",
    "summarise_activations",
]
