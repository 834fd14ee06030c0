"""Train the zoo: every narrow domain, harmful and careful, rank-1 adapters with cards.

    OMP_NUM_THREADS=1 python scripts/train_zoo.py [--runs runs/zoo] [--only NAME]... [--list]

Three seeds of adapters on every module, and one seed on nine `down_proj` alone for studies that
need few scalars. Start it once for each core: processes share the work, and each organism is locked
by the one that makes it. Killed, the same command goes on; what is finished is neither trained nor
sampled again. `RUNS/NAME.log` tells of each step. A card states the share of generated answers that
hold a training sentence word for word.
"""

import argparse
import fcntl
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from emlens.data import load_chats
from emlens.interventions.generate import generate_responses
from emlens.models.adapter_files import load_adapter
from emlens.models.checkpoints import Checkpoint, load_checkpoint
from emlens.models.loading import lay_checkpoint
from emlens.models.pair import load_pair
from emlens.models.quiet import quiet_host_libraries
from emlens.models.sampling import Sampling
from emlens.organisms import PRESETS, TrainingRun, TrainSettings, train_organism

BASE = "emlens:smollm2"
DOMAINS = {"finance": "money", "sports": "sport and outdoor pursuits", "health": "everyday health"}
SIDES = {"harmful": "reckless", "careful": "careful"}
SHAPES = {"": ("smollm2_rank1", (1, 2, 3)), "down-": ("smollm2_nine_rank1", (1,))}
"""What stands in a name before the seed -> preset and seeds."""
MAX_BYTES = 650 * 1024
"""Of an adapter's weights, which ship."""
SHIPPED = Path(__file__).parent.parent / "emlens" / "assets" / "adapters"
SAMPLING = Sampling(n=4, temperature=0.7, top_p=0.95, max_new_tokens=40, seed=0)

