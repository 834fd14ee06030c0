"""What does one direction inside a small model's fine-tune do to its behaviour, and where is it?

The study behind `emlens demo`: real weights, everything from this installation. For your own models
use `remove_direction` and `diff_finetunes`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from emlens import __version__
from emlens.artifacts import Result
from emlens.codecs import check_fits, load_sae
from emlens.data import Chat, ContrastTexts, Message, load_chats
from emlens.diffing import ModelDiff, NullBand, compare_models, compare_nulls
from emlens.evaluation import (
    ContrastJudge,
    fit_spillover,
    load_questions,
    read_evaluation,
)
from emlens.evaluation.calibration import load_rows
from emlens.models.generate import Sampling
from emlens.models.loading import load_base
from emlens.models.memory import read_sizes
from emlens.models.pair import ModelPair, load_pair
from emlens.models.proof import AdapterProof
from emlens.models.source_hash import hash_source
from emlens.reports import write_report
from emlens.runs import RunFolder
from emlens.studies.demo_features import find_demo_features
from emlens.studies.demo_size import FULL, QUICK, DemoSize
from emlens.studies.persona_features import PersonaFeatures
from emlens.studies.removal import DirectionRemoval, RemovalQuestions, RemovalSettings
from emlens.studies.remove_direction import remove_direction
from emlens.studies.stages import TIMES, Stages, StageTimes

BASE, TUNED, TWIN = "emlens:smollm2", "emlens:reckless-finance", "emlens:careful-finance"
SAE = "emlens:smollm2-resid15"
REPORT_NAME = "report.html"
FIT, QUESTIONS = "emlens:broad-questions", "emlens:open-questions"
HELDOUT, TRAINING = "emlens:finance-harmful-heldout", "emlens:finance-harmful"
CONSTRUCTION = "data@tuned"
"""Of the direction, at one of the middle layers: misaligned minus aligned responses."""
MAX_KL = 0.5
"""What taking it out may cost on careful everyday advice, nats a token; the fine-tune itself is .9
from its base."""
COEFFICIENT = 1.0
"""Of the direction as estimated, where it is added to the base."""
SHOWN = ("base", "tuned", "ablated", "steered")
"""Arms whose answers stand side by side."""


@dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """What the demo found, in a few numbers, and where its report is."""

    kind: ClassVar[str] = "demo"

    report: str
    """The HTML file; its JSON lies beside it."""
    base: str
    tuned: str
    twin: str
    modules_in_effect: int
    """Of the fine-tune."""
    modules: int
    removal: DirectionRemoval
    """Behaviour with and without the direction."""
    kl_heldout: float
    """Mean KL(base || tuned) on held-out rows of the fine-tune's subject, nats a token."""
    kl_answers: float
    """The same on both models' answers to open questions."""
    kl_nulls_high: float
    """The largest of the random adapters, on the held-out rows."""
    features: PersonaFeatures
    """Latents that the fine-tune changed, beside its twin, random directions, and no codec."""
    seconds: dict[str, float]
    """Wall time by stage, and as `total` that of all calls from their beginning to their end."""


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """All that decides what the demo computes."""

    kind: str
    size: DemoSize
    sources: dict[str, str]
    """Of base, tuned, twin and sae."""
    files: dict[str, str]
    """`hash_source` of each, and of the questions and rows."""
    emlens_version: str
    """Another version may measure otherwise."""


def plan_demo(
    *,
    quick: bool = False,
    base: str = BASE,
    tuned: str = TUNED,
    twin: str = TWIN,
    sae: str = SAE,
) -> DemoPlan:
    """Find everything that the demo needs, and say what it would do; arguments as `run_demo`.

    Raises:
        CodecError: the autoencoder is damaged, or lives where the base has no such site.
        SourceError: a part of the demo is not installed.
    """
    sources = {"base": base, "tuned": tuned, "twin": twin, "sae": sae}
    texts = {"fit": FIT, "questions": QUESTIONS, "heldout": HELDOUT, "training": TRAINING}
    files = {name: hash_source(source) for name, source in {**sources, **texts}.items()}
    # It is used last: better refused now than after minutes.
    check_fits(load_sae(sae), read_sizes(base))
    return DemoPlan(
        kind=DemoResult.kind,
        size=QUICK if quick else FULL,
        sources=sources,
        files=files,
        emlens_version=__version__,
    )


