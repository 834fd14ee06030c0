"""Results on disk, whole or not at all; not for weights, captured activations or logs.

A saved result is a folder: `result.json` holds its fields, `tensors-DIGEST.safetensors` its
tensors. The class is given by whoever reads and its annotations say what each field must be, so
that no file can name code to run.
"""

import dataclasses
import hashlib
import html
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from emlens import __version__
from emlens.encoding import ArtifactError, Decoder, encode_fields, field_names

JSON_NAME = "result.json"
# What a tensor file is called that does not name its digest: read, no longer written.
_PLAIN_TENSORS = "tensors.safetensors"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TENSORS_NAME = re.compile(r"tensors(-[0-9a-f]{16})?\.safetensors")
# What a saved result holds beside its fields.
_HEADER = ("schema", "emlens_version", "tensors_sha256")
# Rows that a notebook shows of a result.
_HTML_ROWS = 20
_SCALARS = (str, bool, int, float, type(None))


def write_text_atomic(path: str | Path, text: str) -> Path:
    """Write UTF-8 text so that a reader finds the old file or the new one, never a part."""
    return _write_atomic(Path(path), lambda file: file.write_text(text, encoding="utf-8"))


def write_json_atomic(path: str | Path, value: Any) -> Path:
    """Write indented JSON like `write_text_atomic`; NaN and infinities are refused (ValueError)."""
    return write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors_atomic(
    path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file like `write_text_atomic`; shared or strided storage is copied.

    Args:
        path: Where.
        tensors: Name -> tensor, on any device.
        metadata: Short texts for the header; `format: pt` is always there, as loaders expect it.
    """
    storages: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        storage = dense.untyped_storage().data_ptr()
        plain[name] = dense.clone() if storage in storages else dense
        storages.add(storage)
    header = {"format": "pt", **(metadata or {})}
    return _write_atomic(
        Path(path), lambda file: safetensors.torch.save_file(plain, file, metadata=header)
    )


def _write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Base of all results: frozen, keyword-only dataclasses that save, load and show themselves.

    A field is a str, int, float, bool, None, a tensor annotated by jaxtyping, another dataclass, or
    a tuple, list, dict with str keys, Optional or Literal of these.

    Attributes:
        kind: Name of the result in files, `emlens/<kind>/1`.
    """

    kind: ClassVar[str]

    @classmethod
    def schema(cls) -> str:
        """What the `schema` field of its JSON says."""
        return f"emlens/{cls.kind}/1"

    def to_dict(self) -> dict[str, Any]:
        """One JSON object: schema, emlens_version, then the fields; tensors are nested lists."""
        fields = self._encoded(None)
        return {"schema": self.schema(), "emlens_version": __version__, **fields}

    def save(self, folder: str | Path) -> Path:
        """Write `result.json` and, where there are tensors, `tensors-DIGEST.safetensors`.

        A save over an older one that is cut short, by a kill or a full disk, leaves the older one.

        Returns:
            The folder.
        """
        folder = Path(folder)
        tensors: dict[str, Tensor] = {}
        fields = self._encoded(tensors)
        digest = _save_tensors(folder, tensors) if tensors else None
        header = (self.schema(), __version__, digest)
        # After the tensors, so that a result.json always names tensors that are there.
        write_json_atomic(folder / JSON_NAME, {**dict(zip(_HEADER, header, strict=True)), **fields})
        for file in folder.iterdir():
            if _TENSORS_NAME.fullmatch(file.name) and file.name != _name_tensors(digest):
                file.unlink(missing_ok=True)
        return folder

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for a table; here one row of the fields that are plain values."""
        row = {name: getattr(self, name) for name in field_names(self)}
        return [{name: value for name, value in row.items() if isinstance(value, _SCALARS)}]

    def _encoded(self, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
        fields = encode_fields(self, "", tensors)
        if taken := sorted(fields.keys() & set(_HEADER)):
            raise TypeError(f"{type(self).__name__} cannot name fields {taken}: the header does")
        return fields

    def _repr_html_(self) -> str:
        rows = self.rows()
        shown = rows[:_HTML_ROWS]
        columns = list(dict.fromkeys(name for row in shown for name in row))
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in columns) + "</tr>"
            for row in shown
        )
        more = f"<p>{len(rows) - len(shown)} more rows</p>" if len(rows) > len(shown) else ""
        caption = f"<caption>{html.escape(type(self).__name__)}</caption>"
        return f"<table>{caption}<tr>{head}</tr>{body}</table>{more}"


AnyResult = TypeVar("AnyResult", bound=Result)


def read_kind(path: str | Path) -> str:
    """Kind of the saved result at a path, as its schema states it; the rest is not looked at."""
    schema = read_json(_json_file(path)).get("schema")
    parts = schema.split("/") if isinstance(schema, str) else []
    if len(parts) != 3 or parts[0] != "emlens" or not parts[2].isdigit():
        raise ArtifactError(
            f"{path}: schema is {schema!r}, expected 'emlens/<kind>/<number>': "
            "this is not a result that emlens saved"
        )
    return parts[1]


def read_result(path: str | Path, cls: type[AnyResult]) -> AnyResult:
    """Rebuild what `cls.save` wrote.

    Args:
        path: The folder, or the `result.json` in it.
        cls: Class of the result; its annotations decide what every field must be.

    Raises:
        ArtifactError: There is no result, it is of another kind or version, JSON or tensors are
            damaged, or fields or tensors are missing, unknown or of the wrong type.
    """
    file = _json_file(path)
    document = read_json(file)
    if document.get("schema") != cls.schema():
        raise ArtifactError(
            f"{file}: schema is {document.get('schema')!r}, expected {cls.schema()!r} for "
            f"{cls.__name__}: read it with the class that wrote it, or with its emlens version "
            f"({document.get('emlens_version')!r})"
        )
    fields = {name: value for name, value in document.items() if name not in _HEADER}
    tensors = _read_tensors(file.parent, document.get("tensors_sha256"))
    decoder = Decoder(file, tensors)
    result = decoder.fields(cls, fields)
    if unused := sorted(tensors.keys() - decoder.taken):
        raise ArtifactError(f"{file}: its tensor file holds some that no field names: {unused}")
    return result


def _json_file(path: str | Path) -> Path:
    path = Path(path)
    return path / JSON_NAME if path.is_dir() else path


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; every way in which it can be none is an ArtifactError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}): was it saved?") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not whole JSON ({error}): save it again") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{file} holds a JSON {type(document).__name__}, expected an object")
    return document


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _name_tensors(digest: str | None) -> str | None:
    """Name of the file with the tensors of a digest; None where there are none."""
    return None if digest is None else f"tensors-{digest[:16]}.safetensors"


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors beside those that are there; returns their digest."""
    staged = folder / f".tensors.{secrets.token_hex(4)}.tmp"
    try:
        write_tensors_atomic(staged, tensors)
        digest = _digest(staged)
        staged.replace(folder / str(_name_tensors(digest)))
    finally:
        staged.unlink(missing_ok=True)
    return digest


def _read_tensors(folder: Path, digest: object) -> dict[str, Tensor]:
    if digest is None:
        return {}  # those of an older save may still lie there
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ArtifactError(f"{folder}: tensors_sha256 is {digest!r}, expected 64 digits or null")
    file, plain = folder / str(_name_tensors(digest)), folder / _PLAIN_TENSORS
    if not file.exists() and plain.exists():
        file = plain
    if not file.is_file():
        raise ArtifactError(f"{folder} has no {file.name}: copy or save the whole folder")
    if digest != _digest(file):
        raise ArtifactError(
            f"{file} is not the file that {JSON_NAME} was saved with: it is damaged; copy or save "
            "the whole folder"
        )
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ArtifactError(f"{file} is not a safetensors file: {error}") from error


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return html.escape(text if len(text) <= 80 else text[:77] + "...")
