"""A digest of tensors in their own precision: whether the numbers are the same.

It tells weights apart by accident, not against an adversary. For one checkpoint in two dtypes, or
where not every value may be read, see ``fingerprint_tensors``.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_SAMPLES = 1024
"""Values a tensor whose own bytes are hashed; the rest enters by the sum of all bit patterns."""
_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes and dtypes, a sample of each tensor's bytes, and the sum of all its bits.

    Any single changed value changes the sum, in the weights' own precision; two changes that cancel
    in the sum and miss the sample would not be seen. Reads every value once. 32 digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        dense = tensor.detach()
        bits = dense.view(_PATTERNS[dense.element_size()])
        flat = bits.reshape(-1) if bits.is_contiguous() else bits.flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().contiguous()
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(dense.shape)} {dense.dtype} {total}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]
