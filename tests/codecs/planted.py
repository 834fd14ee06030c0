"""Activations with known latents: sparse codes of unit vectors, and a little noise."""

import torch
from torch import Tensor

STRENGTH = 5.0
"""Codes lie between this and its double."""
NOISE = 0.02


def draw_dictionary(n: int, d_in: int, *, seed: int = 0) -> Tensor:
    """Unit vectors [n d_in]."""
    vectors = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


class Planted:
    """Draws rows in which each vector is active with one probability.

    Args:
        dictionary: [n d_in].
        l0: vectors active at a row, on average.
        scales: [models n], how strong each vector is in each model; None for one model.
    """

    def __init__(
        self, dictionary: Tensor, *, l0: float, scales: Tensor | None = None, seed: int = 1
    ) -> None:
        self.dictionary, self.scales = dictionary, scales
        self.probability = l0 / len(dictionary)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, rows: int) -> Tensor:
        """Rows [rows d_in], or [models rows d_in]."""
        shape = (rows, len(self.dictionary))
        active = torch.rand(shape, generator=self.generator) < self.probability
        codes = STRENGTH * active * (1 + torch.rand(shape, generator=self.generator))
        scales = self.scales if self.scales is not None else torch.ones(1, shape[1])
        found = torch.einsum("nf,mf,fd->mnd", codes, scales, self.dictionary)
        found += NOISE * torch.randn(found.shape, generator=self.generator)
        return found if self.scales is not None else found[0]

    def corpus(self, rows: int, *, parts: int = 20) -> list[Tensor]:
        """Rows in some tensors."""
        return list(self.draw(rows).chunk(parts, dim=-2))


class CutShort(list):
    """A corpus whose reading is interrupted before one of its tensors, in one of its readings.

    A list is read once to count its rows, so that its second reading is the first pass.
    """

    def __init__(self, parts: list[Tensor], *, before: int, number: int = 2) -> None:
        super().__init__(parts)
        self.before, self.left = before, number

    def __iter__(self):
        self.left -= 1
        for number, part in enumerate(super().__iter__()):
            if self.left == 0 and number == self.before:
                raise KeyboardInterrupt
            yield part


def best_cosines(decoder: Tensor, dictionary: Tensor) -> Tensor:
    """Cosine of each planted vector to the nearest decoder vector."""
    unit = torch.nn.functional.normalize(decoder.float(), dim=1)
    return (dictionary @ unit.T).max(1).values
