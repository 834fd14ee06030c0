"""Train a crosscoder on the activations of a base and its fine-tune, into a folder of its own.

Use it to find latents that one of the two models has alone, and sort them with
`measure_latent_scaling`. For latents of one model train an autoencoder (`train_sae`).
"""

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.artifacts import Result
from emlens.codecs.calibrate import Threshold, find_threshold
from emlens.codecs.checkpoint import drop_checkpoint
from emlens.codecs.codec import CodecError
from emlens.codecs.crosscoder import MODELS, Crosscoder
from emlens.codecs.crosscoder_trainer import CrosscoderTrainer
from emlens.codecs.fit import CodecFit, FitAccumulator
from emlens.codecs.loop import CodecCurves, run_steps
from emlens.codecs.rows import TrainingRows
from emlens.codecs.settings import CrosscoderSettings
from emlens.codecs.train import CODEC_NAME, RESULT_NAME, describe_training
from emlens.runs import RunFolder
from emlens.sites import Site, parse_site

logger = logging.getLogger(__name__)

_CHUNK_VALUES = 2**22
"""Codes made at a time: 16 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class CrosscoderTraining(Result):
    """A finished training of a crosscoder."""

    kind: ClassVar[str] = "crosscoder_training"

    codec: str
    """Folder of what was trained."""
    codec_fingerprint: str
    """Of its weights and of how they are used."""
    site: str
    """Whose activations it was trained on."""
    positions: str
    """At which tokens."""
    base_fingerprint: str | None
    """Of the base's weights, where that is known."""
    d_in: int
    """Width of an activation."""
    settings: CrosscoderSettings
    """The recipe."""
    seed: int
    """Of the weights' start."""
    rows_of_a_pass: int | None
    """Tokens of the corpus without those held out; None of an iterator."""
    curves: CodecCurves
    """How it went, batch by batch; explained variance is that of both models together."""
    threshold: float
    """Set on the held-out tokens."""
    held_out: tuple[CodecFit, ...]
    """How well it fits held-out tokens as it is used: of base and tuned."""
    seconds: float
    """Wall time of the steps."""


def train_crosscoder(
    activations: Iterable[Tensor],
    *,
    site: str | Site,
    settings: CrosscoderSettings,
    out: str | Path,
    seed: int,
    held_out: Iterable[Tensor] | None = None,
) -> Crosscoder:
    """Train a BatchTopK crosscoder and write it, with how it went, into `<out>`.

    The same call on the same `out` returns what is finished there, or goes on from the last
    checkpoint. There is no L1 penalty to choose: with one, latents that both models share come out
    as one model's alone (Minder et al. 2025).

    Args:
        activations: tensors [2 n d_in] of base and tuned, in this order, at the same tokens, in
            random order: `shuffle_activations(..., paired=True)` gives captured ones so.
        site: whose activations they are.
        settings: the recipe.
        out: run folder.
        seed: of the weights' start.
        held_out: tokens of texts that are not among the activations; by default the first ones of
            these are kept back.

    Raises:
        CorpusTooSmallError: fewer tokens than the run needs.
        CodecDivergedError: the loss is not finite; the last checkpoint is kept.
        CodecError: activations of another site or shape, or not of two models.
        PlanChangedError: `out` holds a run with another plan.

    Source: Minder et al. 2025, arXiv 2504.02922.
    """
    place = parse_site(site) if isinstance(site, str) else site
    rows = TrainingRows(activations, held_out, settings=settings, axes=3)
    rows.check_site(place)
    if len(rows.first) != len(MODELS):
        raise CodecError(
            f"activations: tensors of {len(rows.first)} models, expected {len(MODELS)}: {MODELS}"
        )
    run = RunFolder.start(out, describe_training("crosscoder", rows, place, settings, seed))
    if run.has_result(RESULT_NAME):
        logger.info("%s: this run is finished, returned as it is", run.path)
        return run.read_result(CODEC_NAME, Crosscoder)
    trainer = CrosscoderTrainer(settings, rows.first, seed=seed)
    trained = run_steps(
        trainer, rows, settings=settings, folder=run.path, task="training crosscoder (rows)"
    )
    weights = trainer.weights()
    crosscoder = Crosscoder(
        name=str(run.path),
        architecture="batchtopk",
        site=place,
        positions=rows.positions,
        base_fingerprint=rows.base_fingerprint,
        threshold=torch.zeros_like(weights["b_enc"]),
        **weights,
    )
    held = rows.held_out.float()
    crosscoder, found = _calibrate(crosscoder, held, l0=float(settings.k))
    training = CrosscoderTraining(
        codec=str(run.save_result(CODEC_NAME, crosscoder)),
        codec_fingerprint=crosscoder.fingerprint,
        site=str(place),
        positions=rows.positions,
        base_fingerprint=rows.base_fingerprint,
        d_in=crosscoder.d_in,
        settings=settings,
        seed=seed,
        rows_of_a_pass=rows.n_rows,
        curves=trained.curves,
        threshold=found.value,
        held_out=measure_crosscoder_fit(crosscoder, [held]),
        seconds=trained.seconds,
    )
    run.save_result(RESULT_NAME, training)
    drop_checkpoint(run.path)
    return crosscoder


@torch.no_grad()
def measure_crosscoder_fit(
    crosscoder: Crosscoder, pairs: Iterable[Float[Tensor, "models _ d_in"]]
) -> tuple[CodecFit, ...]:
    """How well a crosscoder fits activations of base and tuned at its site: one fit a model."""
    d_in, d_sae = crosscoder.d_in, crosscoder.d_sae
    found = [FitAccumulator(d_in, d_sae) for _ in MODELS]
    for part in pairs:
        for chunk in part.split(max(1, _CHUNK_VALUES // d_sae), dim=1):
            codes = crosscoder.encode(chunk[0], chunk[1])
            made = crosscoder.decode(codes)
            for fit, x, reconstruction in zip(found, chunk, made, strict=True):
                fit.update(x, codes, reconstruction)
    return tuple(fit.result() for fit in found)


def _calibrate(
    plain: Crosscoder, held: Float[Tensor, "models n d_in"], *, l0: float
) -> tuple[Crosscoder, Threshold]:
    """The same crosscoder with a threshold that keeps so many codes a token."""
    # Both models' activations of a token side by side, so that tokens are rows.
    rows = held.transpose(0, 1).flatten(1)

    def encode(pairs: Tensor) -> Tensor:
        base, tuned = pairs.unflatten(1, (len(MODELS), -1)).unbind(1)
        return plain.encode(base, tuned).values

    found = find_threshold(encode, rows, l0=l0, d_sae=plain.d_sae)
    threshold = torch.full_like(plain.b_enc, found.value)
    return dataclasses.replace(plain, threshold=threshold), found
