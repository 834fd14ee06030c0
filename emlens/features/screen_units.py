"""What one unit of a steering strength is: the size of a difference, or of an activation.

Not a scale between codecs: it depends on the models and on the texts that it is measured on.
"""

from emlens.activations import stream_activations
from emlens.activations.accumulate import NORM_LEVELS
from emlens.codecs.codec import SparseCodec
from emlens.data import ContrastTexts
from emlens.features.screen_journal import ScreenJournal
from emlens.features.screen_settings import ScreenSettings
from emlens.models.pair import ModelPair


def measure_unit(
    pair: ModelPair,
    codec: SparseCodec,
    *,
    texts: ContrastTexts,
    settings: ScreenSettings,
    journal: ScreenJournal,
) -> float:
    """One unit of strength, in activation units, over the response tokens of the fixed texts.

    Args:
        pair: base and fine-tune.
        codec: whose site.
        texts: whose responses; both classes together.
        settings: which unit.
        journal: keeps both, so that a screen goes on with the very same vectors.

    Raises:
        ValueError: it is 0: the two models have the same mean there.
    """

    def measure() -> dict[str, float]:
        found = stream_activations(
            pair,
            (*texts.positive, *texts.negative),
            sites=codec.site,
            positions="response",
            statistics=("mean", "norm"),
            batching=settings.batching,
        )
        assert found.mean is not None
        assert found.norm_quantiles is not None
        base, change = found.streams.index("base"), found.streams.index("difference")
        median = found.norm_quantiles[base, 0, 0, NORM_LEVELS.index(0.5)]
        return {"delta_norm": float(found.mean[change].norm()), "resid_norm": float(median)}

    unit = journal.ask("units", measure)[settings.units]
    if not unit > 0:
        raise ValueError(
            f"settings.units: one {settings.units} is {unit}: on the responses of texts the base "
            f"and the tuned model have the same mean at {codec.site}; is the fine-tune in effect "
            "below that site?"
        )
    return unit
