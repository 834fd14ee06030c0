from .attribute import attribute_features, pair_by_prompt
from .cap import cap_latent
from .cards import FeatureCard, FeatureCards, TokenWindow
from .classify import ModelClassification, classify_models
from .compare import compare_features
from .contrast import FeatureContrast, contrast_features
from .early_warning import EarlyWarning, Series, measure_early_warning
from .explain import explain_features
from .explain_settings import ExplainSettings
from .health import check_sae
from .latents import LatentCodes, read_latents
from .rank import FeatureRanking, rank_features
from .results import FeatureDiff, SaeHealth
from .screen import screen_features
from .screen_results import FeatureScreen
from .screen_settings import ScreenSettings

__all__ = [
    "EarlyWarning",
    "ExplainSettings",
    "FeatureCard",
    "FeatureCards",
    "FeatureContrast",
    "FeatureDiff",
    "FeatureRanking",
    "FeatureScreen",
    "LatentCodes",
    "ModelClassification",
    "SaeHealth",
    "ScreenSettings",
    "Series",
    "TokenWindow",
    "attribute_features",
    "cap_latent",
    "check_sae",
    "classify_models",
    "compare_features",
    "contrast_features",
    "explain_features",
    "measure_early_warning",
    "pair_by_prompt",
    "rank_features",
    "read_latents",
    "screen_features",
]
