from .calibrate import calibrate_threshold
from .codec import ActiveCodes, CodecError, Codes, SparseCodec, SparseCodes
from .compatibility import allow_other_model, check_fits
from .convert import convert_sae
from .crosscoder import Crosscoder
from .files import save_sae
from .fit import CodecFit, FitAccumulator, measure_fit
from .latent_scaling import LatentScaling, LatentScalingAccumulator, measure_latent_scaling
from .load import load_crosscoder, load_sae
from .runtime import Sae
from .settings import CrosscoderSettings, SaeSettings
from .train import SaeTraining, read_training, train_sae
from .train_crosscoder import CrosscoderTraining, measure_crosscoder_fit, train_crosscoder

__all__ = [
    "ActiveCodes",
    "CodecError",
    "CodecFit",
    "Codes",
    "Crosscoder",
    "CrosscoderSettings",
    "CrosscoderTraining",
    "FitAccumulator",
    "LatentScaling",
    "LatentScalingAccumulator",
    "Sae",
    "SaeSettings",
    "SaeTraining",
    "SparseCodec",
    "SparseCodes",
    "allow_other_model",
    "calibrate_threshold",
    "check_fits",
    "convert_sae",
    "load_crosscoder",
    "load_sae",
    "measure_crosscoder_fit",
    "measure_fit",
    "measure_latent_scaling",
    "read_training",
    "save_sae",
    "train_crosscoder",
    "train_sae",
]
