from .codec import CodecError, Codes, SparseCodec, SparseCodes
from .crosscoder import Crosscoder
from .runtime import Sae

__all__ = ["CodecError", "Codes", "Crosscoder", "Sae", "SparseCodec", "SparseCodes"]
