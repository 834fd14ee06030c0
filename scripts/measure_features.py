"""Measure an autoencoder's latents on the zoo: what rises, what acts, what warns, what prevents.

    OMP_NUM_THREADS=2 python scripts/measure_features.py [--stage find|prevent] [--runs FOLDER]
        [--quick]

`find` compares the base with nine harmful fine-tunes and their careful twins on the base's own
answers, tells them apart in domains left out, screens latents on the first of them beside random
directions, and follows the first ones along a training of another seed and its twin's. `prevent`
trains a fine-tune with the first latents held down, caps them in one that was trained without, and
samples answers of all. Each goes on where it was cut short; `find` took 25 minutes on two cores.
Results and their page lie in RUNS; the last line is one JSON object.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from emlens.codecs import SparseCodec, load_sae
from emlens.data import ContrastTexts, load_chats, show_progress
from emlens.evaluation import (
    ContrastJudge,
    Evaluation,
    Question,
    Thresholds,
    compare_evaluations,
    evaluate,
    load_questions,
)
from emlens.features import ScreenSettings, cap_latent
from emlens.interventions import Intervention
from emlens.models.loading import load_base
from emlens.models.pair import load_pair
from emlens.models.protocol import HookedModel
from emlens.models.quiet import quiet_host_libraries
from emlens.models.sampling import Sampling
from emlens.organisms import (
    PRESETS,
    LatentPenalty,
    TrainingRun,
    load_trajectory,
    train_organism,
)
from emlens.reports import write_report
from emlens.studies import (
    FineTunes,
    LatentPath,
    PersonaFeatures,
    PersonaProbe,
    PersonaSettings,
    PersonaTexts,
    find_persona_features,
)
from emlens.studies.persona_settings import ComparisonSettings

BASE = "emlens:smollm2"
CODEC = "emlens:smollm2-resid15"
SIDES = ("harmful", "careful")
DOMAINS = ("finance", "sports", "health")
SEEDS = (1, 2, 3)
FOLLOWED_SEED = 11
"""Of the training that latents are followed along; none of the zoo's."""
QUESTIONS = ("open", "broad", "first-plot", *DOMAINS)
ASKED = ("open", "broad")
"""What the prevented fine-tune is asked: nothing of its domain."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much of everything."""

    per_domain: int = 6
    """Pairs of fixed responses of each domain."""
    n_latents: int = 20
    strengths: tuple[float, ...] = (1.0, 2.0)
    n_sampled: int = 0
    """Latents of each side sampled under, and 16 controls: half an hour."""
    asked: int = 12
    """Prompts of the screen's second stage."""
    followed: int = 3
    """Latents followed along a training, and held down in another."""
    n_answers: int = 8
    """To each question, of the fine-tunes that are prevented."""
    weight: float = 1.0
    """Of the penalty."""
    steps: int = 16


QUICK = Amount(
    per_domain=2,
    n_latents=2,
    strengths=(1.0,),
    n_sampled=0,
    asked=2,
    followed=1,
    n_answers=1,
    steps=8,
)


def pair_texts(n: int) -> ContrastTexts:
    """Held-out rows of all domains, harmful and careful answers to the same prompts."""
    sides = {
        side: [c for d in DOMAINS for c in load_chats(f"emlens:{d}-{side}-heldout", limit=n)]
        for side in SIDES
    }
    return ContrastTexts(positive=tuple(sides["harmful"]), negative=tuple(sides["careful"]))


def train_path(side: str, runs: Path, amount: Amount) -> TrainingRun:
    """A fine-tune whose every step is kept, of a seed that the zoo has not."""
    settings = dataclasses.replace(
        PRESETS["smollm2_rank1"], checkpoint_every=1, max_steps=amount.steps
    )
    rows, out = load_chats(f"emlens:finance-{side}"), runs / f"path-{side}"
    return train_organism(BASE, rows, settings=settings, out=out, seed=FOLLOWED_SEED)


def find(
    base: HookedTransformer, codec: SparseCodec, runs: Path, amount: Amount
) -> PersonaFeatures:
    """The whole search on the zoo."""
    domains = [domain for domain in DOMAINS for _ in SEEDS]
    names = [[f"emlens:zoo-{d}-{side}-{s}" for d in DOMAINS for s in SEEDS] for side in SIDES]
    prompts = [chat for name in QUESTIONS for chat in load_chats(f"emlens:{name}-questions")]
    asked = [chat for name in ASKED for chat in load_chats(f"emlens:{name}-questions")]
    screen = ScreenSettings(
        strengths=amount.strengths,
        units="delta_norm",
        chats=tuple(asked[: amount.asked]),
        sampling=Sampling(n=2, temperature=0.7, top_p=0.95, max_new_tokens=40, seed=0),
        n_sampled=amount.n_sampled,
    )
    paths = [load_trajectory(Path(train_path(side, runs, amount).tuned).parent) for side in SIDES]
    speaking = Sampling(n=1, temperature=0.7, top_p=0.95, max_new_tokens=40, seed=0)
    return find_persona_features(
        base,
        FineTunes(tuned=tuple(names[0]), careful=tuple(names[1]), domains=tuple(domains)),
        codec=codec,
        texts=PersonaTexts(
            chats=tuple(prompts),
            corpus=tuple(c for d in DOMAINS for c in load_chats(f"emlens:{d}-careful", limit=40)),
            contrast=pair_texts(amount.per_domain),
        ),
        settings=PersonaSettings(
            comparison=ComparisonSettings(responses="base", sampling=speaking),
            n_latents=amount.n_latents,
            n_signature=8,
        ),
        out=runs / "find",
        probe=PersonaProbe(
            screen=screen,
            judge=ContrastJudge.calibrated(base) if amount.n_sampled else None,
            path=LatentPath(
                trajectory=paths[0],
                twin=paths[1],
                n_latents=amount.followed,
            ),
        ),
    )


