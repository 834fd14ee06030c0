"""A screen on its way: both stages on both sides, each part asked of the journal first.

Not the way in: `screen_features` checks what is given and knows what a folder may go on with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.codec import SparseCodec
from emlens.data import BehaviourScores, ContrastTexts, as_chats, prompt_hashes, track
from emlens.features.forced_screen import FixedTexts, ForcedStage
from emlens.features.results import SaeHealth
from emlens.features.sampled_screen import JudgedResponse, SampledStage, summarise_responses
from emlens.features.screen_journal import ScreenJournal
from emlens.features.screen_results import (
    SIDES,
    SIGNS,
    FeatureScreen,
    SampledCurve,
    SampledPoint,
    Side,
    choose_point,
    rank_curves,
)
from emlens.features.screen_settings import ScreenSettings
from emlens.features.screen_units import Shift
from emlens.models.pair import ModelPair
from emlens.models.reading import identify

MEAN_DIFFERENCE = (None, None)
"""Neither a latent nor a control."""


@dataclass(frozen=True, kw_only=True)
class ScreenWork:
    """What both stages of a screen have in common."""

    pair: ModelPair
    codec: SparseCodec
    latents: tuple[int, ...]
    directions: Float[Tensor, "latent d"]
    controls: Float[Tensor, "control d"]
    scores: BehaviourScores
    settings: ScreenSettings
    journal: ScreenJournal
    shift: Shift
    health: SaeHealth

    def force(self, fixed: FixedTexts, texts: ContrastTexts) -> FeatureScreen:
        """The first stage, as a result without a second one."""
        stages = [
            ForcedStage(
                model=model,
                side=side,
                site=self.codec.site,
                texts=fixed,
                strengths=[sign * self.shift.unit * s for s in self.settings.strengths],
                batching=self.settings.batching,
                journal=self.journal,
            )
            for side, sign, model in self._sides()
        ]
        latents = [f"latent-{latent}" for latent in self.latents]
        controls = [f"control-{k}" for k in range(len(self.controls))]
        identity = identify(self.pair)
        chats = as_chats(self.settings.chats) if self.settings.n_sampled else ()
        answered = prompt_hashes((*texts.positive, *texts.negative))
        return FeatureScreen(
            base=identity.base,
            base_fingerprint=identity.base_fingerprint,
            tuned=self.pair.tuned_name,
            tuned_fingerprint=identity.tuned_fingerprint,
            adapter_fingerprint=identity.adapter_fingerprint,
            codec=self.codec.name,
            codec_fingerprint=self.codec.fingerprint,
            site=str(self.codec.site),
            health=self.health,
            latents=torch.tensor(self.latents),
            strengths=torch.tensor(self.settings.strengths, dtype=torch.float64),
            units=self.settings.units,
            unit_norm=self.shift.unit,
            n_texts=(len(texts.positive), len(texts.negative)),
            before=torch.stack([stage.score_plain() for stage in stages]),
            steered=torch.stack([s.score(self.directions, named=latents) for s in stages]),
            controls=torch.stack([s.score(self.controls, named=controls) for s in stages]),
            mean_difference=self._score_plainly(stages),
            sampled=(),
            sampled_plainly=(),
            sampled_before=(),
            most_incoherent=(),
            n_prompts=len(chats),
            n_shared_prompts=sum(prompt_hashes([c])[0] in answered for c in chats),
            seed=self.settings.seed,
        )

    def _score_plainly(self, stages: Sequence[ForcedStage]) -> Tensor | None:
        """The first stage under the mean difference, which needs no codec; None where it is 0."""
        if self.shift.direction is None:
            return None
        own = self.shift.direction[None]
        return torch.stack([s.score(own, named=["mean-difference"])[:, 0] for s in stages])

    def sample(self, screen: FeatureScreen) -> FeatureScreen:
        """The second stage, added to the result of the first."""
        if not self.settings.n_sampled:
            return screen
        stages = {
            side: SampledStage(
                model=model,
                side=side,
                site=self.codec.site,
                scores=self.scores,
                settings=self.settings,
                journal=self.journal,
            )
            for side, _, model in self._sides()
        }
        plain = {side: stage.sample("plain", None) for side, stage in stages.items()}
        before = [
            self._summarise(plain[side], plain[side], 0.0, sign) for side, sign, _ in self._sides()
        ]
        most = [self._allow(one.incoherent) for one in before]
        n, n_chance = self.settings.n_sampled, self.settings.n_sampled_controls
        todo = [
            (side, sign, which, most[place])
            for place, (side, sign, _) in enumerate(self._sides())
            for which in [
                *((latent, None) for latent in screen.top(n, side=side)),
                *((None, k) for k in screen.top_controls(n_chance, side=side)),
                *([] if self.shift.direction is None else [MEAN_DIFFERENCE]),
            ]
        ]
        curves = tuple(
            self._curve(stages[side], plain[side], sign, which, allowed)
            for side, sign, which, allowed in track(todo, "screening (directions)")
        )
        ranked = [replace(curve, p=p) for curve, p in zip(curves, rank_curves(curves), strict=True)]
        return replace(
            screen,
            sampled=tuple(c for c in ranked if (c.latent, c.control) != MEAN_DIFFERENCE),
            sampled_plainly=tuple(c for c in ranked if (c.latent, c.control) == MEAN_DIFFERENCE),
            sampled_before=tuple(before),
            most_incoherent=tuple(most),
        )

    def _allow(self, incoherent: float) -> float:
        """The share of incoherent responses up to which a strength counts.

        Args:
            incoherent: that of the unsteered model.
        """
        settings = self.settings
        # Where the unsteered model has no score, only what is always allowed is.
        beyond = 0.0 if math.isnan(incoherent) else incoherent + settings.extra_incoherent
        return float(max(settings.max_incoherent, beyond))

    def _sides(self) -> list[tuple[Side, float, Any]]:
        return list(zip(SIDES, SIGNS, (self.pair.base, self.pair.tuned), strict=True))

    def _curve(
        self,
        stage: SampledStage,
        plain: Sequence[JudgedResponse],
        sign: float,
        which: tuple[int | None, int | None],
        most_incoherent: float,
    ) -> SampledCurve:
        latent, control = which
        if latent is not None:
            name, vector = f"latent-{latent}", self.directions[self.latents.index(latent)]
        elif control is not None:
            name, vector = f"control-{control}", self.controls[control]
        else:
            assert self.shift.direction is not None
            # Of the dtype of the others, so that all are added in the same way.
            name, vector = "mean-difference", self.shift.direction.to(self.directions)
        points = tuple(
            self._summarise(
                stage.sample(
                    f"{name}/{float(strength)!r}", sign * strength * self.shift.unit * vector
                ),
                plain,
                float(strength),
                sign,
            )
            for strength in self.settings.judged_strengths
        )
        return SampledCurve(
            side=stage.side,
            latent=latent,
            control=control,
            points=points,
            chosen=choose_point(points, most_incoherent=most_incoherent),
            p=None,
        )

    def _summarise(
        self,
        responses: Sequence[JudgedResponse],
        plain: Sequence[JudgedResponse],
        strength: float,
        sign: float,
    ) -> SampledPoint:
        return summarise_responses(
            responses,
            plain,
            strength=strength,
            sign=sign,
            coherent_above=self.settings.coherent_above,
        )
