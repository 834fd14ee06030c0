from .codec import CodecError, Codes, SparseCodec, SparseCodes
from .compatibility import check_fits
from .convert import convert_sae
from .crosscoder import Crosscoder
from .files import save_sae
from .load import load_sae
from .runtime import Sae

__all__ = [
    "CodecError",
    "Codes",
    "Crosscoder",
    "Sae",
    "SparseCodec",
    "SparseCodes",
    "check_fits",
    "convert_sae",
    "load_sae",
    "save_sae",
]
