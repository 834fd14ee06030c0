from .classify import ModelClassification, classify_models
from .compare import compare_features
from .contrast import FeatureContrast, contrast_features
from .early_warning import EarlyWarning, Series, measure_early_warning
from .health import check_sae
from .latents import LatentCodes, read_latents
from .rank import FeatureRanking, rank_features
from .results import FeatureDiff, SaeHealth

__all__ = [
    "EarlyWarning",
    "FeatureContrast",
    "FeatureDiff",
    "FeatureRanking",
    "LatentCodes",
    "ModelClassification",
    "SaeHealth",
    "Series",
    "check_sae",
    "classify_models",
    "compare_features",
    "contrast_features",
    "measure_early_warning",
    "rank_features",
    "read_latents",
]