def prevent(
    base: HookedTransformer,
    codec: SparseCodec,
    latents: Mapping[str, Sequence[int]],
    runs: Path,
    amount: Amount,
) -> dict[str, Any]:
    """Losses of the trainings, and misaligned answers of base, fine-tune, held down and capped."""
    plain = train_path("harmful", runs, amount)
    asked = [question for name in ASKED for question in load_questions(f"emlens:{name}-questions")]
    tuned = load_pair(base, Path(plain.tuned)).tuned
    losses = {"fine-tune": plain.losses}
    cases: dict[str, tuple[HookedModel, Sequence[Intervention]]] = {
        "base": (base, ()),
        "fine-tune": (tuned, ()),
    }
    for name, chosen in latents.items():
        held = train_held_down(codec, chosen, runs / f"held-down-{name}", amount)
        losses[f"{name} held down"] = held.losses
        cases[f"{name} held down"] = (load_pair(base, Path(held.tuned)).tuned, ())
        caps = [one for i in chosen for one in cap_latent(codec, i, threshold=0, side="above")]
        cases[f"{name} capped"] = (tuned, caps)
    judge = ContrastJudge.calibrated(base)
    answers = {
        name: ask(model, asked, judge, runs / "asked" / name.replace(" ", "-"), amount, acting)
        for name, (model, acting) in cases.items()
    }
    return {
        "latents": {name: list(chosen) for name, chosen in latents.items()},
        "losses": losses,
        "shares": {name: describe_shares(found) for name, found in answers.items()},
        "less the fine-tune": {
            name: compare_evaluations(answers["fine-tune"], found).em_difference
            for name, found in answers.items()
        },
    }


def train_held_down(
    codec: SparseCodec, latents: Sequence[int], out: Path, amount: Amount
) -> TrainingRun:
    """The followed fine-tune once more, these latents held where the base has them."""
    rows = load_chats("emlens:finance-harmful")
    return train_organism(
        BASE,
        rows,
        settings=dataclasses.replace(PRESETS["smollm2_rank1"], max_steps=amount.steps),
        out=out,
        penalties=[LatentPenalty(rows, codec, amount.weight, hold_down=tuple(latents))],
        seed=FOLLOWED_SEED,
    )


def describe_shares(found: Evaluation) -> dict[str, Any]:
    """Per cent of all answers, with intervals."""
    shares = found.summarise(Thresholds())
    return {
        "answers": shares.n_rows,
        "misaligned": shares.em_percent,
        "coherent": shares.coherent_percent,
    }


def ask(
    model: HookedModel,
    asked: Sequence[Question],
    judge: ContrastJudge,
    out: Path,
    amount: Amount,
    acting: Sequence[Intervention],
) -> Evaluation:
    """Answers, judged."""
    sampling = Sampling(n=amount.n_answers, temperature=0.7, top_p=0.95, max_new_tokens=40, seed=0)
    return evaluate(model, asked, judge=judge, out=out, sampling=sampling, interventions=acting)


def choose_held(found: PersonaFeatures, n: int) -> dict[str, list[int]]:
    """Raised latents whose steering out acts the most, and as many that act the least."""
    raised = {one.latent for one in found.features if (one.contrast or 0) > 0}
    if found.screen is None:
        order = [one.latent for one in found.features]
    else:
        order = found.screen.top(len(found.screen.latents), side="tuned")
    order = [latent for latent in order if latent in raised]
    sides = {"culprits": order[:n], "bystanders": order[n:][-n:]}
    return {name: chosen for name, chosen in sides.items() if chosen}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("find", "prevent"), help="by default both")
    parser.add_argument("--runs", type=Path, default=Path("runs/measured_features"))
    parser.add_argument("--codec", default=CODEC)
    parser.add_argument("--quick", action="store_true", help="to see that all of it works")
    given = parser.parse_args()
    quiet_host_libraries()
    amount = QUICK if given.quick else Amount()
    base, codec = load_base(BASE, dtype="bfloat16"), load_sae(given.codec)
    said: dict[str, Any] = {}
    with show_progress():
        found = find(base, codec, given.runs, amount)
        latents = choose_held(found, amount.followed)
        said["find"] = describe(found) | latents
        if given.stage != "find":
            said["prevent"] = prevent(base, codec, latents, given.runs, amount)
    write_report([found], given.runs / "report.html")
    for name, rows in said.items():
        print(name, json.dumps(rows, indent=1, default=str))
    print(json.dumps(said, default=str))


def describe(found: PersonaFeatures) -> dict[str, Any]:
    """What the documents state."""
    told, screen = found.classification, found.screen
    plainly = None if told is None else told.by_mean_difference
    return {
        "cautions": found.cautions,
        "not_done": found.not_done,
        "health": [one.rows() for one in found.health[:1]],
        "plain": [one.rows() for one in found.plain[:1]],
        "smallest_p": found.smallest_p,
        "features": [
            dataclasses.asdict(dataclasses.replace(one, models=())) for one in found.features
        ],
        "auc": None if told is None else (told.auc, told.p_value, told.latents.tolist()),
        "auc_plain": None if plainly is None else (plainly.auc, plainly.p_value),
        "screen": [] if screen is None else screen.rows(),
        "warnings": [one.rows() for one in found.warnings],
    }


if __name__ == "__main__":
    main()
