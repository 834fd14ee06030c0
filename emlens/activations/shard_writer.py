"""Shards on their way to disk while the model runs on: at most one is being written.

Not for small files: what is written here is there only once the writer is left.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import write_tensors_atomic

PINNED_BYTES = 1 << 30
"""Host memory in one shard, at most, that a GPU copies into while it computes (1 GiB). Two shards
are in hand, torch rounds what it pins up to a power of two, and none of it can be swapped out. What
is beyond is waited for."""


class ShardWriter:
    """Writes one file of tensors while the next are made; leaving it waits for all.

    An error of a write is raised at the next one, or on leaving. Whatever else ends the block, the
    file in hand is written first; where that fails, too, the error says so.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="emlens-shards")
        self._pending: Future[Path] | None = None
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._pinned = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self._finish()
        elif self._pending is not None and (failed := self._pending.exception()) is not None:
            error.add_note(f"the shard before could not be written either: {failed}")

    def bring(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The same values on the host; from a GPU they may arrive later, but before `write` reads.

        Args:
            values: nobody may write to them afterwards, nor to what they are a view of.
        """
        if values.device.type != "cuda":
            return values.cpu()
        if self._pinned + values.nbytes > PINNED_BYTES:
            return values.cpu()
        self._pinned += values.nbytes
        side = self._sides.get(values.device)
        if side is None:
            side = self._sides[values.device] = torch.cuda.Stream(values.device)
        side.wait_stream(torch.cuda.current_stream(values.device))
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        with torch.cuda.stream(side):
            host.copy_(values, non_blocking=True)
        values.record_stream(side)
        return host

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write a file whole or not at all, once the one before is there.

        Args:
            path: where.
            tensors: by name; nobody may write to them afterwards.

        Raises:
            OSError: the file before could not be written.
        """
        landed = [side.record_event() for side in self._sides.values()]
        self._pinned = 0
        self._finish()
        self._pending = self._pool.submit(_write, path, dict(tensors), landed)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _write(path: Path, tensors: dict[str, Tensor], landed: Sequence[Any]) -> Path:
    for event in landed:
        event.synchronize()
    return write_tensors_atomic(path, tensors)