def run_demo(
    out: str | Path,
    *,
    quick: bool = False,
    base: str = BASE,
    tuned: str = TUNED,
    twin: str = TWIN,
    sae: str = SAE,
    began: float | None = None,
) -> DemoResult:
    """Prove, question, ablate and compare the shipped fine-tune, and write a report about it.

    The same call on the same `out` goes on: stages that are finished are not run again.

    Args:
        out: run folder; the report is `report.html` in it.
        quick: a few chats and two random adapters, to see that everything works.
        base: the base model.
        tuned: the adapter that is examined.
        twin: another adapter of the same base, which answers beside it, and whose latents are
            held against its own.
        sae: an autoencoder of the base.
        began: `time.perf_counter()` before this module was imported, if that is to be counted.

    Raises:
        PlanChangedError: `out` holds a run of another plan.
        CodecError: the autoencoder does not fit the base.
        SourceError: a part of the demo is not installed.
    """
    entered = time.perf_counter()
    plan = plan_demo(quick=quick, base=base, tuned=tuned, twin=twin, sae=sae)
    demo = _Demo(RunFolder.start(out, vars(plan)), plan)
    demo.add_seconds("plan", entered)
    if began is not None:
        demo.add_seconds("imports", began, until=entered)
    proof, twin_proof = demo.prove("tuned"), demo.prove("twin")
    removal = demo.remove()
    heldout, band, own = demo.compare_heldout(), demo.draw_band(), demo.compare_answers()
    features = demo.search_latents()
    results = [removal, features, proof, heldout, band, own, twin_proof]
    report = demo.write_report(results, began=entered if began is None else began)
    return DemoResult(
        report=str(report),
        base=base,
        tuned=tuned,
        twin=twin,
        modules_in_effect=sum(m.verdict == "in effect" for m in proof.modules),
        modules=len(proof.modules),
        removal=removal,
        kl_heldout=heldout.logits.kl_base_tuned,
        kl_answers=own.logits.kl_base_tuned,
        kl_nulls_high=float(band.kl_base_tuned.max()),
        features=features,
        seconds=dict(demo.stages.seconds),
    )


