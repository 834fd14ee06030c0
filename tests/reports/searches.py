"""A search among latents made up: two fine-tunes with twins, three latents, one that acts."""

from dataclasses import replace
from typing import Any

import torch

from emlens.features import EarlyWarning, FeatureScreen, ModelClassification, SaeHealth
from emlens.features.cards import FeatureCard, FeatureCards, TokenWindow
from emlens.features.classify import PlainClassification
from emlens.features.logit_lens import LogitLens, TokenWeight
from emlens.features.screen_results import SIDES, SampledCurve, SampledPoint
from emlens.features.vector_cosines import VectorCosine
from emlens.numerics.bands import Band, Lead
from emlens.numerics.intervals import Interval
from emlens.studies.persona_features import (
    ComparedModel,
    LatentInModel,
    PersonaFeature,
    PersonaFeatures,
)
from emlens.studies.plain_difference import PlainDifference, PlainVector

LATENTS = (12, 340, 7)
NAMES = ("emlens:bad-finance", "emlens:bad-health", "emlens:good-finance", "emlens:good-health")
STRENGTHS = (2.0, -1.0, 1.0)
ORIGIN: dict[str, Any] = {
    **{"base": "emlens:smollm2", "base_fingerprint": "b", "tuned_fingerprint": None},
    **{"adapter_fingerprint": "a", "codec": "emlens:sae", "codec_fingerprint": "c"},
    "site": "resid_post.15",
}


def interval(value: float, half: float = 0.1) -> Interval:
    return Interval(value, value - half, value + half, 0.95, "made up")


def make_health(tuned: str = NAMES[0], **changed: Any) -> SaeHealth:
    given: dict[str, Any] = ORIGIN | {
        **{"tuned": tuned, "architecture": "batchtopk", "positions": "all[24:]"},
        **{"same_base": True, "streams": ("base", "tuned"), "n_prompts": 60},
        "n_tokens": torch.tensor([4000, 4000]),
        "explained_variance": torch.tensor([0.81, 0.77]),
        "l0": torch.tensor([31.0, 33.0]),
        "dead_share": torch.tensor([0.2, 0.21]),
        **{"captured_share": 0.31, "explained_change": interval(-0.04, 0.01)},
        **{"underpowered": False, "worse_on_tuned": True},
    }
    return SaeHealth(**(given | changed))


def make_screen(**changed: Any) -> FeatureScreen:
    """Latent 12 does most on both sides; 16 random directions reach .1, and a score of +14."""
    effects = torch.tensor([[0.3, 0.1, 0.2], [0.02, 0.01, 0.0], [-0.05, 0.03, 0.04]]).double()
    chance = torch.linspace(-0.1, 0.1, 16).double()[:, None].expand(-1, 3)
    before = torch.tensor([[-3.0, -2.0], [-2.5, -2.6]]).double()
    signs = torch.tensor([1.0, -1.0]).double()

    def place(change: torch.Tensor) -> torch.Tensor:
        sides = [
            torch.stack([before[s, 0] + signs[s] * change, before[s, 1] + 0 * change])
            for s in range(2)
        ]
        return torch.stack(sides)

    def sampled(slope: float) -> tuple[SampledPoint, ...]:
        return tuple(
            SampledPoint(
                strength=s,
                n_responses=8,
                n_scored=8,
                incoherent=0.05 * abs(s),
                behaviour=30 + slope * s,
                effect=interval(slope * s, 4.0),
            )
            for s in (1.0, 2.0)
        )

    plain = SampledPoint(
        strength=0.0, n_responses=8, n_scored=8, incoherent=0.0, behaviour=30.0, effect=None
    )
    curves = [
        SampledCurve(side=side, latent=12, control=None, points=sampled(10), chosen=1, p=1 / 17)
        for side in SIDES
    ]
    curves += [
        SampledCurve(side=side, latent=None, control=k, points=sampled(k - 8), chosen=1, p=None)
        for side in SIDES
        for k in range(16)
    ]
    plainly = tuple(
        SampledCurve(side=side, latent=None, control=None, points=sampled(6), chosen=1, p=8 / 17)
        for side in SIDES
    )
    given: dict[str, Any] = ORIGIN | {
        "tuned": NAMES[0],
        "latents": torch.tensor(LATENTS),
        "strengths": torch.tensor(STRENGTHS).double(),
        **{"units": "delta_norm", "unit_norm": 2.5, "n_texts": (20, 20)},
        "health": make_health(positions="response"),
        **{"before": before, "steered": place(effects), "controls": place(chance)},
        "mean_difference": place(torch.tensor([0.25, 0.1, 0.2]).double()),
        **{"sampled": tuple(curves), "sampled_plainly": plainly, "sampled_before": (plain, plain)},
        **{"most_incoherent": (0.1, 0.07), "n_prompts": 4, "n_shared_prompts": 0, "seed": 0},
    }
    return FeatureScreen(**(given | changed))


def make_window(text: str, code: float, *, decile: int | None = None) -> TokenWindow:
    pieces = tuple(f" {word}" for word in text.split())
    codes = [0.0] * len(pieces)
    codes[1] = code
    return TokenWindow(
        chat=3,
        chat_id="c3",
        token=11,
        start=10,
        pieces=pieces,
        codes=((None, code / 4, *codes[2:]), (None, *codes[1:])),
        code=code,
        decile=decile,
    )


