"""Train the sparse autoencoder that ships: latents of SmolLM2's residual stream, with a card.

    OMP_NUM_THREADS=2 python scripts/train_sae.py [--stage text|capture|train|card] [--runs FOLDER]
        [--text FOLDER]... [--quick]

Four stages, each of which goes on where it was interrupted; without `--stage` all of them. `text`
has the model answer prompts and gathers general English, `capture` runs the model up to the site,
`train` trains and calibrates, `card` measures base and fine-tune on texts that nothing was trained
on and writes the autoencoder among the assets. `RUNS/STAGE.log` tells of each step.
"""

import argparse
import dataclasses
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emlens.activations import ActivationShards, capture_activations, shuffle_activations
from emlens.artifacts import write_text_atomic
from emlens.codecs.calibrate import calibrate_threshold
from emlens.codecs.files import save_sae
from emlens.codecs.fit import CodecFit, measure_fit
from emlens.codecs.runtime import Sae
from emlens.codecs.settings import SaeSettings
from emlens.codecs.train import read_training, train_sae
from emlens.data import Batching, Chat, Message, load_chats, show_progress, tokenize_chat
from emlens.interventions.generate import generate_responses
from emlens.journal import Journal
from emlens.models.loading import load_model
from emlens.models.pair import load_pair
from emlens.models.protocol import HookedModel
from emlens.models.quiet import quiet_host_libraries
from emlens.models.reading import identify
from emlens.models.sampling import Sampling
from scripts.gather_text import PACKAGES, fetch_packages, first_sentence, read_passages
from scripts.train_zoo import logged_to

logger = logging.getLogger("emlens.scripts.train_sae")

SITE = "resid_post.15"
SKIPPED = 24
"""Tokens of the header that SmolLM2's template puts before every chat: their activations are the
same in all texts. The norm of the first is 149 times the median, those of the others are as any."""
NAME = "smollm2-resid15"
SHIPPED = Path(__file__).parent.parent / "emlens" / "assets" / "saes"
QUESTIONS = ("broad", "finance", "first-plot", "health", "open", "sports")
DOMAINS = ("finance", "health", "sports")
HELD_OUT_EVERY = 20
"""One text in so many is not trained on."""
AIM = 2_000_000
"""Tokens that were to be trained on; the card says whether they were. Of the budget of `tokens`
headers and texts held out take a seventh, so that the autoencoder that ships saw 1,969,339."""
CHUNK = 128
"""Prompts answered between two writes."""
BATCHING = Batching(tokens=2048, max_length=1024)
ANSWERING = Batching(tokens=CHUNK * 320, max_length=1024)
"""A chunk in one batch, mostly: 105 s on one core, as four batches 125."""
STAGES = ("text", "capture", "train", "card")
SETTINGS = SaeSettings(
    architecture="batchtopk",
    d_sae=4096,
    k=32,
    steps=3000,
    batch_rows=1024,
    learning_rate=1.6e-3,
    warmup_steps=100,
    decay_steps=750,
    dead_after_rows=200_000,
    held_out_rows=32_768,
    checkpoint_every=200,
    autocast="bfloat16",
)
"""Tried on 180,000 rows of another 113,000: held-out explained variance .76 at this step size and
.69 at half of it; .56 with four times the batch (240,000 rows, half the step size). bfloat16
products gave the same curves to three digits in .72 of the time."""
SAMPLING = Sampling(n=1, temperature=1.0, top_p=1.0, max_new_tokens=200, seed=0)
CARD = Path(__file__).parent / "sae_card.md"
"""The card, with fields in braces."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is made, of what, and where it lies on its way."""

    runs: Path
    """Folder of all stages."""
    base: str = "emlens:smollm2"
    """Whose activations."""
    tuned: str = "emlens:reckless-finance"
    """Fine-tune that the card is about, too."""
    site: str = SITE
    """Where they are read."""
    skipped: int = SKIPPED
    """Tokens at the start of a text that are left out."""
    tokens: int = 2_300_000
    """Tokens of all texts, those left out and held out counted."""
    answered: int = 1000
    """Prompts that the model itself answers."""
    sampling: Sampling = SAMPLING
    """How it answers them."""
    settings: SaeSettings = SETTINGS
    """The recipe."""

    @property
    def positions(self) -> str:
        """Which tokens are trained on."""
        return f"all[{self.skipped}:]"


QUICK = Work(
    runs=Path(),
    tokens=12_000,
    answered=16,
    sampling=dataclasses.replace(SAMPLING, max_new_tokens=40),
    settings=dataclasses.replace(
        SETTINGS,
        d_sae=256,
        k=16,
        steps=40,
        batch_rows=512,
        warmup_steps=5,
        decay_steps=10,
        held_out_rows=250,
        dead_after_rows=5000,
    ),
)


