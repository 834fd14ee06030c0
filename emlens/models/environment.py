"""What this machine has: versions against the tested ranges, devices, caches, the demo's model.

Nothing is loaded or fetched, and no weights are opened.
"""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from emlens.artifacts import Result
from emlens.models.checkpoints import cache_folder, gguf_folder
from emlens.sources import SourceError, locate_source

DISTRIBUTION = "emlens-interp"
CHECKED = ("torch", "transformers", "transformer-lens", "peft", "safetensors", "huggingface-hub")
DEMO_MODEL = "emlens:smollm2"

Verdict = Literal["tested", "outside", "missing", "unknown"]


@dataclass(frozen=True, kw_only=True)
class VersionCheck:
    """One package and the versions it is tested with."""

    name: str
    installed: str | None
    tested: str | None
    """Range that the installed package declares, such as `>=3.9,<4`."""
    verdict: Verdict
    """`unknown`: there is no declaration to compare with."""


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """A place where models can be."""

    name: str
    total_bytes: int
    free_bytes: int | None
    """None where it cannot be told."""


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """A folder of downloads or conversions."""

    name: str
    path: str
    n_bytes: int
    """Of the files in it; 0 where it does not exist."""
    free_bytes: int
    """On its disk."""


@dataclass(frozen=True, kw_only=True)
class Environment(Result):
    """Whether emlens will work here."""

    kind: ClassVar[str] = "environment"

    versions: tuple[VersionCheck, ...]
    devices: tuple[DeviceState, ...]
    threads: int
    """That torch uses on the processor."""
    caches: tuple[CacheState, ...]
    demo_model: str | None
    """File of the demo's model, or None where its package is not installed."""
    demo_model_ready: bool
    """Whether it has been dequantised already."""
    hub_offline: bool
    """Whether the Hub is left alone (`HF_HUB_OFFLINE`)."""

    @property
    def verdict(self) -> Verdict:
        """The worst of the versions' verdicts; what is unknown counts after what is wrong."""
        found = {check.verdict for check in self.versions}
        worst: tuple[Verdict, ...] = ("outside", "missing", "unknown")
        for verdict in worst:
            if verdict in found:
                return verdict
        return "tested"

    def rows(self) -> list[dict[str, Any]]:
        """One row a version."""
        return [dataclasses.asdict(check) for check in self.versions]


def check_environment() -> Environment:
    """Look at versions, devices and caches."""
    model = _find_demo_model()
    return Environment(
        versions=check_versions(),
        devices=(_memory(), *_gpus()),
        threads=torch.get_num_threads(),
        caches=tuple(_cache(name, path) for name, path in _cache_folders().items()),
        demo_model=None if model is None else str(model),
        demo_model_ready=model is not None and (gguf_folder(model) / "config.json").exists(),
        hub_offline=_is_offline(),
    )


def check_versions(distribution: str = DISTRIBUTION) -> tuple[VersionCheck, ...]:
    """Compare Python and the libraries with what an installed distribution declares."""
    try:
        lines = importlib.metadata.requires(distribution) or []
        described = importlib.metadata.metadata(distribution).json
        python = str(described.get("requires_python") or "")
    except importlib.metadata.PackageNotFoundError:
        lines, python = [], ""
    declared = {r.name.lower(): str(r.specifier) for r in map(Requirement, lines) if not r.marker}
    checks = [judge_version("python", platform.python_version(), python)]
    checks += [judge_version(name, _installed(name), declared.get(name)) for name in CHECKED]
    return tuple(checks)


def judge_version(name: str, installed: str | None, tested: str | None) -> VersionCheck:
    """Judge one version; builds such as `2.13.0+cpu` and pre-releases count as their release."""
    verdict: Verdict = "unknown"
    if installed is None:
        verdict = "missing"
    elif tested:
        release = Version(Version(installed).base_version)
        verdict = "tested" if release in SpecifierSet(tested) else "outside"
    return VersionCheck(name=name, installed=installed, tested=tested or None, verdict=verdict)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> DeviceState:
    page = os.sysconf("SC_PAGE_SIZE")
    available = _available_memory()
    return DeviceState(
        name=f"cpu ({platform.machine()}, {os.cpu_count()} cores)",
        total_bytes=page * os.sysconf("SC_PHYS_PAGES"),
        free_bytes=available,
    )


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _gpus() -> list[DeviceState]:
    states = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        states.append(DeviceState(name=name, total_bytes=total, free_bytes=free))
    return states


def _cache_folders() -> dict[str, Path]:
    from huggingface_hub import constants

    return {"emlens": cache_folder(), "hub": Path(constants.HF_HUB_CACHE)}


def _cache(name: str, path: Path) -> CacheState:
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return CacheState(
        name=name,
        path=str(path),
        n_bytes=_folder_bytes(path),
        free_bytes=shutil.disk_usage(existing).free,
    )


def _folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; links count as nothing."""
    return sum(
        (Path(root) / name).lstat().st_size
        for root, _, names in os.walk(folder)
        for name in names
        if not (Path(root) / name).is_symlink()
    )


def _find_demo_model() -> Path | None:
    try:
        return locate_source(DEMO_MODEL)
    except SourceError:
        return None


def _is_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())