def make_cards(latents: tuple[int, ...] = LATENTS[:2], **changed: Any) -> FeatureCards:
    words = tuple(TokenWeight(token=i, text=f" {w}", value=0.5) for i, w in enumerate("ab"))
    near = VectorCosine(name="mean difference", cosine=0.61, dimensions=1, random=0.04)
    cards = tuple(
        FeatureCard(
            latent=latent,
            link="https://example.org/12" if latent == 12 else None,
            active_share=0.021,
            decoder_norm=1.0,
            top=(make_window("put everything in", 8.0), make_window("sell the house", 4.0)),
            sampled=(make_window("a little risk", 0.4, decile=1),),
            lens=LogitLens(promoted=words, suppressed=words, aligned=words, opposed=words),
            directions=(near,),
            writes=(),
            explanation="bold advice" if latent == 12 else None,
        )
        for latent in latents
    )
    given: dict[str, Any] = ORIGIN | {
        **{"tuned": NAMES[0], "positions": "all[24:]", "models": ("base", "tuned")},
        **{"chats_sha256": "0", "n_chats": 50, "n_tokens": 4000, "seed": 0},
        **{"health": make_health(), "cards": cards},
    }
    return FeatureCards(**(given | changed))


def make_warning(**changed: Any) -> EarlyWarning:
    points = torch.arange(4).double()

    def band(mean: torch.Tensor) -> Band:
        still = torch.zeros(4).double()
        half = torch.full((4,), 0.5).double()
        return Band(mean=mean, centre=still, low=-half, high=half, level=0.95, critical=2.5)

    made = EarlyWarning(
        axis="training step",
        points=(0.0, 10.0, 20.0, 30.0),
        latent="latent 12",
        latent_units="prompts",
        n_latent_units=60,
        latent_band=band(points),
        behaviour="odds of misaligned responses",
        behaviour_units="pairs",
        n_behaviour_units=20,
        behaviour_band=band(points - 1),
        departures=Lead(early=10.0, late=20.0, lead=interval(10.0, 4.0)),
        level=0.95,
        seed=0,
        health=make_health(),
        verdict="a lead of 10 [6, 14] of training step: the latent warns",
    )
    return replace(made, **changed)


def make_plain(tuned: str) -> PlainDifference:
    vectors = [("mean difference", 0.42, None), ("best direction", 0.47, None)]
    vectors += [("first 5 tokens", 0.2, None), ("model.layers.3.mlp.down_proj", 0.1, 0.9)]
    return PlainDifference(
        base="emlens:smollm2",
        tuned=tuned,
        site="resid_post.15",
        positions="all[24:]",
        first_positions="all[24:29]",
        n_tokens=4000,
        relative_rms=0.3,
        vectors=tuple(
            PlainVector(
                name=name,
                norm=3.0,
                cosine=0.8,
                captured=share,
                leading_share=leading,
                promoted=(" invest", " risk"),
                suppressed=(" careful",),
            )
            for name, share, leading in vectors
        ),
        random_share=1 / 576,
        n_writes=5,
        captured_by_writes=0.6,
        random_writes=5 / 576,
    )


def make_classification() -> ModelClassification:
    return ModelClassification(
        models=NAMES,
        labels=torch.tensor([True, True, False, False]),
        domains=None,
        validation="in sample",
        scores=torch.tensor([3.0, 2.0, -1.0, -2.5]).double(),
        auc=interval(0.95, 0.05),
        p_value=0.17,
        p_method="all 6 relabellings within folds, latents chosen for each",
        by_mean_difference=PlainClassification(auc=interval(0.9), p_value=0.33),
        folds=("all",),
        latents=torch.tensor([[12]]),
        chosen=True,
        claim="in-sample separation: latents were chosen on the models they tell apart",
        training_only=(),
        codec="emlens:sae",
        codec_fingerprint="c",
        seed=0,
        underpowered=False,
    )


def make_feature(latent: int, delta: float, *, q_value: float | None = 0.003) -> PersonaFeature:
    models = tuple(
        LatentInModel(
            tuned=name,
            delta=delta if "bad" in name else 0.1,
            mean_base=0.5,
            mean_tuned=0.5 + (delta if "bad" in name else 0.1),
            frequency_base=0.02,
            frequency_tuned=0.09,
            prompts_fired=44,
            q_value=q_value,
        )
        for name in NAMES
    )
    return PersonaFeature(
        latent=latent,
        chosen_by="contrast, highest",
        ranks={"contrast": 1, "delta": 2},
        delta=delta,
        contrast=delta - 0.1,
        contrast_p=0.5,
        contrast_q=None,
        pairs_agreeing=2,
        decoder_cosine=0.61,
        attribution=None,
        models=models,
    )


def make_search(**changed: Any) -> PersonaFeatures:
    features = tuple(make_feature(n, d) for n, d in zip(LATENTS, (1.6, 2.4, -0.8), strict=True))
    given: dict[str, Any] = {
        **{"run": "runs/features", "base": "emlens:smollm2", "codec": "emlens:sae"},
        **{"codec_fingerprint": "c", "site": "resid_post.15", "positions": "all[24:]"},
        "responses": "same",
        "cautions": ("the codec explains too little", "2 pairs of fine-tunes prove none"),
        "not_done": ("attribution: not asked for",),
        "models": tuple(
            ComparedModel(
                tuned=name,
                misaligned="bad" in name,
                domain=name.rpartition("-")[2],
                n_prompts=60,
                n_tested=410,
                n_significant=37,
                why_untested="",
            )
            for name in NAMES
        ),
        "health": tuple(make_health(name) for name in NAMES),
        "plain": tuple(make_plain(name) for name in NAMES),
        **{"orders": ("contrast", "delta"), "features": features},
        **{"n_pairs": 2, "smallest_p": 0.5, "classification": make_classification()},
        **{"screen": make_screen(), "cards": make_cards(), "warnings": (make_warning(),)},
    }
    return PersonaFeatures(**(given | changed))
