from .adapter_files import load_adapter, save_adapter
from .attach import attach_adapter
from .copies import copy_weights
from .export import save_checkpoint
from .generate import Sampling, generate_tokens
from .loading import load_model
from .lora import LoraAdapter, LoraModule, scale_adapter
from .merge import merge_adapter
from .null import sample_null_adapters
from .pair import ModelPair, load_pair
from .paired import forward_many
from .proof import AdapterNotInEffectError, AdapterProof, verify_adapter
from .score import ResponseScore, score_responses
from .suffix import score_steered
from .views import origin_of

__all__ = [
    "AdapterNotInEffectError",
    "AdapterProof",
    "LoraAdapter",
    "LoraModule",
    "ModelPair",
    "ResponseScore",
    "Sampling",
    "attach_adapter",
    "copy_weights",
    "forward_many",
    "generate_tokens",
    "load_adapter",
    "load_model",
    "load_pair",
    "merge_adapter",
    "origin_of",
    "sample_null_adapters",
    "save_adapter",
    "save_checkpoint",
    "scale_adapter",
    "score_responses",
    "score_steered",
    "verify_adapter",
]
