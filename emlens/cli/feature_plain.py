"""What a fine-tune changed at a codec's site without the codec: beside every result of latents.

A table and a section of the report, of the same texts that the latents were read on. Not the way to
measure it alone: `studies.measure_plain_difference` is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emlens.cli.output import print_table

N_DIRECTIONS = 3
"""Mean difference, best direction, first tokens: the rows of a `PlainDifference` before modules."""


def keep_plain(
    run: Path, pair: Callable[[], Any], chats: Any, *, read: Any, batch_tokens: int, number: int = 1
) -> list[Any]:
    """Measure it once, and keep it in a run; none where there is no fine-tune, or nothing differs.

    Args:
        run: its folder.
        pair: loads base and fine-tune, where it was not kept.
        chats: what the latents were read on.
        read: a result of latents: which fine-tune, site and tokens.
        batch_tokens: tokens run at once.
        number: of the fine-tune, where there are several.

    Raises:
        ValueError: tokens that a chat does not have.
    """
    if read.tuned is None:
        return []
    from emlens.data import Batching
    from emlens.runs import RunFolder
    from emlens.studies.keep_plain import keep_plain_difference
    from emlens.studies.stages import Stages

    found = keep_plain_difference(
        Stages(RunFolder.open(run)),
        pair,
        chats,
        read=read,
        batching=Batching(batch_tokens),
        number=number,
    )
    return [] if found is None else [found]


def print_plain(found: Sequence[Any]) -> None:
    """Print what differs without a codec; nothing where nothing was measured.

    Args:
        found: of each fine-tune; of several the directions alone, without the adapters' modules.
    """
    alone = len(found) == 1
    rows = [row for one in found for row in one.rows()[: None if alone else N_DIRECTIONS]]
    if rows:
        more = "" if alone else "; what modules write is in the report"
        print_table(rows, title=f"without a codec{more}")
