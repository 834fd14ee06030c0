"""What one unit of a steering strength is, and the direction from the base to the tuned model.

Not a scale between codecs: both depend on the models and on the texts that they are measured on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from emlens.activations import stream_activations
from emlens.activations.accumulate import NORM_LEVELS
from emlens.codecs.codec import SparseCodec
from emlens.data import ContrastTexts
from emlens.features.screen_journal import ScreenJournal
from emlens.features.screen_settings import ScreenSettings
from emlens.models.pair import ModelPair
from emlens.numerics.projection import unit_vectors


@dataclass(frozen=True, kw_only=True, eq=False)
class Shift:
    """How two models lie to each other at a site."""

    unit: float
    """One unit of strength, in activation units."""
    direction: Float64[Tensor, " d"] | None
    """Their mean difference, of length 1: what needs no codec; None where the means are equal."""


def measure_shift(
    pair: ModelPair,
    codec: SparseCodec,
    *,
    texts: ContrastTexts,
    settings: ScreenSettings,
    journal: ScreenJournal,
) -> Shift:
    """Unit of strength and mean difference, over the response tokens of the fixed texts.

    Args:
        pair: base and fine-tune.
        codec: whose site.
        texts: whose responses; both classes together.
        settings: which unit.
        journal: keeps all of it, so that a screen goes on with the very same vectors.

    Raises:
        ValueError: the unit is 0: the two models have the same mean there.
    """

    def measure() -> dict[str, Any]:
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
        moved = found.mean[change].double().flatten()
        return {
            "delta_norm": float(moved.norm()),
            "resid_norm": float(median),
            "mean_difference": moved.tolist(),
        }

    found = journal.ask("shift", measure)
    unit = found[settings.units]
    if not unit > 0:
        raise ValueError(
            f"settings.units: one {settings.units} is {unit}: on the responses of texts the base "
            f"and the tuned model have the same mean at {codec.site}; is the fine-tune in effect "
            "below that site?"
        )
    moved = torch.tensor(found["mean_difference"], dtype=torch.float64)
    return Shift(unit=unit, direction=unit_vectors(moved) if bool(moved.any()) else None)