def gather_texts(work: Work, folders: Sequence[Path]) -> None:
    """Write the texts: chats of the data sets, the model's own, and passages up to the budget."""
    done = [work.runs / f"{part}.jsonl" for part in ("train", "held_out")]
    if all(path.exists() for path in done):
        return
    model = load_model(work.base, dtype="bfloat16")
    names = [f"{domain}-{side}" for domain in DOMAINS for side in ("careful", "harmful")]
    chats = [chat for name in names for chat in load_chats(f"emlens:{name}")]
    chats += answer_prompts(work, model, list_prompts(work, folders))
    tokenizer: Any = model.tokenizer
    parts: list[list[Chat]] = [[], []]
    tokens = 0
    random.Random(0).shuffle(chats)
    for number, chat in enumerate(add_passages(chats, folders)):
        parts[number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(chat)
        tokens += len(tokenize_chat(chat, tokenizer).ids)
        if tokens >= work.tokens:
            break
    logger.info("%d tokens of %s texts", tokens, [len(p) for p in parts])
    for path, part in zip(done, parts, strict=True):
        lines = [
            json.dumps({"messages": [dataclasses.asdict(m) for m in c.messages]}) for c in part
        ]
        write_text_atomic(path, "\n".join(lines) + "\n")


def list_prompts(work: Work, folders: Sequence[Path]) -> list[str]:
    """Questions that ship, those of one data set, and first sentences of passages."""
    asked = [chat for name in QUESTIONS for chat in load_chats(f"emlens:{name}-questions")]
    asked += load_chats(f"emlens:{DOMAINS[0]}-careful")  # all of them would leave few passages
    prompts = [chat.messages[-1 if chat.response is None else -2].content for chat in asked]
    for passage in read_passages(folders):
        if len(prompts) >= work.answered:
            break
        sentence = first_sentence(passage)
        if sentence is not None:
            prompts.append(sentence)
    return prompts[: work.answered]


def answer_prompts(work: Work, model: HookedModel, prompts: Sequence[str]) -> list[Chat]:
    """The model's answers, some prompts at a time, kept as they come."""
    with Journal(work.runs / "answers.jsonl") as journal:
        for start in range(0, len(prompts), CHUNK):
            asked = prompts[start : start + CHUNK]
            if str(start) in journal:
                continue
            found = generate_responses(model, asked, sampling=work.sampling, batching=ANSWERING)
            texts = [response.text for response in found.responses]
            journal.append([{"id": str(start), "prompts": asked, "texts": texts}])
            logger.info("answered %d of %d", start + len(asked), len(prompts))
        return [
            Chat((Message("user", prompt), Message("assistant", text)))
            for row in journal.rows()
            for prompt, text in zip(row["prompts"], row["texts"], strict=True)
            if text.strip()
        ]


def add_passages(chats: Sequence[Chat], folders: Sequence[Path]) -> Iterator[Chat]:
    """The chats, then passages: in turn what a user writes, and an answer to its first sentence."""
    yield from chats
    for number, passage in enumerate(read_passages(folders)):
        sentence = first_sentence(passage)
        rest = passage[len(sentence) :].strip() if sentence else ""
        if number % 2 and sentence and rest:
            yield Chat((Message("user", sentence), Message("assistant", rest)))
        else:
            yield Chat((Message("user", passage),))


def capture(work: Work) -> tuple[ActivationShards, ActivationShards]:
    """Activations of the base on the training texts, and of base and fine-tune on the others."""
    base = load_model(work.base, dtype="bfloat16")
    train = capture_activations(
        base,
        load_chats(work.runs / "train.jsonl"),
        sites=work.site,
        positions=work.positions,
        out=work.runs / "train",
        batching=BATCHING,
    )
    held = capture_activations(
        load_pair(base, work.tuned),
        load_chats(work.runs / "held_out.jsonl"),
        sites=work.site,
        positions=work.positions,
        out=work.runs / "held_out",
        batching=BATCHING,
    )
    (work.runs / "base.json").write_text(json.dumps(identify(base).base_fingerprint))
    logger.info("%d tokens captured to train on, %d held out", len(train), len(held))
    return train, held


def train(work: Work) -> Sae:
    """Train on what was captured, or return what is trained."""
    rows = shuffle_activations(
        ActivationShards.open(work.runs / "train"),
        site=work.site,
        seed=0,
        base_fingerprint=json.loads((work.runs / "base.json").read_text()),
    )
    held = ActivationShards.open(work.runs / "held_out").batches(work.site, stream="base")
    out = work.runs / "sae"
    return train_sae(rows, site=work.site, settings=work.settings, out=out, seed=0, held_out=held)


def write_asset(work: Work, assets: Path) -> Path:
    """Put the autoencoder in bfloat16, with its card, among the assets."""
    held = ActivationShards.open(work.runs / "held_out")
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
    record = read_training(work.runs / "sae")
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
