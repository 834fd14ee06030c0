"""Which latents did harmful fine-tunes change, what are they, do they cause it, do they warn?

The whole way: how well the codec fits, comparison, orderings, contrast with careful twins, models
told apart in domains left out, a causal screen beside random directions, cards, early warning, and
beside all of it what needs no codec. Each step alone is a function of `emlens.features`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emlens.codecs import SparseCodec, allow_other_model
from emlens.data import Chat
from emlens.evaluation.calibration import keep_calibration
from emlens.features import (
    FeatureContrast,
    FeatureDiff,
    FeatureRanking,
    ModelClassification,
    classify_models,
    contrast_features,
    rank_features,
)
from emlens.features.attribute import attribute_features, pair_by_prompt
from emlens.features.cards import FeatureCards
from emlens.features.classify import why_not_told_apart
from emlens.features.explain import explain_features
from emlens.features.explain_settings import ExplainSettings
from emlens.features.screen import screen_features
from emlens.features.screen_results import SIDES, FeatureScreen
from emlens.models.pair import ModelPair
from emlens.models.protocol import HookedModel
from emlens.runs import RunFolder
from emlens.sites import parse_site
from emlens.studies.choose_latents import ChosenLatent, choose_latents
from emlens.studies.compare_by_latents import (
    LatentComparisons,
    LoadedPairs,
    compare_by_latents,
)
from emlens.studies.follow_latents import FollowedTexts, follow_latents
from emlens.studies.judge_scores import judge_scores, unscored
from emlens.studies.keep_plain import keep_plain_difference
from emlens.studies.persona_cautions import list_cautions
from emlens.studies.persona_features import PersonaFeatures
from emlens.studies.persona_plan import check_search, plan_search
from emlens.studies.persona_settings import (
    FineTunes,
    PersonaProbe,
    PersonaSettings,
    PersonaTexts,
)
from emlens.studies.persona_table import describe_features, describe_models
from emlens.studies.plain_difference import PlainDifference
from emlens.studies.stages import Stages
from emlens.vectors import Direction, Provenance

RESULT = "features"
"""Name of the result in the run folder."""
GRAPH_TOKENS = 4096
"""Most tokens at once where gradients are taken: a quarter of the usual, since graphs hold several
times what a plain pass does."""
COMPARISONS, SCREEN, PATH = "comparisons", "screen", "path"
"""Folders in the run folder: runs of their own, each of which goes on where it was cut short."""


def find_persona_features(
    base: HookedModel,
    fine_tunes: FineTunes,
    *,
    codec: SparseCodec,
    texts: PersonaTexts,
    settings: PersonaSettings,
    out: str | Path,
    probe: PersonaProbe = PersonaProbe(),  # noqa: B008 - frozen
) -> PersonaFeatures:
    """Search the latents of a codec for those that fine-tunes changed, and ask what they do.

    The same call on the same `out` goes on: what is finished is read, not computed again.

    Args:
        base: what all were trained on, loaded.
        fine_tunes: with the behaviour, and their careful twins where there are any.
        codec: of the base's architecture.
        texts: prompts that elicit the behaviour, a corpus, fixed responses.
        settings: how much of everything.
        out: run folder.
        probe: what is asked beyond the comparison; by default nothing.

    Raises:
        CodecError: a codec of another site or width, or a crosscoder.
        ValueError: a part that lacks its texts, fine-tunes that do not load, two models that do not
            differ at the codec's site.
        PlanChangedError: `out` holds a run of another plan.

    Source: Wang et al. 2025, Persona features control emergent misalignment, arXiv 2506.19823,
        section 3.
    Differs: careful twins and left-out domains instead of claims over prompts; random directions
        beside every steering; what needs no codec beside every latent.
    """
    check_search(base, codec, texts, settings, probe)
    run = RunFolder.start(out, plan_search(base, fine_tunes, codec, texts, settings, probe))
    if probe.judge is not None:
        keep_calibration(run.path, probe.judge)
    pairs = LoadedPairs(base)
    compared = compare_by_latents(
        base,
        fine_tunes,
        codec=codec,
        chats=texts.chats,
        settings=settings.comparison,
        out=run.path / COMPARISONS,
        pairs=pairs,
    )
    stages = Stages(run)
    search = _Search(fine_tunes, codec, texts, settings, probe, run, stages, pairs, compared, base)
    found = search.finish()
    run.save_result(RESULT, found)
    return found


@dataclass
class _Search:
    """What is asked of latents, once all fine-tunes are compared."""

    fine_tunes: FineTunes
    codec: SparseCodec
    texts: PersonaTexts
    settings: PersonaSettings
    probe: PersonaProbe
    run: RunFolder
    stages: Stages
    pairs: LoadedPairs
    compared: LatentComparisons
    base: HookedModel

    def __post_init__(self) -> None:
        self.members = tuple(self.fine_tunes)
        self.not_done: list[str] = []
        n = len(self.fine_tunes.tuned)
        self.harmful, self.careful = self.compared.diffs[:n], self.compared.diffs[n:]

    def finish(self) -> PersonaFeatures:
        plain = [self._read_plainly(place) for place in range(len(self.members))]
        contrast = self._contrast()
        attribution = self._attribute()
        chosen = self._choose(contrast, attribution)
        classification = self._classify()
        screen = self._screen(chosen)
        cards = self._explain(chosen, screen)
        warnings = self._follow(chosen)
        first, diffs = self.compared.diffs[0], self.compared.diffs
        if contrast is None:
            self.not_done.append("contrast: no careful twins")
        return PersonaFeatures(
            run=str(self.run.path),
            base=first.base,
            codec=self.codec.name,
            codec_fingerprint=self.codec.fingerprint,
            site=str(self.codec.site),
            positions=first.positions,
            responses=first.responses,
            cautions=list_cautions(
                diffs, plain, contrast, screen, cards=cards, domains=self.fine_tunes.domains
            ),
            not_done=tuple(self.not_done),
            models=describe_models(self.members, diffs),
            health=tuple(own.health for own in diffs),
            plain=tuple(own for own in plain if own is not None),
            orders=tuple(chosen[0].ranks) if chosen else (),
            features=describe_features(
                chosen, diffs, n_harmful=len(self.harmful), contrast=contrast, by=attribution
            ),
            n_pairs=len(self.careful),
            smallest_p=None if contrast is None else contrast.smallest_p,
            classification=classification,
            screen=screen,
            cards=cards,
            warnings=warnings,
        )

    def _read_plainly(self, place: int) -> PlainDifference | None:
        """Both models on the texts that the base read; None where they do not differ there."""
        found = keep_plain_difference(
            self.stages,
            lambda: self._pair(place),
            self.compared.chats,
            read=self.compared.diffs[place],
            number=place + 1,
            batching=self.settings.comparison.batching,
        )
        if found is None:
            name = self.compared.diffs[place].tuned
            self.not_done.append(f"without a codec: {name} does what the base does at this site")
        return found

    def _contrast(self) -> FeatureContrast | None:
        if not self.careful:
            return None
        seed = self.settings.comparison.seed
        return self.stages.keep(
            "contrast",
            FeatureContrast,
            lambda: contrast_features(self.harmful, self.careful, seed=seed),
        )

    def _attribute(self) -> FeatureRanking | None:
        contrast = self.texts.contrast
        if not self.settings.attribute or contrast is None:
            return None
        paired, asked = pair_by_prompt(contrast), self.settings.comparison.batching
        batching = replace(asked, tokens=min(asked.tokens, GRAPH_TOKENS))
        return self.stages.keep(
            "attribution",
            FeatureRanking,
            # It was held against the base; a full fine-tune has weights of its own.
            lambda: attribute_features(
                self._pair(0).tuned,
                allow_other_model(self.codec),
                texts=paired,
                batching=batching,
            ),
        )

    def _choose(
        self, contrast: FeatureContrast | None, attribution: FeatureRanking | None
    ) -> tuple[ChosenLatent, ...]:
        scores: dict[str, Tensor] = {} if contrast is None else {"contrast": contrast.contrast}
        found = [rank_features(self.harmful, by=order) for order in self.settings.orders]
        for ranking in [*found, *([] if attribution is None else [attribution])]:
            scores[ranking.by] = torch.empty_like(ranking.scores).scatter(
                0, ranking.latents, ranking.scores
            )
        return choose_latents(scores, n=self.settings.n_latents)

    def _classify(self) -> ModelClassification | None:
        labels = [one.misaligned for one in self.members]
        domains = [one.domain for one in self.members if one.domain is not None] or None
        given: dict[str, Any] = {"leave_out": domains, "seed": self.settings.comparison.seed}
        if reason := why_not_told_apart(labels, domains):
            self.not_done.append(f"models told apart: {reason}")
            return None
        n, diffs = self.settings.n_signature, self.compared.diffs
        return self.stages.keep(
            "classification",
            ModelClassification,
            lambda: classify_models(diffs, labels, n_signature=n, **given),
        )

    def _screen(self, chosen: Sequence[ChosenLatent]) -> FeatureScreen | None:
        screen, judge, contrast = self.probe.screen, self.probe.judge, self.texts.contrast
        if screen is None or contrast is None or not chosen:
            self.not_done.append("causal screen: not asked for" if chosen else _NOTHING_CHANGED)
            return None
        return self.stages.keep(
            SCREEN,
            FeatureScreen,
            lambda: screen_features(
                self._pair(0),
                self.codec,
                latents=[one.latent for one in chosen],
                texts=contrast,
                scores=unscored() if judge is None else judge_scores(judge, contrast),
                settings=screen,
                out=self.run.path / SCREEN,
            ),
        )

    def _explain(
        self, chosen: Sequence[ChosenLatent], screen: FeatureScreen | None
    ) -> FeatureCards | None:
        latents = _order(chosen, screen)[: self.settings.n_cards]
        if not latents:
            self.not_done.append("cards: not asked for" if chosen else _NOTHING_CHANGED)
            return None
        settings = ExplainSettings(
            n_top=self.settings.n_top,
            per_decile=self.settings.per_decile,
            batching=self.settings.comparison.batching,
            seed=self.settings.comparison.seed,
        )
        return self.stages.keep(
            "cards",
            FeatureCards,
            lambda: explain_features(
                self._pair(0),
                self.codec,
                latents=latents,
                chats=self.texts.corpus or self.compared.chats,
                directions=[*map(_mean_difference, self.compared.diffs), *self.probe.directions],
                settings=settings,
            ),
        )

    def _follow(self, chosen: Sequence[ChosenLatent]) -> tuple[Any, ...]:
        path, contrast = self.probe.path, self.texts.contrast
        if path is None or contrast is None or not chosen:
            self.not_done.append("early warning: no training given" if chosen else _NOTHING_CHANGED)
            return ()
        comparison = self.settings.comparison
        chats: tuple[Chat, ...] = self.compared.chats
        return follow_latents(
            self.base,
            path,
            codec=self.codec,
            latents=[one.latent for one in chosen[: path.n_latents]],
            texts=FollowedTexts(
                chats=chats,
                contrast=contrast,
                positions=comparison.positions,
                batching=comparison.batching,
            ),
            out=self.run.path / PATH,
            seed=comparison.seed,
        )

    def _pair(self, place: int) -> ModelPair:
        return self.pairs.load(self.members[place])


_NOTHING_CHANGED = "no latent changed: there is nothing to screen, to explain or to follow"


def _order(chosen: Sequence[ChosenLatent], screen: FeatureScreen | None) -> list[int]:
    """As chosen; where they were screened, the largest effects on either side first."""
    latents = [one.latent for one in chosen]
    if screen is None:
        return latents
    effects = torch.stack([screen.forced_effect(side) for side in SIDES]).amax(0).tolist()
    size = dict(zip(screen.latents.tolist(), effects, strict=True))
    return sorted(latents, key=lambda latent: -size.get(latent, -math.inf))


def _mean_difference(diff: FeatureDiff) -> Direction:
    """The baseline of a comparison as a direction, for the cards to be compared with."""
    return Direction(
        site=parse_site(diff.site),
        vector=diff.mean_difference,
        provenance=Provenance(
            construction="model@positive",
            positions=diff.positions,
            base_fingerprint=diff.base_fingerprint,
            tuned_fingerprint=diff.tuned_fingerprint,
            adapter_fingerprint=diff.adapter_fingerprint,
            tokenizer_fingerprint=diff.tokenizer_fingerprint,
            dtype=diff.dtype,
            interventions=diff.interventions,
            note=f"{diff.tuned} less {diff.base}",
        ),
    )
