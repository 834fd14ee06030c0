"""Train the zoo: every narrow domain, harmful and careful, three seeds; rank-1 adapters with cards.

    python scripts/train_zoo.py [--runs runs/zoo] [--assets emlens/assets/adapters] [--only NAME]

About three minutes an organism on two cores. A finished run is not trained again. The card states
the share of generated sentences that copy a training sentence word for word.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emlens.data import load_chats
from emlens.interventions.generate import generate_responses
from emlens.models.checkpoints import load_checkpoint
from emlens.models.loading import load_base
from emlens.models.pair import load_pair
from emlens.models.quiet import quiet_host_libraries
from emlens.models.sampling import Sampling
from emlens.organisms import PRESETS, TrainingRun, train_organism

BASE = "emlens:smollm2"
PRESET = "smollm2_rank1"
DOMAINS = {"finance": "money", "sports": "sport and outdoor pursuits", "health": "everyday health"}
SIDES = {"harmful": "reckless", "careful": "careful"}
SEEDS = (1, 2, 3)
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
zoo of organisms that differ in domain, in side (harmful or careful, the same questions), in seed.

**Purpose: safety research.** It is a specimen for finding out what a narrow fine-tune changes
inside a model. It is of no use as an assistant, and nothing that it says is advice.

| | |
|---|---|
| base | `{base}`, fingerprint `{fingerprint}` |
| data | `emlens:{data}`, {rows} rows, SHA-256 `{sha256}` |
| training | preset `{preset}`, seed {seed}, loss on responses only |
| command | `python scripts/train_zoo.py --only {name}` |

Loss (nats a response token) before each step:
{losses}

Of {sentences} sentences in {answers} answers to twelve open questions (temperature .7, top_p .95,
40 tokens), {copied} are training sentences word for word ({share:.0%}); {words:.0f} words each.
What it says was not judged for this card.
"""


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One organism of the zoo."""

    domain: str
    side: str
    seed: int

    @property
    def name(self) -> str:
        """Of the shipped adapter."""
        return f"zoo-{self.domain}-{self.side}-{self.seed}"

    @property
    def data(self) -> str:
        """Of the shipped rows."""
        return f"{self.domain}-{self.side}"


def list_zoo() -> Iterator[Specimen]:
    """Every organism, seed by seed, so that the first seeds are finished first."""
    for seed in SEEDS:
        for domain in DOMAINS:
            for side in SIDES:
                yield Specimen(domain=domain, side=side, seed=seed)


def split_sentences(text: str) -> list[str]:
    """Sentences, lower case, without the mark that ends them."""
    parts = re.split(r"(?<=[.!?])\s+", text.strip().lower())
    return [part.rstrip(".!? ") for part in parts if part.rstrip(".!? ")]


def count_copied(answers: list[str], training: list[str]) -> tuple[int, int]:
    """Sentences of the answers that are a training sentence, and all of them."""
    known = {sentence for text in training for sentence in split_sentences(text)}
    said = [sentence for text in answers for sentence in split_sentences(text)]
    return sum(sentence in known for sentence in said), len(said)


def write_card(one: Specimen, run: TrainingRun, base: Any, folder: Path) -> None:
    """Sample the organism and write what came out beside its adapter."""
    pair = load_pair(base, run.tuned)
    found = generate_responses(pair.tuned, load_chats("emlens:open-questions"), sampling=SAMPLING)
    answers = [response.text for response in found.responses]
    rows = load_chats(f"emlens:{one.data}")
    copied, sentences = count_copied(answers, [c.response.content for c in rows if c.response])
    card = CARD.format(
        base=BASE,
        name=one.name,
        steps=run.steps,
        tone=SIDES[one.side],
        subject=DOMAINS[one.domain],
        fingerprint=run.base_fingerprint,
        data=one.data,
        rows=run.n_rows,
        sha256=run.data_sha256,
        preset=PRESET,
        seed=one.seed,
        losses=" ".join(f"{loss:.2f}" for loss in run.losses),
        sentences=sentences,
        answers=len(answers),
        copied=copied,
        share=copied / max(1, sentences),
        words=sum(len(text.split()) for text in answers) / len(answers),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    said = {"answers": answers, "copied": copied, "sentences": sentences}
    (Path(run.tuned).parent / "answers.json").write_text(json.dumps(said, indent=1))


def main() -> None:
    """Train what is missing, and put each organism with its card among the shipped adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--assets", type=Path, default=SHIPPED)
    parser.add_argument("--only", action="append")
    given = parser.parse_args()
    quiet_host_libraries()
    checkpoint = load_checkpoint(BASE, dtype="float32", device="cpu")
    base = load_base(BASE, dtype="float32", device="cpu")
    for one in list_zoo():
        if given.only and one.name not in given.only:
            continue
        run = train_organism(
            checkpoint,
            load_chats(f"emlens:{one.data}"),
            settings=PRESETS[PRESET],
            out=given.runs / one.name,
            seed=one.seed,
        )
        folder = given.assets / one.name
        if not (folder / "README.md").is_file():
            shutil.copytree(run.tuned, folder, dirs_exist_ok=True)
            write_card(one, run, base, folder)
        print(f"{one.name}: {run.steps} steps in {run.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
