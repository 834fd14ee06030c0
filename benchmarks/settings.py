"""At what size, where and how often a benchmark is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Size = Literal["toy", "full"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FULL_ROUNDS = 15
TOY_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all benchmarks of one run have in common."""

    size: Size
    device: str = "cpu"
    threads: int = 2
    rounds: int = FULL_ROUNDS
    """Pairs behind every ratio."""

    @property
    def full(self) -> bool:
        """Whether the real model is used, and peak memory measured for every side."""
        return self.size == "full"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Both at full size; a GPU runs the large shapes in bfloat16 only."""
        if not self.full:
            return ("float32",)
        return ("float32", "bfloat16") if self.device == "cpu" else ("bfloat16",)

    def aim(self, value: float | None) -> float | None:
        """An aim at full size; what a toy takes is overhead, and is held to none."""
        return value if self.full else None

    def arguments(self) -> Sequence[str]:
        """The same settings as a child process reads them."""
        return (self.size, self.device, str(self.threads))


def make_settings(
    size: Size, *, suite: str = "cpu", rounds: int | None = None, threads: int | None = None
) -> Settings:
    """Settle what was left open, and refuse a suite that cannot run here.

    Raises:
        RuntimeError: the GPU suite without a CUDA device.
    """
    if suite == "gpu" and not torch.cuda.is_available():
        raise RuntimeError(
            "--suite gpu needs a CUDA device, and torch sees none (torch.cuda.is_available() is "
            "False); run --suite cpu here, or install torch's CUDA build on a machine with a GPU"
        )
    return Settings(
        size=size,
        device="cuda" if suite == "gpu" else "cpu",
        threads=threads or (2 if size == "full" else 1),
        rounds=rounds or (FULL_ROUNDS if size == "full" else TOY_ROUNDS),
    )
