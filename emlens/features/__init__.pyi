from .compare import compare_features
from .contrast import FeatureContrast, contrast_features
from .health import check_sae
from .rank import FeatureRanking, rank_features
from .results import FeatureDiff, SaeHealth

__all__ = [
    "FeatureContrast",
    "FeatureDiff",
    "FeatureRanking",
    "SaeHealth",
    "check_sae",
    "compare_features",
    "contrast_features",
    "rank_features",
]
