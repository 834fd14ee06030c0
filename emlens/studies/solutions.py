"""What a narrow task was learnt by, an adapter or one vector, in the terms of a comparison.

For a fine-tune of every parameter there is nothing to rescale or to turn.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.null import (
    measure_adapter_norm,
    perturb_adapter,
    sample_null_adapters,
    turn_tensor,
)
from emlens.models.protocol import HookedModel
from emlens.models.trained_vector import add_vector, is_vector, load_vector
from emlens.sources import Source
from emlens.vectors import Direction


@dataclass(frozen=True)
class VectorSolution:
    """A trained vector with a name, as an adapter has one."""

    name: str
    direction: Direction

    @cached_property
    def fingerprint(self) -> str:
        """Hash of its site and its entries; 32 digits."""
        digest = hashlib.sha256(str(self.direction.site).encode())
        digest.update(self.direction.vector.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def replaced(self, vector: torch.Tensor, name: str) -> "VectorSolution":
        """Another vector in its place."""
        return VectorSolution(name, dataclasses.replace(self.direction, vector=vector))


Solution = LoraAdapter | VectorSolution


def load_solution(source: Source | str) -> Solution:
    """Read an adapter, or the folder of a trained vector.

    Raises:
        ValueError: neither, or a damaged one.
        SourceError: there is no such source.
    """
    if is_vector(source):
        return VectorSolution(str(source), load_vector(source))
    return load_adapter(source)


def attach_solution(base: HookedModel, solution: Solution) -> Any:
    """A model that shares the base's weights and does what the solution does.

    Raises:
        ValueError: the base does not fit it.
    """
    host: Any = base
    if isinstance(solution, VectorSolution):
        return add_vector(host, solution.direction, name=solution.name)
    return attach_adapter(host, solution)


def scale_solution(solution: Solution, factor: float) -> Solution:
    """What it does multiplied by a factor: of an adapter B is, of a vector every entry."""
    if isinstance(solution, VectorSolution):
        name = f"{solution.name} x {factor:g}"
        return solution.replaced(solution.direction.vector * factor, name)
    return scale_adapter(solution, factor)


def measure_solution_norm(solution: Solution) -> float:
    """Mean over modules of ||scale B A||_F, or the length of a vector."""
    if isinstance(solution, VectorSolution):
        return float(torch.linalg.vector_norm(solution.direction.vector.double()))
    return measure_adapter_norm(solution)


def perturb_solution(solution: Solution, *, epsilon: float, seed: int) -> Solution:
    """Turn every factor, or the vector, as `perturb_adapter` does.

    Args:
        solution: not changed.
        epsilon: from 0 (nothing) to 1 (nothing of it left).
        seed: of the random directions; the same ones at every epsilon.
    """
    if isinstance(solution, VectorSolution):
        generator = torch.Generator().manual_seed(seed)
        turned = turn_tensor(solution.direction.vector, epsilon, generator)
        return solution.replaced(turned, f"{solution.name} perturbed by {epsilon:g}")
    return perturb_adapter(solution, epsilon=epsilon, seed=seed)


def sample_null_solutions(like: Solution, *, n: int, seed: int) -> tuple[Solution, ...]:
    """Random adapters of its shapes and norms, or isotropic vectors of its very norm.

    Args:
        like: whose kind, place and norm they take.
        n: how many.
        seed: of the first; the k-th is the same whatever ``n``.
    """
    if not isinstance(like, VectorSolution):
        return sample_null_adapters(like, n=n, seed=seed)
    drawn = []
    for index in range(n):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        vector = torch.randn(like.direction.width, generator=generator)
        # Divided by its own norm: left out, it would be sqrt(d_model) times too long.
        vector = vector * (measure_solution_norm(like) / torch.linalg.vector_norm(vector))
        drawn.append(like.replaced(vector, f"null {index} of {like.name}"))
    return tuple(drawn)


def check_solutions(base: HookedModel, solutions: Mapping[str, Solution]) -> None:
    """Refuse other solutions than a general and a narrow one of a base, both of one kind.

    Raises:
        ValueError: other names, two kinds, or one of another base.
    """
    if set(solutions) != {"general", "narrow"}:
        raise ValueError(f"solutions: got {sorted(solutions)}, expected 'general' and 'narrow'")
    kinds = {isinstance(one, VectorSolution) for one in solutions.values()}
    if len(kinds) > 1:
        raise ValueError(
            "solutions: got an adapter and a vector, expected two of one kind: their norms say "
            "nothing about each other"
        )
    for solution in solutions.values():
        attach_solution(base, solution)
