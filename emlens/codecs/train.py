"""Train a sparse autoencoder on activations, into a folder that says how it was made.

It takes tensors and knows no model: capture activations first (`emlens.activations`). The losses
and the revival of dead latents are sae_lens's.
"""

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from emlens.artifacts import Result
from emlens.codecs.calibrate import calibrate_threshold
from emlens.codecs.checkpoint import drop_checkpoint
from emlens.codecs.fit import CodecFit, measure_fit
from emlens.codecs.loop import CodecCurves, run_steps
from emlens.codecs.rows import TrainingRows
from emlens.codecs.runtime import Sae
from emlens.codecs.sae_trainer import SaeTrainer
from emlens.codecs.settings import CodecSettings, SaeSettings
from emlens.runs import RunFolder
from emlens.sites import Site, parse_site

logger = logging.getLogger(__name__)

RESULT_NAME = "training"
CODEC_NAME = "codec"
ARCHITECTURES = {"topk": "topk", "batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
"""What is trained -> what `Sae.architecture` calls what comes of it."""


@dataclass(frozen=True, kw_only=True)
class SaeTraining(Result):
    """A finished training of a sparse autoencoder."""

    kind: ClassVar[str] = "sae_training"

    codec: str
    """Folder of what was trained, which `load_sae` reads."""
    codec_fingerprint: str
    """Of its weights and of how they are used."""
    site: str
    """Whose activations it was trained on."""
    positions: str
    """At which tokens."""
    base_fingerprint: str | None
    """Of the weights of the model they are of, where that is known."""
    d_in: int
    """Width of an activation."""
    settings: SaeSettings
    """The recipe."""
    seed: int
    """Of the weights' start."""
    rows_of_a_pass: int | None
    """Rows of the corpus without those held out; None of an iterator, whose rows nobody counted."""
    curves: CodecCurves
    """How it went, batch by batch, by the k largest codes a row of a batch."""
    threshold: float | None
    """Set on the held-out rows; None of `topk`."""
    held_out: CodecFit
    """How well it fits the held-out rows as it is used, with its threshold."""
    seconds: float
    """Wall time of the steps."""


def train_sae(
    activations: Iterable[Tensor],
    *,
    site: str | Site,
    settings: SaeSettings,
    out: str | Path,
    seed: int,
    held_out: Iterable[Tensor] | None = None,
) -> Sae:
    """Train a sparse autoencoder and write it, with how it went, into `<out>`.

    The same call on the same `out` returns what is finished there; an interrupted one goes on from
    its last checkpoint, and ends with the same weights as one that was not. The record of the run
    is `read_training(out)`; `<out>/results/codec` is what `load_sae` reads.

    Args:
        activations: tensors [n d_in] of any number of rows, in random order: batches are cut from
            them as they come. `shuffle_activations` gives what was captured so. They are read again
            where one pass is not enough. Training runs on the device that they are on.
        site: whose activations they are.
        settings: the recipe.
        out: run folder.
        seed: of the weights' start.
        held_out: rows of texts that are not among the activations; by default the first rows of
            these are kept back.

    Raises:
        CorpusTooSmallError: fewer rows than the run needs.
        CodecDivergedError: the loss is not finite; the last checkpoint is kept.
        CodecError: activations of another site or shape, or sae_lens is not installed.
        PlanChangedError: `out` holds a run with another plan.
    """
    place = parse_site(site) if isinstance(site, str) else site
    rows = TrainingRows(activations, held_out, settings=settings, axes=2)
    rows.check_site(place)
    run = RunFolder.start(out, describe_training("sae", rows, place, settings, seed))
    if run.has_result(RESULT_NAME):
        logger.info("%s: this run is finished, returned as it is", run.path)
        return run.read_result(CODEC_NAME, Sae)
    trainer = SaeTrainer(settings, rows.first, seed=seed)
    trained = run_steps(
        trainer, rows, settings=settings, folder=run.path, task="training SAE (rows)"
    )
    sae = Sae(
        name=str(run.path),
        architecture=ARCHITECTURES[settings.architecture],
        site=place,
        positions=rows.positions,
        k=settings.k if settings.architecture == "topk" else None,
        base_fingerprint=rows.base_fingerprint,
        **trainer.weights(),
    )
    held = rows.held_out.float()
    if sae.threshold is not None:
        sae = calibrate_threshold(sae, held, l0=float(settings.k))
    training = SaeTraining(
        codec=str(run.save_result(CODEC_NAME, sae)),
        codec_fingerprint=sae.fingerprint,
        site=str(place),
        positions=rows.positions,
        base_fingerprint=rows.base_fingerprint,
        d_in=sae.d_in,
        settings=settings,
        seed=seed,
        rows_of_a_pass=rows.n_rows,
        curves=trained.curves,
        threshold=None if sae.threshold is None else float(sae.threshold[0]),
        held_out=measure_fit(sae, [held]),
        seconds=trained.seconds,
    )
    run.save_result(RESULT_NAME, training)
    drop_checkpoint(run.path)
    return sae


def read_training(out: str | Path) -> SaeTraining:
    """The record of a finished run.

    Raises:
        ArtifactError: the folder holds no run, or one that is not finished.
    """
    return RunFolder.open(out).read_result(RESULT_NAME, SaeTraining)


def describe_training(
    what: str, rows: TrainingRows, site: Site, settings: CodecSettings, seed: int
) -> dict[str, Any]:
    """All that decides what a training ends with; how often its state is kept does not."""
    recipe = dataclasses.asdict(settings)
    del recipe["checkpoint_every"]
    return {
        "task": f"train_{what}",
        "site": str(site),
        "activations": rows.describe(),
        "settings": recipe,
        "seed": seed,
    }
