"""What the machine itself can do, timed in the rounds of a row: bytes read and products a second.

Shares of these say how much is left to be had on this very machine, at this very hour.
"""

from collections.abc import Callable

import torch

from benchmarks.settings import DTYPES, Settings
from emlens.models.products import multiply

READ = {("toy", "cpu"): 1 << 24, ("full", "cpu"): 1 << 29, ("full", "cuda"): 1 << 31}
"""Bytes read at once: at full size many times what any cache holds."""
WIDTH = {("toy", "cpu"): 128, ("full", "cpu"): 1024, ("full", "cuda"): 8192}
"""Of the square matrices: the product is as fast as such products become."""


def read_memory(settings: Settings) -> tuple[Callable[[], None], int]:
    """(a side that reads so many bytes once, as a sum of float32; how many)."""
    size = READ.get((settings.size, settings.device), READ["toy", "cpu"])
    held = torch.ones(size // 4, dtype=torch.float32, device=settings.device)

    @torch.inference_mode()
    def run() -> None:
        held.sum()

    return run, size


def multiply_squares(dtype: str, settings: Settings) -> tuple[Callable[[], None], int]:
    """(a side that multiplies two square matrices once; its flops)."""
    width = WIDTH.get((settings.size, settings.device), WIDTH["toy", "cpu"])
    x, weight = (
        torch.randn(width, width, device=settings.device).to(DTYPES[dtype]) for _ in range(2)
    )

    @torch.inference_mode()
    def run() -> None:
        multiply(x, weight, loose=True)

    return run, 2 * width**3
