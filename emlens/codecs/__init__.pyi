from .codec import CodecError, Codes, SparseCodec, SparseCodes
from .runtime import Sae

__all__ = ["CodecError", "Codes", "Sae", "SparseCodec", "SparseCodes"]
