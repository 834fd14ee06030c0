"""What a fine-tune changed without a codec, kept beside what was read of it through one."""

from collections.abc import Callable, Sequence

from emlens.data import Batching, Chat
from emlens.features import FeatureDiff, SaeHealth
from emlens.models.pair import ModelPair
from emlens.studies.plain_difference import (
    ModelsAlikeError,
    PlainDifference,
    measure_plain_difference,
)
from emlens.studies.stages import Stages


def keep_plain_difference(
    stages: Stages,
    pair: Callable[[], ModelPair],
    chats: Sequence[Chat | str],
    *,
    read: SaeHealth | FeatureDiff,
    batching: Batching,
    number: int = 1,
) -> PlainDifference | None:
    """Measure it at the tokens that a codec read, once; None where the models do not differ there.

    Args:
        stages: of the run that keeps it.
        pair: loads base and fine-tune, where it was not kept.
        chats: what was read.
        read: which site and tokens.
        batching: tokens run at once, both models counted.
        number: of the fine-tune, where a run has several.
    """
    try:
        return stages.keep(
            f"plain_{number:02d}",
            PlainDifference,
            lambda: measure_plain_difference(
                pair(), chats, site=read.site, positions=read.positions, batching=batching
            ),
        )
    except ModelsAlikeError:
        return None
