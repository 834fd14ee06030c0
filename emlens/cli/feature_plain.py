"""What a fine-tune changed at a codec's site without the codec: beside every result of latents.

A table and a section of the report, of the same texts that the latents were read on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emlens.cli.output import print_table


def keep_plain(
    run: Path, pair: Callable[[], Any], chats: Any, *, read: Any, batch_tokens: int, number: int = 1
) -> Any:
    """Measure it once, and keep it in a run.

    Args:
        run: its folder.
        pair: loads base and fine-tune, where it was not kept.
        chats: what the latents were read on.
        read: a result of latents that says at which `site` and `positions`.
        batch_tokens: tokens run at once.
        number: of the fine-tune, where there are several.
    """
    from emlens.data import Batching
    from emlens.runs import RunFolder
    from emlens.studies import PlainDifference, measure_plain_difference
    from emlens.studies.stages import Stages

    return Stages(RunFolder.open(run)).keep(
        f"plain_{number:02d}",
        PlainDifference,
        lambda: measure_plain_difference(
            pair(),
            chats,
            site=read.site,
            positions=read.positions,
            batching=Batching(batch_tokens),
        ),
    )


def print_plain(found: Sequence[Any]) -> None:
    """Print what differs without a codec; nothing where nothing was measured.

    Args:
        found: of each fine-tune.
    """
    if found:
        print_table([row for one in found for row in one.rows()], title="without a codec")
