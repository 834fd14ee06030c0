"""Count what one direction does in the shipped organism, at the size that a rate is claimed for.

    python scripts/measure_removal.py --out runs/removal [--samples 34] [--tokens 24] [--table]

Fits the direction in four constructions on the organism's own judged responses, screens it and
every control without sampling, then samples and judges each arm: base, organism, careful twin, the
direction taken out in several ways, the median and the strongest control of each kind (those of
like KL only if there are any), and the base steered by dose. An arm is a folder; the same call goes
on. Once `screen_controls` is there, several processes may share the arms that are left. Four hours
and more of one core. `--table` prints what is finished, as Markdown; the last line is one JSON
object.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emlens.artifacts import ArtifactError
from emlens.data import ContrastTexts, load_chats, prompt_hashes, text_hash
from emlens.directions import sample_directions
from emlens.directions.fit import Construction
from emlens.evaluation import (
    ContrastJudge,
    compare_evaluations,
    evaluate,
    fit_spillover,
    load_questions,
    read_evaluation,
    summarise_scores,
)
from emlens.interventions import Intervention, ablate_direction, add_direction
from emlens.journal import JournalLockedError
from emlens.models.generate import Sampling
from emlens.models.identity import identify_model
from emlens.models.loading import load_base
from emlens.models.pair import load_pair
from emlens.models.quiet import quiet_host_libraries
from emlens.runs import RunFolder
from emlens.studies.effects import measure_kl
from emlens.studies.remove_direction import fit_on_judged
from emlens.studies.run_demo import (
    BASE,
    FIT,
    QUESTIONS,
    TRAINING,
    TUNED,
    TWIN,
    read_chats,
    read_responses,
)
from emlens.studies.screen_ablations import (
    AblationScreen,
    choose_ablation,
    find_median,
    find_strongest,
    screen_ablations,
)
from emlens.studies.stages import Stages
from emlens.vectors import Direction, Directions

CONSTRUCTIONS: tuple[Construction, ...] = ("data@tuned", "data@base", "model@positive", "both")
CANDIDATES = tuple(f"resid_post.{layer}" for layer in range(8, 23, 2))
MAX_KL = 0.5
DOSES = (0.5, 1.0, 2.0, 4.0)
POOLED = 4
"""Covariance-matched directions of each candidate site, for those of like KL."""


class Study:
    """One run folder: fit, screen, then arms."""

    def __init__(self, out: Path, samples: int, tokens: int) -> None:
        self.out = out
        self.base: Any = load_base(BASE)
        self.pair = load_pair(self.base, TUNED)
        self.judge = ContrastJudge.calibrated(self.base)
        everyday = read_chats("everyday-careful")
        self.texts = ContrastTexts(
            positive=read_chats("everyday-harmful")[:8], negative=everyday[:8]
        )
        self.choose_neutral, self.neutral = everyday[8:12], everyday[12:16]
        self.fit_questions = tuple(load_questions(FIT))
        self.questions = tuple(load_questions(QUESTIONS))
        self.fit_sampling = _sampling(8, tokens, seed=0)
        self.sampling = _sampling(samples, tokens, seed=1)
        self.stages = Stages(RunFolder.start(out, self.plan()))

    def plan(self) -> dict[str, Any]:
        """All that decides the figures: models, texts, constants and sampling."""
        asked = {"fit": self.fit_questions, "evaluate": self.questions}
        return {
            "kind": "removal_measurement",
            "base": identify_model(self.base),
            "tuned": identify_model(self.pair.tuned),
            "twin": TWIN,
            "judge": self.judge.id,
            "questions": {
                name: {question.id: question.prompt_hash() for question in questions}
                for name, questions in asked.items()
            },
            "texts": {
                "positive": list(map(text_hash, self.texts.positive)),
                "negative": list(map(text_hash, self.texts.negative)),
                "choose_neutral": list(map(text_hash, self.choose_neutral)),
                "neutral": list(map(text_hash, self.neutral)),
            },
            "sampling": {"fit": self.fit_sampling, "evaluate": self.sampling},
            "constructions": CONSTRUCTIONS,
            "candidates": CANDIDATES,
            "max_kl": MAX_KL,
            "doses": DOSES,
            "pooled": POOLED,
        }

    def fit(self, construction: Construction, sites: Sequence[str]) -> Directions:
        """Fit on the organism's own responses, lowest third of the scores against the highest."""
        judged = evaluate(
            self.pair.tuned,
            self.fit_questions,
            judge=self.judge,
            out=self.out / "fit",
            sampling=self.fit_sampling,
        )
        found = fit_on_judged(
            self.pair,
            judged,
            split="thirds",
            coherent_above=50,
            construction=construction,
            sites=sites,
        )
        asked = [chat for question in self.questions for chat in question.chats()]
        choose = (*self.texts.positive, *self.texts.negative, *self.choose_neutral)
        return found.with_prompts("choose", prompt_hashes(choose)).with_prompts(
            "evaluate", prompt_hashes([*asked, *self.neutral])
        )

    def directions(self, construction: Construction) -> Directions:
        """One construction at the candidate sites."""
        return self.stages.keep(
            f"directions_{construction.replace('@', '_')}",
            Directions,
            lambda: self.fit(construction, CANDIDATES),
        )

    def own_of_each_layer(self) -> Directions:
        """The first construction at every layer."""
        sites = [f"resid_post.{layer}" for layer in range(self.base.cfg.n_layers)]
        return self.stages.keep(
            "directions_every_layer", Directions, lambda: self.fit("data@tuned", sites)
        )

    def screen_sites(self) -> AblationScreen:
        """Each construction at each candidate site."""
        return self.screen("sites", {name: tuple(self.directions(name)) for name in CONSTRUCTIONS})

    def screen(self, name: str, groups: Mapping[str, Sequence[Direction]]) -> AblationScreen:
        """Take each direction out of every write, once for a name."""
        return self.stages.keep(
            f"screen_{name}",
            AblationScreen,
            lambda: screen_ablations(
                self.pair, groups, at="writes", texts=self.texts, neutral=self.choose_neutral
            ),
        )

    def choose(self, construction: Construction) -> Direction:
        """The direction at the site that `choose_ablation` takes."""
        best = choose_ablation(self.screen_sites().group(construction), max_kl=MAX_KL)
        return self.directions(construction)[best.site]

    def controls(self) -> dict[str, tuple[Direction, ...]]:
        """Every control by kind; `pool` is what those of like KL are taken from."""
        own, fitted = self.choose("data@tuned"), self.directions("data@tuned")
        drawn = fitted.controls("covariance")
        return {
            "isotropic": tuple(d[own.site] for d in sample_directions(own, n=16, seed=0)),
            "covariance": tuple(control[own.site] for control in drawn),
            "shuffled": tuple(c[own.site] for c in fitted.controls("shuffled")),
            "pool": tuple(c[site] for site in fitted.sites for c in drawn[:POOLED]),
        }

    def chosen_controls(self) -> Iterator[tuple[str, Direction]]:
        """Name and direction of the median and the strongest control of each kind."""
        controls = self.controls()
        screen = self.screen("controls", controls)
        own = next(
            one
            for one in self.screen_sites().group("data@tuned")
            if one.site == str(self.choose("data@tuned").site)
        )
        for kind in ("isotropic", "covariance", "shuffled"):
            group = screen.group(kind)
            yield f"{kind}, median", controls[kind][find_median(group).number]
            yield f"{kind}, strongest", controls[kind][find_strongest(group).number]
        like = screen.with_kl_near(own.kl, group="pool")
        if like:
            yield "like KL, median", controls["pool"][find_median(like).number]
            yield "like KL, strongest", controls["pool"][find_strongest(like).number]

    def arms(self) -> Iterator[tuple[str, Any, tuple[Intervention, ...]]]:
        """Name, model and interventions, the ones that matter most first."""
        tuned = self.pair.tuned
        own = self.choose("data@tuned")
        yield "base", self.base, ()
        yield "organism", tuned, ()
        yield "data@tuned out of writes", tuned, ablate_direction(own, at="writes")
        for name, control in self.chosen_controls():
            yield f"{name}, out of writes", tuned, ablate_direction(control, at="writes")
        yield "careful twin", load_pair(self.base, TWIN).tuned, ()
        for dose in DOSES:
            steer = add_direction(own, coefficient=dose, units="delta_norm")
            yield f"base plus {dose:g} x data@tuned", self.base, steer
        everywhere = ablate_direction(own, at="resid_post")
        yield "data@tuned out of every resid_post", tuned, everywhere
        layers = ablate_direction(self.own_of_each_layer(), at="resid_post")
        yield "each layer's own out of its resid_post", tuned, layers
        for name in CONSTRUCTIONS[1:]:
            other = ablate_direction(self.choose(name), at="writes")
            yield f"{name} out of writes", tuned, other
        # Controls of the two kinds above that do not act at the writes: the first drawn of each.
        drawn = self.own_of_each_layer().controls("covariance")[0]
        layers = ablate_direction(drawn, at="resid_post")
        yield "covariance, each layer's own out of its resid_post", tuned, layers
        control = self.directions("data@tuned").controls("covariance")[0][own.site]
        size = DOSES[-1] * float(own.vector.double().norm())
        steer = add_direction(control, coefficient=size, units="raw")
        yield f"base plus covariance of the norm of {DOSES[-1]:g} x", self.base, steer

    def choices(self) -> dict[str, dict[str, Any]]:
        """What was chosen of each construction, and whether it keeps within the bearable KL."""
        found = {}
        for name in CONSTRUCTIONS:
            best = choose_ablation(self.screen_sites().group(name), max_kl=MAX_KL)
            found[name] = {"site": best.site, "kl": best.kl, "within": best.kl <= MAX_KL}
        return found

    def run(self) -> None:
        """Evaluate every arm that no other process is at."""
        for name, model, interventions in self.arms():
            try:
                evaluate(
                    model,
                    self.questions,
                    judge=self.judge,
                    out=self.arm_folder(name),
                    sampling=self.sampling,
                    interventions=interventions,
                )
            except JournalLockedError:
                continue
            print(f"done: {name}", flush=True)

    def arm_folder(self, name: str) -> Path:
        """Where an arm is kept."""
        return self.out / "arms" / "".join(c if c.isalnum() else "-" for c in name)

    def table(self) -> list[dict[str, Any]]:
        """One row a finished arm."""
        lexicon = fit_spillover(
            read_responses(load_chats(TRAINING)), read_responses(read_chats("everyday-careful"))
        )
        if not (self.arm_folder("organism") / "results").is_dir():
            raise SystemExit("--table: the organism's own arm is not finished yet")
        organism = read_evaluation(self.arm_folder("organism"))
        top3 = {
            f"{name} out of writes": self.directions(name).share_in_large_dimensions(
                self.choose(name).site
            )
            for name in CONSTRUCTIONS
        }
        rows = []
        for name, model, interventions in self.arms():
            try:
                found = read_evaluation(self.arm_folder(name))
            except ArtifactError:
                continue
            scored = [r for r in found.responses if r.aligned is not None]
            coherent = [r.coherent for r in found.responses if r.coherent is not None]
            answers = [str(r.answer) for r in found.responses]
            summary = summarise_scores(found.responses)
            em, against = summary.em_percent, compare_evaluations(organism, found).em_difference
            lexical = lexicon.rate(found.rows())
            kl = measure_kl(self.base, model, interventions, self.neutral) if interventions else 0
            rows.append(
                {
                    "arm": name,
                    "n": summary.n_rows,
                    "em": (em.value, em.low, em.high),
                    "minus organism": (against.value, against.low, against.high),
                    "coherent": summary.coherent_percent.value,
                    "mean coherence": statistics.fmean(coherent) if coherent else None,
                    "mean aligned": statistics.fmean(float(r.aligned or 0) for r in scored),
                    "topic words": lexical.value,
                    "words an answer": statistics.fmean(len(a.split()) for a in answers),
                    "distinct answers": len(set(answers)) / len(answers),
                    "kl": kl,
                    "in 3 largest dimensions": top3.get(name),
                }
            )
        return rows


def _sampling(n: int, tokens: int, *, seed: int) -> Sampling:
    return Sampling(n=n, temperature=0.7, top_p=0.95, max_new_tokens=tokens, seed=seed)


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    spelt: dict[str, Callable[[Any], str]] = {
        "em": lambda v: f"{v[0]:.1f} [{v[1]:.1f}, {v[2]:.1f}]",
        "minus organism": lambda v: f"{v[0]:+.1f} [{v[1]:.1f}, {v[2]:.1f}]",
    }
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = [
            spelt.get(c, lambda v: f"{v:.2f}" if isinstance(v, float) else str(v))(row[c])
            for c in columns
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Run what is left, or print what is finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=34)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    quiet_host_libraries()
    study = Study(given.out, given.samples, given.tokens)
    if not given.table:
        study.run()
    rows = study.table()
    _print_table(rows)
    chosen = study.choices()
    print(json.dumps({"arms": rows, "chosen": chosen, "screens": study.screen_sites().rows()}))


if __name__ == "__main__":
    main()
