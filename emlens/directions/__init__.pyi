from .compare import CosineMatrix, compare_directions
from .fit import fit_directions
from .sample import sample_directions

__all__ = [
    "CosineMatrix",
    "compare_directions",
    "fit_directions",
    "sample_directions",
]
