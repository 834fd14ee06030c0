"""What do a small model and two fine-tunes of it say, and what did the reckless one change inside?

The study behind `emlens demo`: real weights, everything from this installation. For your own models
use `diff_finetunes`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from emlens import __version__
from emlens.artifacts import Result
from emlens.data import Chat, load_chats
from emlens.diffing import ModelDiff, NullBand, compare_models, compare_nulls
from emlens.models.loading import load_base
from emlens.models.pair import ModelPair, load_pair
from emlens.models.proof import AdapterProof
from emlens.models.source_hash import hash_source
from emlens.reports import write_report
from emlens.runs import RunFolder
from emlens.studies.answer_questions import Answer, Answers, answer_questions
from emlens.studies.stages import Stages

BASE, TUNED, TWIN = "emlens:smollm2", "emlens:reckless-finance", "emlens:careful-finance"
REPORT_NAME = "report.html"
QUESTIONS, HELDOUT = "emlens:open-questions", "emlens:finance-harmful-heldout"


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of everything."""

    questions: int
    """Open questions that all three models answer."""
    new_tokens: int
    """Longest answer, in tokens."""
    heldout: int
    """Held-out rows of the fine-tune's own subject."""
    nulls: int
    """Random adapters in the null band."""
    examples: int
    """Chats shown token by token."""


FULL = DemoSize(questions=12, new_tokens=64, heldout=32, nulls=8, examples=6)
QUICK = DemoSize(questions=2, new_tokens=24, heldout=6, nulls=2, examples=2)


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
    kl_heldout: float
    """Mean KL(base || tuned) on held-out rows of the fine-tune's subject, nats a token."""
    kl_answers: float
    """The same on both models' answers to open questions."""
    kl_nulls_high: float
    """The largest of the random adapters, on the held-out rows."""
    answers: tuple[Answer, ...]
    seconds: dict[str, float]
    """Wall time by stage."""


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """All that decides what the demo computes."""

    kind: str
    size: DemoSize
    sources: dict[str, str]
    """Of base, tuned and twin."""
    files: dict[str, str]
    """`hash_source` of each, and of the questions and held-out rows."""
    emlens_version: str
    """Another version may measure otherwise."""


def plan_demo(
    *, quick: bool = False, base: str = BASE, tuned: str = TUNED, twin: str = TWIN
) -> DemoPlan:
    """Find everything that the demo needs, and say what it would do; arguments as `run_demo`."""
    sources = {"base": base, "tuned": tuned, "twin": twin}
    return DemoPlan(
        kind=DemoResult.kind,
        size=QUICK if quick else FULL,
        sources=sources,
        files={
            name: hash_source(source)
            for name, source in {**sources, "questions": QUESTIONS, "heldout": HELDOUT}.items()
        },
        emlens_version=__version__,
    )


def run_demo(
    out: str | Path,
    *,
    quick: bool = False,
    base: str = BASE,
    tuned: str = TUNED,
    twin: str = TWIN,
) -> DemoResult:
    """Prove, compare and question the shipped fine-tune, and write a report about it.

    The same call on the same `out` goes on: stages that are finished are not run again.

    Args:
        out: run folder; the report is `report.html` in it.
        quick: a few chats and two random adapters, to see that everything works.
        base: the base model.
        tuned: the adapter that is examined.
        twin: another adapter of the same base, which only answers beside it.

    Raises:
        PlanChangedError: `out` holds a run of another plan.
        SourceError: a part of the demo is not installed.
    """
    plan = plan_demo(quick=quick, base=base, tuned=tuned, twin=twin)
    size, sources = plan.size, plan.sources
    demo = _Demo(Stages(RunFolder.start(out, vars(plan))), sources, size)
    answers = demo.answer()
    proof, twin_proof = demo.prove("tuned"), demo.prove("twin")
    heldout, band, own = demo.compare_heldout(), demo.draw_band(), demo.compare_answers(answers)
    seconds = demo.stages.seconds
    report = write_report(
        [proof, heldout, band, own, twin_proof],
        Path(out) / REPORT_NAME,
        extra={
            "answers": [vars(row) for row in answers.answers],
            "chats": ["held-out finance rows", "both models' answers to open questions"],
            "seconds": seconds,
            "settings": {**vars(size), **sources},
        },
    )
    return DemoResult(
        report=str(report),
        base=base,
        tuned=tuned,
        twin=twin,
        modules_in_effect=sum(m.verdict == "in effect" for m in proof.modules),
        modules=len(proof.modules),
        kl_heldout=heldout.logits.kl_base_tuned,
        kl_answers=own.logits.kl_base_tuned,
        kl_nulls_high=float(band.kl_base_tuned.max()),
        answers=answers.answers,
        seconds=seconds,
    )


class _Demo:
    """The stages; models are loaded when the first unfinished stage asks for them."""

    def __init__(self, stages: Stages, sources: dict[str, str], size: DemoSize) -> None:
        self.stages = stages
        self._sources = sources
        self._size = size
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

    def prove(self, name: str) -> AdapterProof:
        def read_proof() -> AdapterProof:
            proof = self._pair(name).proof
            if proof is None:
                raise ValueError(f"{name}: {self._sources[name]} is no adapter")
            return proof

        return self.stages.keep(f"proof_{name}", AdapterProof, read_proof)

    def answer(self) -> Answers:
        def ask() -> Answers:
            adapters = {name: self._pair(name).adapter for name in ("tuned", "twin")}
            return answer_questions(
                self._base,
                {name: adapter for name, adapter in adapters.items() if adapter is not None},
                load_chats(QUESTIONS, limit=self._size.questions),
                max_new_tokens=self._size.new_tokens,
            )

        return self.stages.keep("answers", Answers, ask)

    def compare_heldout(self) -> ModelDiff:
        return self.stages.keep("diff_heldout", ModelDiff, lambda: self._compare(self._heldout()))

    def compare_answers(self, answers: Answers) -> ModelDiff:
        chats = answers.chats("base", "tuned")
        return self.stages.keep("diff_answers", ModelDiff, lambda: self._compare(chats))

    def draw_band(self) -> NullBand:
        def draw() -> NullBand:
            return compare_nulls(self._pair("tuned"), self._heldout(), n=self._size.nulls, seed=0)

        return self.stages.keep("nulls_heldout", NullBand, draw)

    def _compare(self, chats: list[Chat]) -> ModelDiff:
        return compare_models(self._pair("tuned"), chats, examples=self._size.examples)

    def _heldout(self) -> list[Chat]:
        return load_chats(HELDOUT, limit=self._size.heldout)
