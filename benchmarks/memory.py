"""Bytes: of tensors that a call leaves behind, and of a process that does one thing alone.

``python -m benchmarks.memory ROW SIDE DTYPE SIZE DEVICE THREADS SHAPE`` is the process: it runs the
row's ``steps`` and prints its resident bytes after each of them, and its peak.
"""

import ctypes
import gc
import importlib
import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
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
    """Resident bytes after each step."""
    peak: int
    """Peak resident bytes, loading included."""
    counted: Mapping[str, int]
    """What the steps counted on the way."""
    gpu: Mapping[str, int]
    """Peak bytes on the GPU, `allocated` and `reserved`; empty on a CPU."""


def measure_residence(row: str, side: str, dtype: str, settings: Settings) -> Residence:
    """Run the steps of one side of a row in a process of its own.

    Raises:
        RuntimeError: the process failed; its own words are quoted.
    """
    command = [sys.executable, "-m", "benchmarks.memory", row, side, dtype, *settings.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Residence(**(found | {"after": tuple(found["after"])}))


def resident_bytes() -> int:
    """Resident bytes of this process once freed memory has gone back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def gpu_bytes() -> dict[str, int]:
    """Peak bytes of tensors, and of what the allocator has taken for them, on the GPU."""
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


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
    row, side, dtype, size, device, threads, shape = sys.argv[1:]
    settings = Settings(size=size, device=device, threads=int(threads), shape=shape)  # pyright: ignore[reportArgumentType]
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    module = importlib.import_module(f"benchmarks.{row}")
    after: list[int] = []
    counted: dict[str, int] = {}
    for found in module.steps(side, dtype, settings):
        after.append(resident_bytes())
        counted |= found
    gpu = {} if device == "cpu" else gpu_bytes()
    print(json.dumps({"after": after, "peak": peak_bytes(), "counted": counted, "gpu": gpu}))


if __name__ == "__main__":
    main()
