"""Which interventions act on a model right now, and how they are written down.

What is written down names vectors by their hash: it decides the identity of generated rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from emlens.interventions.intervention import Intervention
from emlens.interventions.operators import (
    Ablate,
    Add,
    Cap,
    Operator,
    PerLayer,
    Shift,
)
from emlens.models.acting import declare_acting
from emlens.models.protocol import HookedModel

_ACTIVE: WeakKeyDictionary[Any, list[tuple[Intervention, ...]]] = WeakKeyDictionary()


@contextmanager
def register_active(model: HookedModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Put interventions on record as acting on a model while the context lasts."""
    stack, together = _ACTIVE.setdefault(model, []), tuple(interventions)
    stack.append(together)
    try:
        with declare_acting(model, lambda: describe_interventions(together)):
            yield
    finally:
        stack.pop()


def active_interventions(model: HookedModel) -> tuple[Intervention, ...]:
    """Return everything that acts on a model, outer contexts first."""
    return tuple(one for together in _ACTIVE.get(model, ()) for one in together)


def describe_interventions(interventions: Sequence[Intervention]) -> list[dict[str, Any]]:
    """Return one JSON object an intervention: site, operator, positions, hashes of vectors.

    Equal values give equal objects in any process. Precision does not matter where the numbers
    are the same; a vector of another norm is another vector.
    """
    return [
        {
            "site": str(one.site),
            "positions": str(one.where),
            "made": one.label,
            **_describe(one.operator),
        }
        for one in interventions
    ]


def _describe(operator: Operator | PerLayer) -> dict[str, Any]:
    kind = type(operator).__name__.lower()
    if isinstance(operator, PerLayer):
        layers = sorted(operator.operators.items())
        return {"operator": "per layer", "layers": {str(n): _describe(one) for n, one in layers}}
    if isinstance(operator, Add):
        details: dict[str, Any] = {"coefficient": float(operator.coefficient)}
    elif isinstance(operator, Ablate):
        toward = operator.toward
        details = {"toward": None if toward is None else hash_tensor(toward)}
    elif isinstance(operator, Cap):
        details = {"threshold": float(operator.threshold), "side": operator.side}
    elif isinstance(operator, Shift):
        details = {"amount": operator.name}
    else:
        return {"operator": kind, "values": hash_tensor(operator.values)}
    return {"operator": kind, "vector": hash_tensor(operator.vector), **details}


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's shape and of its values in float64, shortened."""
    dense = tensor.detach().to("cpu", torch.float64).contiguous()
    digest = hashlib.sha256(f"{tuple(dense.shape)}".encode())
    # Adding zero makes the two zeros one.
    digest.update((dense + 0.0).numpy().tobytes())
    return digest.hexdigest()[:32]