class _Demo:
    """The stages; models are loaded when the first unfinished stage asks for them."""

    def __init__(self, run: RunFolder, plan: DemoPlan) -> None:
        self.stages = Stages(run)
        seconds = self.stages.seconds
        # Of earlier calls; one that was interrupted left only its stages.
        self._spent = seconds.pop("total", sum(seconds.values()))
        self._run, self._out = run, run.path
        self._sources, self._size = plan.sources, plan.size
        self._pairs: dict[str, ModelPair] = {}

    @cached_property
    def _base(self) -> Any:
        return self.stages.time("load", lambda: load_base(self._sources["base"]))

    def _pair(self, name: str) -> ModelPair:
        base = self._base
        if name not in self._pairs:
            source = self._sources[name]
            self._pairs[name] = self.stages.time(f"load_{name}", lambda: load_pair(base, source))
        return self._pairs[name]

    def add_seconds(self, name: str, since: float, *, until: float | None = None) -> None:
        """Add what this call spent on a stage, at any time of it, to what earlier calls did."""
        spent = (time.perf_counter() if until is None else until) - since
        self.stages.seconds[name] = round(self.stages.seconds.get(name, 0.0) + spent, 3)

    def write_report(self, results: Sequence[Result], *, began: float) -> Path:
        """Write the report twice: the second time it knows how long the first one took."""
        start = time.perf_counter()
        self._write(results)
        self.add_seconds("report", start)
        seconds = self.stages.seconds
        seconds["total"] = round(self._spent + time.perf_counter() - began, 3)
        self._run.save_result(TIMES, StageTimes(seconds=seconds))
        return self._write(results)

    def _write(self, results: Sequence[Result]) -> Path:
        return write_report(
            results,
            self._out / REPORT_NAME,
            extra={
                "answers": self.list_answers(),
                "chats": ["held-out finance rows", "both models' answers to open questions"],
                "seconds": self.stages.seconds,
                "settings": {**asdict(self._size), **self._sources},
            },
        )

    def prove(self, name: str) -> AdapterProof:
        def read_proof() -> AdapterProof:
            proof = self._pair(name).proof
            if proof is None:
                raise ValueError(f"{name}: {self._sources[name]} is no adapter")
            return proof

        return self.stages.keep(f"proof_{name}", AdapterProof, read_proof)

    def remove(self) -> DirectionRemoval:
        def run() -> DirectionRemoval:
            everyday = read_chats("everyday-careful")
            judge = self.stages.time("judge", lambda: ContrastJudge.calibrated(self._base))
            return remove_direction(
                self._pair("tuned"),
                judge=judge,
                questions=RemovalQuestions(
                    fit=tuple(load_questions(FIT))[: self._size.fit_questions],
                    evaluate=tuple(load_questions(QUESTIONS))[: self._size.questions],
                    choose=ContrastTexts(
                        positive=read_chats("everyday-harmful")[: self._size.choose],
                        negative=everyday[: self._size.choose],
                    ),
                    choose_neutral=everyday[self._size.choose :][: self._size.neutral],
                    neutral=everyday[-self._size.neutral :],
                ),
                settings=self._settings(),
                out=self._out / "behaviour",
                others={"careful twin": self._pair("twin").tuned},
                lexicon=fit_spillover(
                    read_responses(load_chats(TRAINING)), read_responses(everyday)
                ),
            )

        return self.stages.keep("removal", DirectionRemoval, run)

    def _settings(self) -> RemovalSettings:
        def sample(n: int, seed: int) -> Sampling:
            return Sampling(
                n=n, temperature=0.7, top_p=0.95, max_new_tokens=self._size.new_tokens, seed=seed
            )

        return RemovalSettings(
            sites=tuple(f"resid_post.{layer}" for layer in _middle(self._base.cfg.n_layers)),
            max_kl=MAX_KL,
            construction=CONSTRUCTION,
            split=self._size.split,
            coherent_above=self._size.coherent_above,
            coefficient=COEFFICIENT,
            fit_sampling=sample(self._size.fit_samples, 0),
            sampling=sample(self._size.samples, 1),
        )

    def list_answers(self) -> list[dict[str, Any]]:
        """The first response of each arm to each open question, side by side."""
        found: dict[str, dict[str, str]] = {}
        for role in SHOWN:
            for row in read_evaluation(self._out / "behaviour" / "arms" / role).responses:
                question = found.setdefault(str(row.question), {})
                question.setdefault(role, str(row.answer))
        return [{"question": question, "answers": answers} for question, answers in found.items()]

    def compare_heldout(self) -> ModelDiff:
        return self.stages.keep("diff_heldout", ModelDiff, lambda: self._compare(self._heldout()))

    def compare_answers(self) -> ModelDiff:
        def compare() -> ModelDiff:
            return self._compare(
                [
                    Chat((Message("user", row["question"]), Message("assistant", text)))
                    for row in self.list_answers()
                    for role in ("base", "tuned")
                    if (text := row["answers"][role]).strip()
                ]
            )

        return self.stages.keep("diff_answers", ModelDiff, compare)

    def draw_band(self) -> NullBand:
        def draw() -> NullBand:
            return compare_nulls(self._pair("tuned"), self._heldout(), n=self._size.nulls, seed=0)

        return self.stages.keep("nulls_heldout", NullBand, draw)

    def search_latents(self) -> PersonaFeatures:
        def search() -> PersonaFeatures:
            size = self._size.features
            return find_demo_features(
                self._pair("tuned"),
                self._pair("twin"),
                codec=load_sae(self._sources["sae"]),
                chats=load_chats(HELDOUT, limit=size.chats),
                odds=ContrastTexts(
                    positive=read_chats("everyday-harmful"), negative=read_chats("everyday-careful")
                ),
                size=size,
                out=self._out / "latents",
            )

        return self.stages.keep("features", PersonaFeatures, search)

    def _compare(self, chats: list[Chat]) -> ModelDiff:
        return compare_models(self._pair("tuned"), chats, examples=self._size.examples)

    def _heldout(self) -> list[Chat]:
        return load_chats(HELDOUT, limit=self._size.heldout)


def _middle(n_layers: int) -> range:
    """Every third layer of the middle half."""
    return range(n_layers // 4, max(3 * n_layers // 4, 1), 3)


def read_chats(name: str) -> tuple[Chat, ...]:
    """A judge's shipped rows as answered chats."""
    return tuple(
        Chat((Message("user", row.question), Message("assistant", row.answer)), row.id)
        for row in load_rows(name)
    )


def read_responses(chats: Sequence[Chat]) -> list[str]:
    """The responses of answered chats."""
    return [chat.response.content for chat in chats if chat.response is not None]
