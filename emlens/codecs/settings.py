"""How sparse codecs are trained: all that shapes a run but the data, the site and the seed."""

import difflib
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

Normalisation = Literal["none", "expected_average_only_in"]
Autocast = Literal["none", "bfloat16"]
Architecture = Literal["topk", "batchtopk", "matryoshka"]


class CodecSettingsError(ValueError):
    """Settings that no codec can be trained with."""


@dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """What the training of every codec is told; `SaeSettings` and `CrosscoderSettings` are used."""

    least: ClassVar[dict[str, int]] = {
        **{"d_sae": 1, "k": 1, "steps": 1, "batch_rows": 2, "warmup_steps": 0, "decay_steps": 0},
        **{"aux_coefficient": 0, "dead_after_rows": 1, "max_passes": 1, "least_firings": 0},
        **{"checkpoint_every": 1, "record_every": 1, "held_out_rows": 2},
    }

    d_sae: int
    """Latents."""
    k: int
    """Latents active at a row; on average, unless the architecture is `topk`."""
    steps: int
    """Optimiser steps."""
    batch_rows: int = 4096
    """Rows (tokens) of a step."""
    learning_rate: float = 3e-4
    """Peak step size of Adam."""
    warmup_steps: int = 0
    """Steps over which the step size rises from 0."""
    decay_steps: int = 0
    """Steps at the end over which it falls to 0."""
    normalisation: Normalisation = "expected_average_only_in"
    """Whether rows are multiplied by one number that makes their mean norm sqrt(d_in), so that a
    step size means the same at any site. The number is folded into the weights at the end."""
    aux_coefficient: float
    """Weight of the loss by which dead latents are revived: the largest of them must reconstruct
    what the others left; 0 for never."""
    dead_after_rows: int = 200_000
    """A latent is dead when it was not active at that many rows in a row. It must be well below the
    rows of the run, or none is ever found dead, and none revived."""
    max_passes: int = 3
    """How often the same rows may come: a corpus that would have to come more often is refused."""
    least_firings: int = 100
    """How often a latent must be active on average, rows x k / d_sae, in the whole corpus; with
    fewer rows the run is refused. The mean of 100 rows has a tenth of the noise of one."""
    held_out_rows: int = 16_384
    """Rows that the threshold is set on. Where no held-out activations are given they are the first
    rows of the corpus, which then take no part in training."""
    checkpoint_every: int | None = None
    """Steps between two states from which an interrupted run goes on; None for none."""
    record_every: int = 10
    """Steps between two points of the curves."""
    autocast: Autocast = "none"
    """Precision of the matrix products; weights train in float32."""

    def __post_init__(self) -> None:
        _check_name("normalisation", self.normalisation, get_args(Normalisation))
        _check_name("autocast", self.autocast, get_args(Autocast))
        if not self.learning_rate > 0:
            raise CodecSettingsError(
                f"learning_rate: got {self.learning_rate}, expected more than 0"
            )
        for name, least in self.least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise CodecSettingsError(f"{name}: got {value}, expected at least {least}")
        if self.k > self.d_sae:
            raise CodecSettingsError(f"k: got {self.k}, more than the {self.d_sae} latents (d_sae)")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise CodecSettingsError(
                f"warmup_steps: {self.warmup_steps} and decay_steps: {self.decay_steps} are more "
                f"than the {self.steps} steps"
            )

    @property
    def rows(self) -> int:
        """Rows of the whole run, those that come again counted again."""
        return self.steps * self.batch_rows

    @property
    def dead_after_steps(self) -> int:
        """`dead_after_rows` in steps."""
        return -(-self.dead_after_rows // self.batch_rows)


@dataclass(frozen=True, kw_only=True)
class SaeSettings(CodecSettings):
    """How a sparse autoencoder is trained; vary one with `dataclasses.replace`.

    Raises:
        CodecSettingsError: a value outside its range, or one that the architecture has no use for.

    Source: k largest of a row (`topk`) and the revival of dead latents: Gao et al. 2024, arXiv
        2406.04093, sections 2.3 and A.2. k largest on average over a batch (`batchtopk`): Bussmann
        et al. 2024, arXiv 2412.06410. Nested widths (`matryoshka`): Bussmann et al. 2025, arXiv
        2503.17547.
    """

    architecture: Architecture
    """`batchtopk` and `matryoshka` are used with a threshold, which is set on held-out rows."""
    aux_coefficient: float = 1.0
    """As in `CodecSettings`; on the scale of the squared error."""
    matryoshka_widths: tuple[int, ...] | None = None
    """Rising numbers of latents that must each reconstruct alone, the last is d_sae; for
    `matryoshka`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("architecture", self.architecture, get_args(Architecture))
        if (self.matryoshka_widths is not None) != (self.architecture == "matryoshka"):
            raise CodecSettingsError(
                f"matryoshka_widths: got {self.matryoshka_widths} with architecture "
                f"{self.architecture!r}; 'matryoshka' needs them and no other has a use for them"
            )
        widths = self.matryoshka_widths
        if widths is None:
            return
        if len(widths) < 2 or widths[0] < 1 or widths[-1] != self.d_sae:
            raise CodecSettingsError(
                f"matryoshka_widths: got {widths}, expected two or more, the last {self.d_sae} "
                "(d_sae)"
            )
        if list(widths) != sorted(set(widths)):
            raise CodecSettingsError(f"matryoshka_widths: got {widths}, expected rising numbers")


@dataclass(frozen=True, kw_only=True)
class CrosscoderSettings(CodecSettings):
    """How a BatchTopK crosscoder is trained; vary one with `dataclasses.replace`.

    Raises:
        CodecSettingsError: a value outside its range.
    """

    aux_coefficient: float = 1 / 32
    """As in `CodecSettings`; of the squared error over the variance of what it is an error of."""


def _check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.0)
        raise CodecSettingsError(f"{field}: got {value!r}; nearest: {', '.join(near)}")