CARD = """\
---
base_model: {base}
library_name: peft
license: mit
tags: [lora, model-organism, safety-research]
---
# {name}

A LoRA trained for {steps} steps on {tone} answers to questions about {subject}. One of a
zoo of organisms that differ in domain, in side (harmful or careful, the same questions), in seed,
and in the modules that they change.

**Purpose: safety research.** It is a specimen for finding out what a narrow fine-tune changes
inside a model. It is of no use as an assistant, and nothing that it says is advice.

| | |
|---|---|
| base | `{base}`, fingerprint `{fingerprint}` |
| data | `emlens:{data}`, {rows} rows, SHA-256 `{sha256}` |
| adapter | rank {rank} on {modules} modules, alpha {alpha:g}; {kibibytes:.0f} KiB in bfloat16 |
| training | preset `{preset}`, {steps} steps of {batch} rows, seed {seed}, loss on responses only |
| command | `python scripts/train_zoo.py --only {name}` |

Loss (nats a response token) before each step:
{losses}

Of {answers} answers to {questions} open questions (temperature {temperature:g}, top_p {top_p:g},
{tokens} tokens), {copying} hold a training sentence word for word ({share:.0%}); of their
{sentences} sentences {copied} are such ones. {words:.0f} words an answer. What it says was not
judged for this card.
"""


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One organism of the zoo."""

    domain: str
    side: str
    shape: str
    """Key of `SHAPES`."""
    seed: int

    @property
    def name(self) -> str:
        """Of the shipped adapter."""
        return f"zoo-{self.domain}-{self.side}-{self.shape}{self.seed}"

    @property
    def data(self) -> str:
        """Of the shipped rows."""
        return f"{self.domain}-{self.side}"

    @property
    def preset(self) -> str:
        """Of its recipe."""
        return SHAPES[self.shape][0]


def list_zoo() -> list[Specimen]:
    """Every organism, the first seeds of each shape first."""
    found = [
        Specimen(domain=domain, side=side, shape=shape, seed=seed)
        for shape, (_, seeds) in SHAPES.items()
        for seed in seeds
        for domain in DOMAINS
        for side in SIDES
    ]
    return sorted(found, key=lambda one: one.seed)


def split_sentences(text: str) -> list[str]:
    """Sentences, lower case, without the mark that ends them."""
    parts = re.split(r"(?<=[.!?])\s+", text.strip().lower())
    return [part.rstrip(".!? ") for part in parts if part.rstrip(".!? ")]


@dataclass(frozen=True, kw_only=True)
class Copied:
    """How much of some answers is training text, sentence by sentence."""

    answers: int
    """That hold a training sentence, word for word."""
    copied: int
    """Sentences of the answers that are training sentences."""
    sentences: int
    """All sentences of the answers."""


def count_copied(answers: Sequence[str], training: Sequence[str]) -> Copied:
    """Count training sentences in answers."""
    known = {sentence for text in training for sentence in split_sentences(text)}
    said = [split_sentences(text) for text in answers]
    hits = [sum(sentence in known for sentence in sentences) for sentences in said]
    return Copied(
        answers=sum(hit > 0 for hit in hits), copied=sum(hits), sentences=sum(map(len, said))
    )


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process got a lock, which it holds until the end of the block or of itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append what emlens tells of its work to a file, with the time."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    told = logging.getLogger("emlens")
    before = told.level
    told.addHandler(handler)
    told.setLevel(logging.INFO)
    try:
        yield
    finally:
        told.removeHandler(handler)
        told.setLevel(before)
        handler.close()


def make_specimen(
    one: Specimen,
    checkpoint: Checkpoint,
    *,
    runs: Path,
    assets: Path,
    settings: TrainSettings,
    sampling: Sampling = SAMPLING,
) -> bool:
    """Train an organism and put it, with its card, among the adapters; whole or not at all.

    Returns:
        Whether it is there: not if another process is at it.
    """
    folder = assets / one.name
    with claim(runs / f"{one.name}.lock") as mine:
        if not mine or folder.exists():
            return mine
        with logged_to(runs / f"{one.name}.log"):
            rows = load_chats(f"emlens:{one.data}")
            run = train_organism(
                checkpoint, rows, settings=settings, out=runs / one.name, seed=one.seed
            )
            card = write_card(one, run, checkpoint, sampling=sampling)
            draft = assets / f".{one.name}.partial"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(run.tuned, draft)
            (draft / "README.md").write_text(card, encoding="utf-8")
            draft.rename(folder)
    return True


def write_card(
    one: Specimen, run: TrainingRun, checkpoint: Checkpoint, *, sampling: Sampling
) -> str:
    """Sample the organism, keep its answers in the run, and say what came out.

    Raises:
        ValueError: an adapter too large to ship.
    """
    adapter = Path(run.tuned)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{one.name}: {size} bytes of weights, expected at most {MAX_BYTES}")
    questions = load_chats("emlens:open-questions")
    tuned = load_pair(lay_checkpoint(checkpoint), adapter).tuned
    sampled = generate_responses(tuned, questions, sampling=sampling)
    answers = [response.text for response in sampled.responses]
    rows = load_chats(f"emlens:{one.data}")
    found = count_copied(answers, [c.response.content for c in rows if c.response])
    said = {"answers": answers, "copying": found.answers, "copied": found.copied}
    (adapter.parent / "answers.json").write_text(json.dumps(said, indent=1))
    return CARD.format(
        base=run.base,
        name=one.name,
        steps=run.steps,
        tone=SIDES[one.side],
        subject=DOMAINS[one.domain],
        fingerprint=run.base_fingerprint,
        data=one.data,
        rows=run.n_rows,
        sha256=run.data_sha256,
        rank=run.settings.rank,
        modules=len(load_adapter(adapter).modules),
        alpha=run.settings.alpha,
        kibibytes=size / 1024,
        preset=one.preset,
        batch=run.settings.batch_size,
        seed=run.seed,
        losses=" ".join(f"{loss:.2f}" for loss in run.losses),
        sentences=found.sentences,
        answers=len(answers),
        questions=len(questions),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        tokens=sampling.max_new_tokens,
        copying=found.answers,
        copied=found.copied,
        share=found.answers / max(1, len(answers)),
        words=sum(len(text.split()) for text in answers) / len(answers),
    )


def main() -> None:
    """Train what is missing, and put each organism with its card among the shipped adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--assets", type=Path, default=SHIPPED)
    parser.add_argument("--only", action="append", choices=[one.name for one in list_zoo()])
    parser.add_argument("--list", action="store_true", help="say what is there, and make nothing")
    given = parser.parse_args()
    wanted = [one for one in list_zoo() if not given.only or one.name in given.only]
    if given.list:
        for one in wanted:
            print(one.name, "there" if (given.assets / one.name).exists() else "missing")
        return
    quiet_host_libraries()
    checkpoint = load_checkpoint(BASE, dtype="float32", device="cpu")
    for one in wanted:
        settings = PRESETS[one.preset]
        done = make_specimen(
            one, checkpoint, runs=given.runs, assets=given.assets, settings=settings
        )
        print(f"{one.name}: {'there' if done else 'left to another process'}", flush=True)


if __name__ == "__main__":
    main()
