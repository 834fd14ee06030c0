"""At what size, where and how often a benchmark is run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from benchmarks.timing import MIN_PAIRS

Size = Literal["toy", "full"]
Clock = Literal["wall", "cpu"]
Shape = Literal["0.5b", "7b", "14b"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
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
    clock: Clock = "wall"
    """``cpu`` counts this process's own processor time: for one thread on a busy machine."""
    only_dtype: str | None = None
    """One of the dtypes, where not all are wanted."""
    only_batch: int | None = None
    """Rows run at once, in the rows of the suite that time several such numbers."""
    shape: Shape = "7b"
    """On a GPU: of which Qwen2.5 the random weights have the shapes."""

    @property
    def full(self) -> bool:
        """Whether the real model is used, and peak memory measured for every side."""
        return self.size == "full"

    def read_clock(self) -> float:
        """Seconds on the clock chosen."""
        return time.perf_counter() if self.clock == "wall" else time.process_time()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Both at full size; a GPU runs the large shapes in bfloat16 only."""
        if self.only_dtype:
            return (self.only_dtype,)
        if not self.full:
            return ("float32",)
        return ("float32", "bfloat16") if self.device == "cpu" else ("bfloat16",)

    def batches(self, usual: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers of rows that are run at once: the usual ones, or the one asked for."""
        return usual if self.only_batch is None else (self.only_batch,)

    def aim(self, value: float | None) -> float | None:
        """An aim at full size; what a toy takes is overhead, and is held to none."""
        return value if self.full else None

    def arguments(self) -> Sequence[str]:
        """The same settings as a child process reads them."""
        return (self.size, self.device, str(self.threads), self.shape, str(self.only_batch or 0))

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "Settings":
        """Read what `arguments` wrote; rounds, clock and dtype are no business of a child's."""
        size, device, threads, shape, batch = arguments
        return cls(
            size=cast(Size, size),
            device=device,
            threads=int(threads),
            shape=cast(Shape, shape),
            only_batch=int(batch) or None,
        )


def check_settings(settings: Settings) -> Settings:
    """Refuse settings that cannot be met here.

    Raises:
        RuntimeError: a GPU without a CUDA device, processor time of what runs beside it, too few
            rounds for an interval, or a batch without rows.
    """
    if settings.rounds < MIN_PAIRS:
        raise RuntimeError(
            f"--rounds {settings.rounds}: expected at least {MIN_PAIRS}; no interval of fewer "
            "ratios covers their median at 95 %"
        )
    if settings.only_batch is not None and settings.only_batch < 1:
        raise RuntimeError(f"--batch {settings.only_batch}: expected at least one row")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "--suite gpu needs a CUDA device, and torch sees none (torch.cuda.is_available() is "
            "False); run --suite cpu here, or install torch's CUDA build on a machine with a GPU"
        )
    if settings.clock == "cpu" and (settings.device != "cpu" or settings.threads != 1):
        raise RuntimeError(
            f"--clock cpu with {settings.threads} threads on {settings.device}: processor time "
            "stands for time only with --threads 1 on a CPU; waiting threads spend it too"
        )
    return settings
