"""What a benchmark found: figures with aims and verdicts, as a table and as one JSON object."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.settings import Settings
from benchmarks.timing import Ratio

SCHEMA = "emlens-benchmarks/1"
PACKAGES = ("emlens-interp", "torch", "transformers", "transformer-lens", "peft")
Verdict = Literal["met", "missed", "undecided", ""]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One ratio: of what, which way is better, and what was hoped for."""

    name: str
    """For instance ``batch 1: vs_huggingface``."""
    dtype: str
    ratio: Ratio
    better: Literal["higher", "lower"]
    aim: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Met or missed only if the whole interval lies on one side of the aim."""
        if self.aim is None:
            return ""
        low, high = self.ratio.low, self.ratio.high
        if self.better == "lower":
            low, high = -high, -low
        aim = self.aim if self.better == "higher" else -self.aim
        if low >= aim:
            return "met"
        return "missed" if high < aim else "undecided"


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that one benchmark found."""

    row: str
    settings: Settings
    sizes: Mapping[str, Any]
    """Of the model and the work."""
    figures: Sequence[Figure]
    headline: Mapping[str, str]
    """Key in ``ratios`` -> name of the figure it is the median of, in the first dtype."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Medians by case, dtype and side; they mean something beside one another only."""
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    """Peak memory of a process that runs one side alone, by dtype, side and kind of memory."""
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The whole record as plain values."""
        first = self.figures[0].dtype
        medians = {f.name: f.ratio.median for f in self.figures if f.dtype == first}
        return {
            "schema": SCHEMA,
            "row": self.row,
            "size": self.settings.size,
            "device": describe_device(self.settings.device),
            "machine": describe_machine(self.settings.device),
            "threads": self.settings.threads,
            "shape": self.settings.shape if self.settings.device != "cpu" else None,
            "clock": self.settings.clock,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
            "sizes": dict(self.sizes),
            "ratios": {key: medians[name] for key, name in self.headline.items()},
            "figures": [asdict(f) | {"verdict": f.verdict} for f in self.figures],
            "seconds": dict(self.seconds),
            "peak_bytes": dict(self.peak_bytes),
            "notes": list(self.notes),
        }


def describe_device(device: str) -> str:
    """A GPU's name, or the processor's."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()})"


_GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Instructions that decide how fast products are."""


def describe_machine(device: str) -> dict[str, Any]:
    """What a time depends on: the processor and its instructions, or a GPU, its clocks and power.

    Read right after a measurement, so that clocks and power are those of a busy device.
    """
    if device != "cpu":
        named = dict(zip(_GPU_FIELDS, _ask_gpu(_GPU_FIELDS), strict=False))
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        memory = torch.cuda.get_device_properties(0).total_memory
        return named | {"cuda": torch.version.cuda, "capability": capability, "bytes": memory}
    page = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if page.exists():
        lines = [line.partition(":") for line in page.read_text(encoding="utf-8").splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "processor": facts.get("model name", platform.processor()),
        "instructions": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
    }


def _ask_gpu(fields: Sequence[str]) -> list[str]:
    """The driver's own words, with units; nothing where its tool is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    index = torch.cuda.current_device()
    lines = found.stdout.strip().splitlines()
    return lines[min(index, len(lines) - 1)].split(", ") if lines else []


def format_table(record: Record) -> str:
    """One line a figure: what, dtype, median and interval, aim, verdict."""
    lines = [
        f"{record.row} ({record.settings.size}, {record.settings.device}, "
        f"{record.settings.threads} threads, {record.settings.clock} clock)"
    ]
    width = max(len(figure.name) for figure in record.figures)
    for figure in record.figures:
        ratio, sign = figure.ratio, ">=" if figure.better == "higher" else "<="
        interval = "" if ratio.pairs == 1 else f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        aim = "" if figure.aim is None else f"{sign} {figure.aim:g} {figure.verdict}"
        lines.append(
            f"  {figure.name:<{width}}  {figure.dtype:<8}  {ratio.median:>8.3f} {interval:<18} "
            f"{aim}".rstrip()
        )
    return "\n".join([*lines, *(f"  note: {note}" for note in record.notes)])


def format_line(record: Record) -> str:
    """The record as one line of JSON."""
    return json.dumps(record.to_json())


def find_slowdowns(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name each figure whose new interval lies wholly on the worse side of its old interval.

    Args:
        old: a record as ``to_json`` gave it, in an earlier run.
        new: one of the same row.

    Raises:
        ValueError: records of different rows, sizes, devices, threads or clocks.
    """
    for key in ("row", "size", "device", "threads", "clock", "shape"):
        if old.get(key) != new.get(key):
            raise ValueError(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now; no comparison")
    before = {(f["name"], f["dtype"]): f for f in old["figures"]}
    found = []
    for figure in new["figures"]:
        was = before.get((figure["name"], figure["dtype"]))
        if was is None:
            continue
        then, now = was["ratio"], figure["ratio"]
        worse = (
            now["high"] < then["low"] if figure["better"] == "higher" else now["low"] > then["high"]
        )
        if worse:
            found.append(
                f"{new['row']}: {figure['name']} ({figure['dtype']}) was {then['median']:.3f} "
                f"[{then['low']:.3f}, {then['high']:.3f}], is {now['median']:.3f} "
                f"[{now['low']:.3f}, {now['high']:.3f}]"
            )
    return found
