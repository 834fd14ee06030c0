"""Train the sparse autoencoder that ships: latents of SmolLM2's residual stream, with a card.

    OMP_NUM_THREADS=2 python scripts/train_sae.py [--stage text|capture|train|card] [--runs FOLDER]
        [--text FOLDER]... [--quick]

Four stages, each of which goes on where it was interrupted; without `--stage` all of them. `text`
has the model answer prompts and gathers general English, `capture` runs the model up to the site,
`train` trains and calibrates, `card` measures base and fine-tune on texts that nothing was trained
on and writes the autoencoder among the assets. `RUNS/STAGE.log` tells of each step.

Two million tokens are to be trained on, each counted once, headers and texts held out not at all.
Where the texts at hand cannot give them, `text` says so before the model answers anything, and no
later stage begins with fewer. What was made of other texts stays where it is: activations and
trainings lie in folders that are named after the texts.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from emlens.activations import ActivationShards, capture_activations, shuffle_activations
from emlens.artifacts import write_text_atomic
from emlens.codecs.calibrate import calibrate_threshold
from emlens.codecs.files import save_sae
from emlens.codecs.fit import CodecFit, measure_fit
from emlens.codecs.runtime import Sae
from emlens.codecs.train import read_training, train_sae
from emlens.data import Batching, load_chats, show_progress
from emlens.models.loading import load_model
from emlens.models.pair import load_pair
from emlens.models.quiet import quiet_host_libraries
from emlens.models.reading import identify
from scripts.gather_text import PACKAGES, fetch_packages
from scripts.sae_texts import TooLittleTextError, check_enough, gather_texts
from scripts.sae_work import AIM, QUICK, Work
from scripts.train_zoo import logged_to

logger = logging.getLogger("emlens.scripts.train_sae")

NAME = "smollm2-resid15"
SHIPPED = Path(__file__).parent.parent / "emlens" / "assets" / "saes"
BATCHING = Batching(tokens=2048, max_length=1024)
STAGES = ("text", "capture", "train", "card")
CARD = Path(__file__).parent / "sae_card.md"
"""The card, with fields in braces."""


def capture(work: Work) -> tuple[ActivationShards, ActivationShards]:
    """Activations of the base on the training texts, and of base and fine-tune on the others.

    Raises:
        TooLittleTextError: the texts do not give enough tokens.
    """
    check_enough(work)
    base = load_model(work.base, dtype="bfloat16")
    train = capture_activations(
        base,
        load_chats(work.runs / "train.jsonl"),
        sites=work.site,
        positions=work.positions,
        out=work.place("train"),
        batching=BATCHING,
    )
    held = capture_activations(
        load_pair(base, work.tuned),
        load_chats(work.runs / "held_out.jsonl"),
        sites=work.site,
        positions=work.positions,
        out=work.place("held_out"),
        batching=BATCHING,
    )
    (work.runs / "base.json").write_text(json.dumps(identify(base).base_fingerprint))
    logger.info("%d tokens captured to train on, %d held out", len(train), len(held))
    return train, held


def train(work: Work) -> Sae:
    """Train on what was captured, or return what is trained.

    Raises:
        TooLittleTextError: what was captured is less than is to be trained on.
    """
    captured = ActivationShards.open(work.place("train"))
    if len(captured) < work.train_tokens:
        raise TooLittleTextError(
            f"{captured.folder}: {len(captured):,} tokens were captured, and {work.train_tokens:,} "
            "are to be trained on"
        )
    rows = shuffle_activations(
        captured,
        site=work.site,
        seed=0,
        base_fingerprint=json.loads((work.runs / "base.json").read_text()),
    )
    held = ActivationShards.open(work.place("held_out")).batches(work.site, stream="base")
    out = work.place("sae")
    return train_sae(rows, site=work.site, settings=work.settings, out=out, seed=0, held_out=held)


def write_asset(work: Work, assets: Path) -> Path:
    """Put the autoencoder in bfloat16, with its card, among the assets."""
    held = ActivationShards.open(work.place("held_out"))
    # Weights first, then the threshold: rounding the weights changes the codes.
    rounded = train(work).to(dtype=torch.bfloat16).to(dtype=torch.float32)
    rows = torch.cat(list(held.batches(work.site, stream="base"))).float()
    made = calibrate_threshold(rounded, rows, l0=float(work.settings.k)).to(dtype=torch.bfloat16)
    sae = dataclasses.replace(made, name=f"emlens:{NAME}", base_name=work.base)
    used = sae.to(dtype=torch.float32)
    fits = {
        source: measure_fit(used, held.batches(work.site, stream=stream))
        for source, stream in ((work.base, "base"), (work.tuned, "tuned"))
    }
    folder = save_sae(sae, assets / NAME)
    write_text_atomic(folder / "README.md", write_card(work, sae, fits))
    return folder


def write_card(work: Work, sae: Sae, fits: dict[str, CodecFit]) -> str:
    """What the autoencoder is, what it was made of, and how well it fits."""
    record = read_training(work.place("sae"))
    s = work.settings
    curve = record.curves
    chosen = range(0, len(curve.step), max(1, len(curve.step) // 10))
    texts = (work.runs / "train.jsonl").read_bytes().count(b"\n")
    return CARD.read_text(encoding="utf-8").format(
        name=NAME,
        base=work.base,
        fingerprint=sae.base_fingerprint,
        site=work.site,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        k=s.k,
        skipped=work.skipped,
        texts=texts,
        tokens=(record.rows_of_a_pass or 0) + texts * work.skipped,
        rows=record.rows_of_a_pass,
        against="fewer than" if (record.rows_of_a_pass or 0) < AIM else "no fewer than",
        aim=AIM,
        answered=work.answered,
        packages=", ".join(PACKAGES),
        passes=s.rows / (record.rows_of_a_pass or 1),
        steps=s.steps,
        batch=s.batch_rows,
        rate=s.learning_rate,
        warmup=s.warmup_steps,
        decay=s.decay_steps,
        aux=s.aux_coefficient,
        dead_after=s.dead_after_rows,
        seed=record.seed,
        minutes=record.seconds / 60,
        threshold=float(sae.threshold[0]) if sae.threshold is not None else 0.0,
        fits="\n".join(
            f"| `{source}` | {fit.explained_variance:.3f} | {fit.l0:.1f} | {fit.dead_share:.1%} | "
            f"{fit.n_rows} |"
            for source, fit in fits.items()
        ),
        curve="\n".join(
            f"| {int(curve.step[i])} | {curve.explained_variance[i]:.3f} | "
            f"{curve.dead_share[i]:.1%} |"
            for i in chosen
        ),
    )


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, help="one of them; by default all")
    parser.add_argument("--runs", type=Path, default=Path("runs/sae"))
    parser.add_argument("--assets", type=Path, default=SHIPPED)
    parser.add_argument("--text", type=Path, action="append", help="folder of texts, repeatable")
    parser.add_argument(
        "--quick", action="store_true", help="a few thousand tokens, to see that all stages work"
    )
    given = parser.parse_args()
    quiet_host_libraries()
    work, assets = Work(runs=given.runs), given.assets
    if given.quick:
        work = dataclasses.replace(QUICK, runs=given.runs / "quick")
        assets = work.runs / "assets"
    work.runs.mkdir(parents=True, exist_ok=True)
    for stage in [given.stage] if given.stage else STAGES:
        with logged_to(work.runs / f"{stage}.log"), show_progress():
            run_stage(stage, work, folders=given.text, assets=assets)
        print(f"{stage}: done, see {work.runs / stage}.log")


def run_stage(stage: str, work: Work, *, folders: Sequence[Path] | None, assets: Path) -> None:
    """Run one stage; what it finds done it leaves as it is."""
    if stage == "text":
        gather_texts(work, folders or fetch_packages(work.runs / "packages"))
    elif stage == "capture":
        capture(work)
    elif stage == "train":
        train(work)
    else:
        write_asset(work, assets)


if __name__ == "__main__":
    main()
