"""Clocks, power and load of a GPU while a row runs, from the driver's own tool."""

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
LOAD = "utilization.gpu"
"""Percent of the last moments in which a kernel ran; samples of an idle device say nothing."""
BUSY = 50.0
PERIOD_MS = 500
"""Between two samples."""


class GpuSamples(list[dict[str, float]]):
    """What was read of a GPU, sample by sample."""

    def describe(self) -> dict[str, float]:
        """Median and extremes of the samples of a busy device; empty where there are none."""
        busy = [one for one in self if one.get(LOAD, 0.0) >= BUSY]
        found: dict[str, float] = {"samples": len(busy)} if busy else {}
        for name in FIELDS:
            values = [one[name] for one in busy if name in one]
            if values:
                found[name] = statistics.median(values)
                found |= {f"{name}, least": min(values), f"{name}, most": max(values)}
        return found


@contextmanager
def watch_gpu(device: str) -> Iterator[GpuSamples]:
    """Sample a GPU while the context lasts; read the samples after it.

    Args:
        device: ``cpu`` watches nothing, and neither does a machine without ``nvidia-smi``.
    """
    samples = GpuSamples()
    tool = shutil.which("nvidia-smi")
    if device == "cpu" or tool is None:
        yield samples
        return
    asked = [tool, f"--id={device_id()}", f"--query-gpu={','.join((*FIELDS, LOAD))}"]
    asked += ["--format=csv,noheader,nounits", f"--loop-ms={PERIOD_MS}"]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(asked, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield samples
        finally:
            process.terminate()
            process.wait(timeout=60)
            out.seek(0)
            samples.extend(read_samples(out.read().decode().splitlines()))


def device_id() -> str:
    """What the driver calls the current device, whatever number torch gives it."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def read_samples(lines: Sequence[str]) -> list[dict[str, float]]:
    """Numbers by field; a field that the driver does not tell, or a cut line, is left out."""
    samples = []
    for line in lines:
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(FIELDS) + 1:
            continue
        named = zip((*FIELDS, LOAD), values, strict=True)
        samples.append({name: float(v) for name, v in named if v.replace(".", "", 1).isdigit()})
    return samples


def find_driver() -> str:
    """The driver's version, or nothing where its tool is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, f"--id={device_id()}", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip()
