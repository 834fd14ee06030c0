"""Do latents leave the base before the behaviour does, along the checkpoints of a training?

The behaviour is the odds of fixed misaligned against aligned responses, which costs no sampling.
For sampled shares, or over shares of bad data, hand your own series to
`emlens.features.measure_early_warning`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs import SparseCodec
from emlens.data import Batching, Chat, ContrastTexts, report_progress, tokenize_chat, track
from emlens.data.prompts import hash_chats
from emlens.features import (
    EarlyWarning,
    LatentCodes,
    SaeHealth,
    Series,
    check_sae,
    measure_early_warning,
    read_latents,
)
from emlens.features.reading import group_by_prompt
from emlens.models.attach import attach_adapter
from emlens.models.identity import identify_model
from emlens.models.pair import load_pair
from emlens.models.protocol import HookedModel
from emlens.models.score import score_responses
from emlens.organisms.trajectory import AdapterTrajectory, TrajectoryError
from emlens.runs import RunFolder
from emlens.studies.persona_settings import LatentPath
from emlens.studies.stages import Stages
from emlens.studies.trace_behaviour import list_scored, measure_odds_curve
from emlens.studies.transition_trace import OddsCurve

FEWEST_UNITS = 6
"""Prompts, and pairs of responses: with fewer no series can leave a band of 95 %."""
BEHAVIOUR = "odds of misaligned responses"


@dataclass(frozen=True, kw_only=True)
class FollowedTexts:
    """What latents and behaviour are read on, at every checkpoint.

    Raises:
        ValueError: too few prompts or pairs, or classes of two sizes.
    """

    chats: tuple[Chat, ...]
    """Prompts or answered chats, that codes are read on."""
    contrast: ContrastTexts
    """Misaligned and aligned responses, pair by pair."""
    positions: str | None = None
    """Which tokens; by default those that the codec was trained on."""
    batching: Batching = Batching()  # noqa: RUF009 - frozen
    """Tokens run at once."""

    def __post_init__(self) -> None:
        first, second = len(self.contrast.positive), len(self.contrast.negative)
        if first != second:
            raise ValueError(
                f"contrast: {first} misaligned and {second} aligned responses; along a training "
                "they are followed pair by pair, so give as many of each, in the same order"
            )
        n_prompts = len(group_by_prompt(self.chats)[1])
        for name, n in (("chats", n_prompts), ("contrast", first)):
            if n < FEWEST_UNITS:
                raise ValueError(
                    f"{name}: got {n} {'prompts' if name == 'chats' else 'pairs'} to follow along "
                    f"a training, expected at least {FEWEST_UNITS}: with fewer no series can leave "
                    "its band"
                )


def follow_latents(
    base: HookedModel,
    path: LatentPath,
    *,
    codec: SparseCodec,
    latents: Sequence[int],
    texts: FollowedTexts,
    out: str | Path,
    seed: int = 0,
) -> tuple[EarlyWarning, ...]:
    """Follow latents and behaviour along a training; the same call on the same `out` goes on.

    Args:
        base: what was trained on, loaded.
        path: the checkpoints, and those of a careful twin where there is one.
        codec: of the base's architecture.
        latents: which; name them before you look, or some lead by chance.
        texts: what is read.
        out: run folder; every checkpoint is a stage of its own.
        seed: of exchanges and resamples.

    Returns:
        One for each latent, with how well the codec fits base and last checkpoint on `texts.chats`.

    Raises:
        TrajectoryError: the twin has other checkpoints.
        PlanChangedError: `out` holds a run of another plan.
        ValueError: a base that the adapters do not fit; see `measure_early_warning`.
    """
    steps = list_scored(path.trajectory.steps, path.every)
    if path.twin is not None:
        _check_twin(path.twin, steps, every=path.every)
    run = RunFolder.start(out, _plan(base, path, codec, latents, texts))
    work = _Following(base, codec, tuple(latents), texts, Stages(run), steps, path.every)
    codes, odds = work.read("tuned", path.trajectory)
    if path.twin is None:
        base_codes, base_odds = work.read_base()
    else:
        base_codes, base_odds = work.read("twin", path.twin)
    health = work.check(path.trajectory)
    behaviour = Series(name=BEHAVIOUR, units="pairs", base=base_odds, values=odds)
    return tuple(
        measure_early_warning(
            Series(
                name=f"latent {latent}",
                units="prompts",
                base=base_codes[:, :, place],
                values=codes[:, :, place],
            ),
            behaviour,
            points=[float(step) for step in steps],
            axis="training step",
            seed=seed,
            health=health,
        )
        for place, latent in enumerate(latents)
    )


def _plan(
    base: HookedModel,
    path: LatentPath,
    codec: SparseCodec,
    latents: Sequence[int],
    texts: FollowedTexts,
) -> dict[str, Any]:
    return {
        "kind": "followed_latents",
        "base": {k: v for k, v in vars(identify_model(base)).items() if k != "name"},
        "trajectory": path.trajectory.fingerprint(),
        "twin": None if path.twin is None else path.twin.fingerprint(),
        "every": path.every,
        "codec": codec.fingerprint,
        "latents": list(latents),
        "chats_sha256": hash_chats(texts.chats),
        "positive_sha256": hash_chats(texts.contrast.positive),
        "negative_sha256": hash_chats(texts.contrast.negative),
        "positions": texts.positions or codec.positions,
    }


def _check_twin(twin: AdapterTrajectory, steps: Sequence[int], *, every: int) -> None:
    own = list_scored(twin.steps, every)
    if own != list(steps):
        raise TrajectoryError(
            f"twin: {twin.source} has checkpoints {own[:3]}..., expected {list(steps)[:3]}... as "
            f"the fine-tune has ({len(own)} and {len(steps)} in all); train it with the same "
            "settings"
        )


@dataclass(frozen=True)
class _Following:
    """One base, one codec, one set of latents."""

    base: Any
    codec: SparseCodec
    latents: tuple[int, ...]
    texts: FollowedTexts
    stages: Stages
    steps: list[int]
    every: int

    def read(
        self, who: str, trajectory: AdapterTrajectory
    ) -> tuple[Float[Tensor, "prompt point latent"], Float[Tensor, "pair point"]]:
        """Codes and odds of a training, checkpoint by checkpoint."""
        codes = [
            self.stages.keep(
                f"codes_{who}_{step}",
                LatentCodes,
                lambda step=step: self._read(attach_adapter(self.base, trajectory.adapter(step))),
            ).codes[0]
            for step in track(self.steps, f"following latents in {who} (checkpoints)")
        ]
        return torch.stack(codes, 1), self._score(who, trajectory).odds.double()

    def read_base(self) -> tuple[Tensor, Tensor]:
        """Codes and odds of the base, the same at every point."""
        n = len(self.steps)
        codes = self.stages.keep("codes_base", LatentCodes, lambda: self._read(self.base)).codes[0]
        odds = self.stages.keep("odds_base", OddsCurve, self._score_base).odds.double()
        return codes[:, None].expand(-1, n, -1), odds.expand(-1, n)

    def check(self, trajectory: AdapterTrajectory) -> SaeHealth:
        """How well the codec fits the base and the last checkpoint, which is farthest from it."""

        def make() -> SaeHealth:
            with report_progress(None):
                return check_sae(
                    load_pair(self.base, trajectory.adapter(self.steps[-1])),
                    self.codec,
                    chats=self.texts.chats,
                    positions=self.texts.positions,
                    batching=self.texts.batching,
                )

        return self.stages.keep("health", SaeHealth, make)

    def _read(self, model: Any) -> LatentCodes:
        with report_progress(None):  # of checkpoints, not of the chats at each of them
            return read_latents(
                model,
                self.codec,
                latents=self.latents,
                chats=self.texts.chats,
                positions=self.texts.positions,
                batching=self.texts.batching,
            )

    def _score(self, who: str, trajectory: AdapterTrajectory) -> OddsCurve:
        return self.stages.keep(
            f"odds_{who}",
            OddsCurve,
            lambda: measure_odds_curve(
                self.base,
                trajectory,
                texts=self.texts.contrast,
                scale=1.0,
                every=self.every,
                batching=self.texts.batching,
            ),
        )

    def _score_base(self) -> OddsCurve:
        texts = self.texts.contrast
        both = (*texts.positive, *texts.negative)
        chats = [tokenize_chat(chat, self.base.tokenizer) for chat in both]
        scores = score_responses(self.base, chats, batching=self.texts.batching)
        means = torch.tensor([score.mean for score in scores])
        n = len(texts.positive)
        odds = (means[:n] - means[n:])[:, None]
        return OddsCurve(scale=0.0, steps=torch.tensor([0]), odds=odds)
