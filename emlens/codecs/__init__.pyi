from .codec import Codes, SparseCodec, SparseCodes

__all__ = ["Codes", "SparseCodec", "SparseCodes"]
