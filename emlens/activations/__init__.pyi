from .accumulate import ActivationAccumulator, StatisticsAccumulator
from .capture import ActivationShards, capture_activations
from .reading import ReadingPlan, plan_reading
from .results import ActivationStatistics
from .shuffled import ShuffledActivations, shuffle_activations
from .stream import accumulate_activations, stream_activations, summarise_activations

__all__ = [
    "ActivationAccumulator",
    "ActivationShards",
    "ActivationStatistics",
    "ReadingPlan",
    "ShuffledActivations",
    "StatisticsAccumulator",
    "accumulate_activations",
    "capture_activations",
    "plan_reading",
    "shuffle_activations",
    "stream_activations",
    "summarise_activations",
]
