"""What a benchmark found: figures with aims and verdicts, as a table and as one JSON object."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.gpu import find_driver
from benchmarks.settings import Settings
from benchmarks.timing import Ratio
from benchmarks.work import Work

SCHEMA = "emlens-benchmarks/2"
PACKAGES = (
    *("emlens-interp", "torch", "transformers", "transformer-lens", "peft", "sae-lens"),
    "nnsight",
)
ROOT = Path(__file__).resolve().parents[1]
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
    peak_sides: Sequence[str] = ()
    """Sides whose peak memory is measured once the row itself holds none."""
    work: Mapping[str, Work] = field(default_factory=dict)
    """FLOPs and bytes by formula, under the keys of `seconds`."""
    gpu: Mapping[str, float] = field(default_factory=dict)
    """Clocks (MHz), power (W) and temperature of a GPU while it was busy; see `watch_gpu`."""
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The whole record as plain values."""
        first = self.figures[0].dtype
        medians = {f.name: f.ratio.median for f in self.figures if f.dtype == first}
        return {
            "schema": SCHEMA,
            "row": self.row,
            **describe_settings(self.settings),
            "machine": describe_machine(self.settings.device) | dict(self.gpu),
            "versions": {"python": platform.python_version(), "commit": find_commit()}
            | {package: found for package in PACKAGES if (found := _find_version(package))},
            "sizes": dict(self.sizes),
            "ratios": {key: medians[name] for key, name in self.headline.items()},
            "figures": [asdict(f) | {"verdict": f.verdict} for f in self.figures],
            "seconds": dict(self.seconds),
            "work": {key: self._describe_work(key, work) for key, work in self.work.items()},
            "peak_bytes": dict(self.peak_bytes),
            "notes": list(self.notes),
        }

    def _describe_work(self, key: str, work: Work) -> dict[str, float]:
        """Work, and how much of it is done a second."""
        found: dict[str, float] = {"flops": work.flops, "bytes": work.bytes}
        if key in self.seconds:
            taken = self.seconds[key]
            found |= {"flop_per_s": work.flops / taken, "bytes_per_s": work.bytes / taken}
        return found


COMPARED = ("size", "device", "threads", "shape", "clock")


def describe_settings(settings: Settings) -> dict[str, Any]:
    """What two runs must have in common to be compared."""
    return {
        "size": settings.size,
        "device": describe_device(settings.device),
        "threads": settings.threads,
        "shape": settings.shape if settings.device != "cpu" else None,
        "clock": settings.clock,
    }


def check_comparable(old: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to compare with a record made under other settings.

    Args:
        old: the record.
        now: what `describe_settings` says of this run.

    Raises:
        ValueError: another size, device, number of threads, shape or clock.
    """
    for key, value in now.items():
        then = old.get(key)
        if then != value:
            raise ValueError(f"{key}: {then!r} then, {value!r} now; no comparison")


def find_commit() -> str:
    """The commit measured, with a plus sign where files differ from it; empty if unknown."""
    asked = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except OSError:
        return ""
    return found.stdout.strip()


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def describe_device(device: str) -> str:
    """A GPU's name, or the processor's."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"cpu ({_read_processor().get('model name', platform.machine())})"


_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Instructions that decide how fast products are."""


def describe_machine(device: str) -> dict[str, Any]:
    """What a time depends on: the processor and its instructions, or the GPU."""
    if device != "cpu":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return {
            "driver": find_driver(),
            "cuda": torch.version.cuda,
            "capability": capability,
            "bytes": memory,
        }
    facts = _read_processor()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "processor": facts.get("model name", platform.processor()),
        "instructions": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
    }


def _read_processor() -> dict[str, str]:
    page = Path("/proc/cpuinfo")
    if not page.exists():
        return {}
    lines = [line.partition(":") for line in page.read_text(encoding="utf-8").splitlines()]
    return {key.strip(): value.strip() for key, _, value in lines}


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

    One that was measured once has no interval: it is named if it met its aim and misses it now.

    Args:
        old: a record as ``to_json`` gave it, in an earlier run.
        new: one of the same row.

    Raises:
        ValueError: records of different rows; see `check_comparable`.
    """
    if old["row"] != new["row"]:
        raise ValueError(f"row: {old['row']!r} then, {new['row']!r} now; no comparison")
    check_comparable(old, {key: new.get(key) for key in COMPARED})
    before = {(f["name"], f["dtype"]): f for f in old["figures"]}
    found = []
    for figure in new["figures"]:
        was = before.get((figure["name"], figure["dtype"]))
        if was is None:
            continue
        then, now = was["ratio"], figure["ratio"]
        if _is_worse(was, figure):
            found.append(
                f"{new['row']}: {figure['name']} ({figure['dtype']}) was {then['median']:.3f} "
                f"[{then['low']:.3f}, {then['high']:.3f}], is {now['median']:.3f} "
                f"[{now['low']:.3f}, {now['high']:.3f}]"
            )
    return found


def _is_worse(was: Mapping[str, Any], figure: Mapping[str, Any]) -> bool:
    then, now = was["ratio"], figure["ratio"]
    if not (then["coverage"] and now["coverage"]):
        return (was["verdict"], figure["verdict"]) == ("met", "missed")
    if figure["better"] == "higher":
        return now["high"] < then["low"]
    return now["low"] > then["high"]
