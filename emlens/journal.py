"""Rows kept as they come: an append-only JSONL file that survives being killed; not for results.

One process writes; each batch is flushed to the disk before it counts as kept. What a kill or a
full disk leaves unfinished is cut off, so that the file always holds whole rows.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from emlens.encoding import ArtifactError

_KEY = "id"


class JournalError(ArtifactError):
    """A journal that is damaged, or a row that cannot be kept."""


class JournalLockedError(JournalError):
    """Another process, or another part of this one, is writing the journal."""


class JournalWriteError(OSError):
    """The disk did not take a batch: it is full, over its quota, or failing."""


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The finished rows of a journal, in the order they were kept; also while it is written.

    Raises:
        JournalError: there is no such file, or a finished line is no row or repeats an id.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path} cannot be read ({error.strerror}): was it begun?") from error
    return list(_rows(path, data[: _finished(data)]))


class Journal:
    """A journal open for writing, to be used in a `with` block.

    Opening cuts off a torn last line. Every row has an `id`, a text that no other row has.

    Args:
        path: the file; it is made, with its folders, if there is none.

    Raises:
        JournalLockedError: it is being written already.
        JournalError: a finished line is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            _lock(self._file, self.path)
            data = self.path.read_bytes()
            self._size = _finished(data)
            self._ids = {row[_KEY]: None for row in _rows(self.path, data[: self._size])}
            self._cut()
        except BaseException:
            os.close(self._file)
            raise
        self._open = True

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the rows kept, in their order."""
        return tuple(self._ids)

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep a batch of rows: all of them are on the disk when this returns, or none.

        A batch that is cut short by a kill may leave its first rows; one that meets an error (a
        full disk) leaves nothing, and the journal can be used on.

        Args:
            rows: JSON objects with an `id`; NaN and infinities are refused.

        Raises:
            JournalError: an id that is no text, is there already or comes twice, or a closed
                journal; nothing was written.
            JournalWriteError: the disk took less than all; nothing of the batch was kept.
        """
        if not self._open:
            raise JournalError(f"{self.path} is closed; write inside its with block")
        batch = [dict(row) for row in rows]
        new = self._check_ids([row.get(_KEY) for row in batch])
        data = b"".join(_line(row) for row in batch)
        try:
            os.lseek(self._file, self._size, os.SEEK_SET)
            _write_all(self._file, data)
            os.fsync(self._file)
        except OSError as error:
            self._cut()
            raise JournalWriteError(
                error.errno,
                f"{self.path}: {error.strerror}; the {len(self)} rows that were finished are kept: "
                "make room, and the same call goes on with the rest",
            ) from error
        except BaseException:
            self._cut()
            raise
        self._size += len(data)
        self._ids.update(new)

    def rows(self) -> list[dict[str, Any]]:
        """All rows kept so far."""
        return list(_rows(self.path, self.path.read_bytes()[: self._size]))

    def close(self) -> None:
        """Give the file and its lock back; closing twice does nothing."""
        if self._open:
            self._open = False
            os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_ids(self, ids: Sequence[Any]) -> dict[str, None]:
        new: dict[str, None] = {}
        for row_id in ids:
            if not isinstance(row_id, str) or not row_id:
                raise JournalError(f"{self.path}: a row has the id {row_id!r}, expected a text")
            if row_id in self._ids or row_id in new:
                raise JournalError(f"{self.path} already holds a row with the id {row_id!r}")
            new[row_id] = None
        return new

    def _cut(self) -> None:
        """Drop whatever stands after the last finished batch."""
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)


def _line(row: Mapping[str, Any]) -> bytes:
    # Escaped, so that no text of a row can hold a line break of its own.
    return json.dumps(row, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        # May take a part only, as on a disk that is nearly full.
        rest = rest[os.write(file, rest) :]


def _finished(data: bytes) -> int:
    """Bytes up to the last line break: what follows was torn."""
    return data.rfind(b"\n") + 1


def _rows(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise JournalError(
                f"{path}:{number} is damaged ({error}); rows before it are whole: move them to a "
                "new file, or begin anew"
            ) from error
        row_id = row.get(_KEY) if isinstance(row, dict) else None
        if not isinstance(row_id, str) or row_id in seen:
            raise JournalError(f"{path}:{number} has the id {row_id!r}, expected a new text")
        seen.add(row_id)
        yield row


def _lock(file: int, path: Path) -> None:
    """Take the file for this writer; the system gives it back when the process ends, however."""
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            # One byte far behind any row, so that others can read the rows.
            os.lseek(file, 1 << 40, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise JournalLockedError(
            f"{path} is being written by another process; wait for it, or give another folder"
        ) from error
