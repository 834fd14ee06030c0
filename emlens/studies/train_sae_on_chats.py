"""Train a sparse autoencoder on what a model makes of chats: captured, shuffled, trained.

For activations that are there already, use `emlens.codecs.train_sae`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emlens.activations import capture_activations, shuffle_activations
from emlens.codecs import Sae, train_sae
from emlens.codecs.rows import CorpusTooSmallError
from emlens.codecs.settings import SaeSettings
from emlens.data import Batching, Chat
from emlens.models.pair import ModelPair
from emlens.models.reading import Readable, identify

HELD_OUT = 32_768
"""Rows that the threshold is set on, at most: with more the file grows and the threshold does not
move."""
DEAD_AFTER = 200_000
"""Rows without firing after which a latent is dead, at most; a tenth of the run where that is
less, or none would ever be found dead."""


@dataclass(frozen=True, kw_only=True)
class TextSae:
    """What is trained on chats, and how often they come.

    Raises:
        ValueError: a number outside its range.
    """

    site: str
    """Whose activations."""
    architecture: str
    """`topk`, `batchtopk` or `matryoshka`."""
    d_sae: int
    """Latents."""
    k: int
    """Latents active at a token; on average, unless the architecture is `topk`."""
    positions: str = "all"
    """Which tokens; a template's header, the same in every chat, is best left out."""
    passes: int = 3
    """How often the same tokens come."""
    held_out: float = 0.05
    """Share of the tokens that is not trained on."""
    batch_rows: int = 4096
    """Tokens of an optimiser step."""
    learning_rate: float = 8e-4
    """Peak step size of Adam; 4,096 latents of a width of 576 were trained with it."""
    checkpoint_every: int = 50
    """Steps between two states from which an interrupted run goes on."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, expected a share between 0 and 1")
        for name in ("passes", "batch_rows", "d_sae", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")

    def for_rows(self, train: int, held_out: int) -> SaeSettings:
        """The recipe for as many tokens: warmed up over a twentieth, decayed over a fourth.

        Args:
            train: tokens of one pass.
            held_out: tokens that are held out.

        Raises:
            CorpusTooSmallError: too few for as many latents.
            ValueError: fewer tokens than one batch.
        """
        steps = train * self.passes // self.batch_rows
        if steps < 1:
            raise ValueError(
                f"chats: {train} tokens to train on, expected at least one batch of "
                f"{self.batch_rows} (batch_rows) in {self.passes} passes; give more text"
            )
        seen = min(train, steps * self.batch_rows)
        if seen * self.k < SaeSettings.least_firings * self.d_sae:
            firings = seen * self.k / self.d_sae
            raise CorpusTooSmallError(
                f"chats: {seen} tokens, in which a latent is active {firings:.3g} times on "
                f"average (tokens x k / d_sae); expected {SaeSettings.least_firings} "
                "(least_firings). Give more text, or ask for fewer latents"
            )
        known: Any = self.architecture
        widths = None
        if known == "matryoshka":
            widths = tuple(sorted({max(1, self.d_sae >> power) for power in (3, 2, 1, 0)}))
        return SaeSettings(
            architecture=known,
            d_sae=self.d_sae,
            k=self.k,
            steps=steps,
            batch_rows=self.batch_rows,
            learning_rate=self.learning_rate,
            warmup_steps=steps // 20,
            decay_steps=steps // 4,
            dead_after_rows=max(1, min(DEAD_AFTER, train * self.passes // 10)),
            max_passes=self.passes,
            held_out_rows=min(HELD_OUT, held_out),
            checkpoint_every=self.checkpoint_every,
            matryoshka_widths=widths,
        )


def train_sae_on_chats(
    model: Readable,
    chats: Sequence[Chat | str],
    *,
    settings: TextSae,
    activations: str | Path,
    out: str | Path,
    seed: int,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> Sae:
    """Capture activations, and train and calibrate an autoencoder on them; the same call goes on.

    Args:
        model: one model, or a pair: then tokens of both are trained on alike.
        chats: prompts (str) or chats, of all sorts of text.
        settings: site, sizes, passes.
        activations: folder of what is captured; it may be deleted when the training is finished.
        out: run folder; `<out>/results/codec` is what `load_sae` reads.
        seed: of the order of the tokens and of the weights' start.
        batching: tokens run at once; also the size of the parts that are held out as a whole.

    Raises:
        CorpusTooSmallError: too few tokens for as many latents.
        PlanChangedError: a folder holds a run of another plan.
        ValueError: a site or positions that model or chats do not have.
    """
    shards = capture_activations(
        model,
        chats,
        sites=settings.site,
        positions=settings.positions,
        out=activations,
        batching=batching,
    )
    rows = shuffle_activations(
        shards,
        site=settings.site,
        seed=seed,
        base_fingerprint=identify(model).base_fingerprint,
        device=str((model.base if isinstance(model, ModelPair) else model).W_E.device),
    )
    train, held_out = rows.split(settings.held_out)
    recipe = settings.for_rows(train.n_rows, held_out.n_rows)
    sae = train_sae(
        train, site=settings.site, settings=recipe, out=out, seed=seed, held_out=held_out
    )
    return dataclasses.replace(sae, name=str(out))
