"""Bytes: of tensors that a call leaves behind, and of a process that does one thing alone.

``python -m benchmarks.memory ROW SIDE DTYPE SIZE DEVICE THREADS SHAPE BATCH`` is the process: it
runs the row's ``steps`` and prints its resident bytes after each of them, and its peak.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every distinct storage behind some tensors, by address."""
    found = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and not tensor.is_sparse:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def live_tensors() -> list[Tensor]:
    """Every tensor that Python code can still reach."""
    gc.collect()
    objects = gc.get_objects()
    # By type, since isinstance asks lazy modules and deprecated aliases for their __class__.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Tensor)}
    return [item for item in objects if type(item) in kinds]


def count_new_bytes(make: Callable[[], object]) -> tuple[Any, int]:
    """Call and return (what it made, bytes of all tensor storage that is alive since).

    Counted over all live tensors rather than over the result's parameters, so that nothing hides
    in hooks, buffers or module-level tables.
    """
    held = live_tensors()  # kept, so that no address is used twice
    before = storages(held)
    made = make()
    after = storages(live_tensors())
    return made, sum(size for address, size in after.items() if address not in before)


@dataclass(frozen=True, kw_only=True)
class Residence:
    """Memory of a process that did one thing."""

    after: tuple[int, ...]
    """Bytes in use after each step: resident ones, or on a GPU those of tensors."""
    peaks: tuple[int, ...]
    """Most of them during each step; on systems where a peak cannot be reset, until its end."""
    counted: Mapping[str, int]
    """What the steps counted on the way."""
    gpu: Mapping[str, int]
    """Peak bytes on the GPU, `allocated` and `reserved`; empty on a CPU."""

    @property
    def peak(self) -> int:
        """Most bytes in use at any time, loading included."""
        return max(self.peaks)


def measure_residence(
    row: str, side: str, dtype: str, settings: Settings, *, mapped: bool = False
) -> Residence:
    """Run the steps of one side of a row in a process of its own.

    Args:
        row: the benchmark.
        side: one of what it measures.
        dtype: of the weights.
        settings: of the row.
        mapped: whether glibc maps every tensor of 64 KiB or more on its own, so that resident
            bytes are those of tensors and no heap keeps what is free; slower.

    Raises:
        RuntimeError: the process failed; its own words are quoted.
    """
    command = [sys.executable, "-m", "benchmarks.memory", row, side, dtype, *settings.arguments()]
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(1 << 16)} if mapped else {})
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Residence(**(found | {name: tuple(found[name]) for name in ("after", "peaks")}))


def resident_bytes() -> int:
    """Resident bytes of this process once freed memory has gone back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def free_memory() -> None:
    """Give back what nobody refers to, on a GPU to other processes too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Let the peak resident bytes of this process begin anew, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes() -> int:
    """Peak resident bytes of this process.

    On Linux from the process's own page, because ``ru_maxrss`` begins with that of the parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Run one side's steps and print what they occupied."""
    row, side, dtype, *given = sys.argv[1:]
    settings = Settings.from_arguments(given)
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    module = importlib.import_module(f"benchmarks.{row}")
    after: list[int] = []
    peaks: list[int] = []
    reserved = 0
    counted: dict[str, int] = {}
    for found in module.steps(side, dtype, settings):
        if settings.device == "cpu":
            peaks.append(peak_bytes())
            after.append(resident_bytes())
            reset_peak()
        else:
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated())
            after.append(torch.cuda.memory_allocated())
            reserved = max(reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        counted |= found
    gpu = {} if settings.device == "cpu" else {"allocated": max(peaks), "reserved": reserved}
    print(json.dumps({"after": after, "peaks": peaks, "counted": counted, "gpu": gpu}))


if __name__ == "__main__":
    main()
