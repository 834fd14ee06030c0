"""What a search for persona features found, in a table that can be read; the study is beside.

Comparisons of all latents stay in the run folder: `features.load_result` reads them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.features import EarlyWarning, ModelClassification, SaeHealth
from emlens.features.cards import FeatureCards
from emlens.features.screen_results import SIDES, FeatureScreen, SampledCurve
from emlens.studies.plain_difference import PlainDifference

SIGNIFICANT = 0.05
"""q-value up to which a latent is said to differ: of those, one in twenty is expected not to."""


@dataclass(frozen=True, kw_only=True)
class LatentInModel:
    """One latent in the base and in one fine-tune, on the same prompts."""

    tuned: str
    """The fine-tune's source."""
    delta: float
    """Mean code of the fine-tune less the base's."""
    mean_base: float
    """Mean code over prompts."""
    mean_tuned: float
    frequency_base: float
    """Share of tokens at which it is active."""
    frequency_tuned: float
    prompts_fired: int
    """Prompts on which it is active in either."""
    q_value: float | None
    """That they differ on such prompts, by sign flips; None where it was not tested."""


@dataclass(frozen=True, kw_only=True)
class PersonaFeature:
    """One of the latents that were chosen."""

    latent: int
    chosen_by: str
    """The ordering, and its end, that it was taken from."""
    ranks: dict[str, int]
    """Its place in each ordering, 1 for the highest score."""
    delta: float
    """Mean over the fine-tunes with the behaviour."""
    contrast: float | None
    """Mean of delta less that of the careful twin; None without twins."""
    contrast_p: float | None
    """Over pairs, by sign flips; None without twins and where it was not tested."""
    contrast_q: float | None
    """Benjamini-Hochberg over all latents tested; None where this one was not."""
    pairs_agreeing: int | None
    """Pairs whose own contrast has the sign of the mean."""
    decoder_cosine: float
    """Of its decoder vector with the mean difference, over the fine-tunes with the behaviour."""
    attribution: float | None
    """What misaligned responses of the first fine-tune rest on it by; None where not asked for."""
    models: tuple[LatentInModel, ...]
    """In every fine-tune, those with the behaviour first."""


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One fine-tune of the search."""

    tuned: str
    """Its source."""
    misaligned: bool
    """Whether it has the behaviour in question."""
    domain: str | None
    n_prompts: int
    n_tested: int
    """Latents that have a p-value."""
    n_significant: int
    """Of these, with a q-value up to .05: they differ on such prompts, as after any fine-tune."""
    why_untested: str
    """Why no latent was tested; empty where some were."""


@dataclass(frozen=True, kw_only=True)
class PersonaFeatures(Result):
    """Latents that fine-tunes changed: which, what they are, what they cause, when they warn."""

    kind: ClassVar[str] = "persona_features"

    run: str
    """Run folder, whose `comparisons` hold every latent."""
    base: str
    """The base's source."""
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    site: str
    positions: str
    """Tokens that were counted."""
    responses: str
    """Whether both models read the same text (`same`) or each its own (`own`)."""
    cautions: tuple[str, ...]
    """What must be known before any latent is believed, the worst first."""
    not_done: tuple[str, ...]
    """Parts that were left out, and why."""
    models: tuple[ComparedModel, ...]
    """Those with the behaviour first, then their careful twins."""
    health: tuple[SaeHealth, ...]
    """How well the codec fits base and fine-tune, one for each."""
    plain: tuple[PlainDifference, ...]
    """What differs without any codec, one for each."""
    orders: tuple[str, ...]
    """Orderings that latents were chosen from."""
    features: tuple[PersonaFeature, ...]
    """In the order in which they were chosen."""
    n_pairs: int
    """Harmful fine-tunes with a careful twin."""
    smallest_p: float | None
    """The smallest p-value that so many pairs can give; None without twins."""
    classification: ModelClassification | None
    """How well they are told apart by latents, and without any."""
    screen: FeatureScreen | None
    """What the latents cause, in the first fine-tune and its base."""
    cards: FeatureCards | None
    """What they may mean."""
    warnings: tuple[EarlyWarning, ...]
    """How early the first of them leave the base."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a latent: its change, its contrast, and what it causes, by both stages."""
        effects = self._list_effects()
        return [
            {
                "latent": one.latent,
                "chosen_by": one.chosen_by,
                "delta": one.delta,
                "q_value": one.models[0].q_value,
                "contrast": one.contrast,
                "contrast_p": one.contrast_p,
                "cosine": one.decoder_cosine,
                **dict.fromkeys(_EFFECTS),
                **effects.get(one.latent, {}),
            }
            for one in self.features
        ]

    def _list_effects(self) -> dict[int, dict[str, Any]]:
        if self.screen is None:
            return {}
        found: dict[int, dict[str, Any]] = {}
        for name, side in zip(_NAMES, SIDES, strict=True):
            numbers = (self.screen.forced_effect(side), self.screen.forced_p(side))
            for latent, effect, p in zip(self.screen.latents.tolist(), *numbers, strict=True):
                own = found.setdefault(latent, {})
                own |= {name: float(effect), f"{name}_p": float(p)}
            for curve in self.screen.sampled:
                if curve.side == side and curve.latent is not None:
                    found[curve.latent] |= _describe_sampled(name, curve)
        return found


def _describe_sampled(name: str, curve: SampledCurve) -> dict[str, float | None]:
    point = None if curve.chosen is None else curve.points[curve.chosen]
    return {
        f"{name}_sampled": None if point is None or point.effect is None else point.effect.value,
        f"{name}_sampled_p": curve.p,
        f"{name}_incoherent": None if point is None else point.incoherent,
    }


_NAMES = ("induces", "repairs")
_ENDS = ("", "_p", "_sampled", "_sampled_p", "_incoherent")
_EFFECTS = tuple(f"{name}{end}" for name in _NAMES for end in _ENDS)
