"""A folder for one run, in which only the same plan goes on; not for single results."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emlens import __version__
from emlens.artifacts import (
    JSON_NAME,
    AnyResult,
    Result,
    read_json,
    read_result,
    write_json_atomic,
)
from emlens.encoding import ArtifactError, dotted, encode

_MANIFEST_NAME = "manifest.json"
_RUN_SCHEMA = "emlens/run/1"
_RESULT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Stands for a setting that one of two plans does not have.
_ABSENT = object()


class PlanChangedError(ArtifactError):
    """A run folder was made by another plan than the one it is asked to go on with."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A folder for one run: `manifest.json` with its plan, and `results/`.

    Attributes:
        path: The folder.
        plan: Every setting that decides what the run computes, as JSON values.
    """

    path: Path
    plan: Mapping[str, Any]

    @classmethod
    def start(cls, path: str | Path, plan: Mapping[str, Any]) -> "RunFolder":
        """Begin a run in a new or empty folder, or go on with one of the same plan.

        Args:
            path: The folder; its parents are made.
            plan: Settings: plain values, frozen dataclasses, and tuples, lists and dicts of these.

        Raises:
            PlanChangedError: The folder holds a run of another plan; all differences are named.
            ArtifactError: The folder holds something else, or its manifest is damaged.
        """
        folder = cls.check(path, plan)
        if not folder._manifest.exists():
            manifest = {"schema": _RUN_SCHEMA, "emlens_version": __version__, "plan": folder.plan}
            write_json_atomic(folder._manifest, manifest)
        return folder

    @classmethod
    def check(cls, path: str | Path, plan: Mapping[str, Any]) -> "RunFolder":
        """What `start` would return or refuse; nothing is written.

        For a command that may still find its input wrong: a folder that it had begun would refuse
        the corrected one.
        """
        folder = cls(Path(path), encode(plan, "plan"))
        if folder._manifest.exists():
            recorded = cls.open(path)
            if changes := _differences(recorded.plan, folder.plan):
                raise PlanChangedError(
                    f"{path} holds a run of another plan: {'; '.join(changes)}. Give the plan that "
                    "it was begun with to go on, or another folder to begin anew"
                )
            return recorded
        folder._check_empty()
        return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """A run that was begun earlier, to be read.

        Raises:
            ArtifactError: The folder holds no run, or its manifest is damaged.
        """
        file = Path(path) / _MANIFEST_NAME
        if not file.exists():
            raise ArtifactError(
                f"{path} is no run folder (it has no {_MANIFEST_NAME}); expected one that a "
                "command wrote to --out"
            )
        manifest = read_json(file)
        plan = manifest.get("plan")
        if manifest.get("schema") != _RUN_SCHEMA or not isinstance(plan, dict):
            raise ArtifactError(
                f"{path}: {_MANIFEST_NAME} has schema {manifest.get('schema')!r} and a plan of "
                f"type {type(plan).__name__}, expected {_RUN_SCHEMA!r} and an object"
            )
        return cls(Path(path), plan)

    def result_folder(self, name: str) -> Path:
        """Where the result of a name is saved: a plain name, not a path."""
        if not _RESULT_NAME.fullmatch(name):
            raise ValueError(
                f"name is {name!r}, expected letters, digits, '.', '_' and '-', none of '.-' first"
            )
        return self.path / "results" / name

    def save_result(self, name: str, result: Result) -> Path:
        """Save a result under a name; one saved before is replaced."""
        return result.save(self.result_folder(name))

    def has_result(self, name: str) -> bool:
        """Whether a result of that name was saved to the end."""
        return (self.result_folder(name) / JSON_NAME).is_file()

    def read_result(self, name: str, cls: type[AnyResult]) -> AnyResult:
        """The result of that name; errors as for `read_result`."""
        return read_result(self.result_folder(name), cls)

    def result_names(self) -> tuple[str, ...]:
        """Names of the results saved to the end, sorted."""
        found = (file.parent.name for file in self.path.glob(f"results/*/{JSON_NAME}"))
        return tuple(sorted(found))

    @property
    def _manifest(self) -> Path:
        return self.path / _MANIFEST_NAME

    def _check_empty(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ArtifactError(f"{self.path} is a file, expected a folder for a run")
        strangers = [p.name for p in self.path.glob("*") if p.suffix != ".tmp"]
        if strangers:
            raise ArtifactError(
                f"{self.path} holds {sorted(strangers)[:3]} but no {_MANIFEST_NAME}: it is not a "
                "run folder, and a run is only begun in an empty one"
            )


def _differences(recorded: Any, asked: Any, where: str = "") -> list[str]:
    """What differs between two plans, one line a setting."""
    if isinstance(recorded, Mapping) and isinstance(asked, Mapping):
        names = dict.fromkeys([*recorded, *asked])
        return [
            line
            for name in names
            for line in _differences(
                recorded.get(name, _ABSENT), asked.get(name, _ABSENT), dotted(where, name)
            )
        ]
    if isinstance(recorded, list) and isinstance(asked, list) and len(recorded) == len(asked):
        pairs = enumerate(zip(recorded, asked, strict=True))
        return [line for n, (old, new) in pairs for line in _differences(old, new, f"{where}[{n}]")]
    same = recorded == asked and isinstance(recorded, bool) == isinstance(asked, bool)
    return [] if same else [f"{where} was {_short(recorded)}, now {_short(asked)}"]


def _short(value: object, limit: int = 80) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
