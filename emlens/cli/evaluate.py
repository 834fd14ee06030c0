"""`emlens evaluate` and `emlens judge`: responses sampled and judged, or judged again."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from emlens.cli.generate import (
    MaxNewTokens,
    ModelFlags,
    Temperature,
    TopP,
    check_sources,
    load_for,
    plan_asking,
    read_factor,
    read_questions,
    read_sampling,
    samples_option,
)
from emlens.cli.judges import (
    ANSWER_CHARACTERS,
    JudgeOptions,
    check_judge,
    count_instructions,
    load_judge,
    measure_instructions,
    plan_judging,
)
from emlens.cli.options import (
    Base,
    BatchTokens,
    Device,
    DryRun,
    Dtype,
    Out,
    Seed,
    takes_flags,
)
from emlens.cli.output import header, print_json, print_line, print_plan
from emlens.cli.scores import describe_judge, flatten_summary, print_summary

EVALUATE_EXAMPLE = """\b
Example:
  emlens evaluate --base emlens:smollm2 --tuned emlens:reckless-finance \\
    --questions emlens:broad-questions --judge contrast --samples 4 \\
    --temperature 0.7 --top-p 0.95 --max-new-tokens 48 --out runs/organism"""
JUDGE_EXAMPLE = (
    "\b\nExample:\n  emlens judge runs/organism --judge contrast --out runs/judged-again"
)


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(ModelFlags, JudgeOptions):
    """Flags of `evaluate`."""

    USUAL_SAMPLES: ClassVar[int] = 50

    questions: Annotated[
        str, typer.Option("--questions", metavar="SOURCE", help="JSONL or YAML, or emlens:NAME.")
    ]
    out: Out
    tuned: Annotated[
        list[str] | None,
        typer.Option(
            "--tuned",
            metavar="SOURCE",
            help="A fine-tune; several are evaluated one by one, each into RUN/NAME.",
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Ask only that many of the questions.")
    ] = None
    allow_fit_prompts: Annotated[
        bool,
        typer.Option(
            "--allow-fit-prompts", help="Ask also prompts that a direction was fitted on."
        ),
    ] = False
    samples: Annotated[int | None, samples_option(50)] = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: MaxNewTokens = 600
    seed: Seed = 0
    batch_tokens: BatchTokens = 16384

    def interventions(self) -> tuple[Any, ...]:
        """As for every command that runs a model; what they were fitted on only where it counts."""
        made = super().interventions()
        if self.allow_fit_prompts:
            made = tuple(dataclasses.replace(one, fit_prompts=()) for one in made)
        return made

    def targets(self) -> list[tuple[str | None, Path]]:
        """Each fine-tune (None is the base itself) and the run folder it goes into."""
        tuned = self.tuned or [None]
        if len(tuned) == 1:
            return [(tuned[0], self.out)]
        names = [
            str(source).rstrip("/").rpartition("/")[2].removeprefix("emlens:") for source in tuned
        ]
        if len(set(names)) < len(names):
            raise typer.BadParameter(f"--tuned: two are called alike ({', '.join(names)})")
        return [(source, self.out / name) for source, name in zip(tuned, names, strict=True)]


@takes_flags
def evaluate(flags: EvaluateFlags) -> None:
    """Sample responses to questions and judge them; the same command goes on where it stopped."""
    from emlens.cli.progress import show_work

    check_judge(flags)
    read_factor(flags.scale, flags.tuned)
    with show_work(quiet=flags.quiet):
        from emlens.models.checkpoints import require_device
        from emlens.models.loading import load_base

        questions = read_questions(flags, flags.questions)[: flags.limit]
        interventions, targets = flags.interventions(), flags.targets()
        if flags.dry_run:
            check_sources(flags.base, *(tuned for tuned, _ in targets), flags.judge_source())
            require_device(flags.device)
            _show_plan(flags, questions)
            return
        # One copy of the weights for all that answers and for the judge.
        base = load_base(flags.base, dtype=flags.dtype, device=flags.device)
        judge = load_judge(flags, base=base, runs=[path for _, path in targets])
        found: list[tuple[Path, Any]] = []
        for tuned, path in targets:
            model = load_for(flags, tuned, base=base)
            done = _evaluate(flags, model, questions, judge, path, interventions)
            write_page(done, path)
            found.append((path, done))
    show_evaluations(found, json=flags.json)


def _evaluate(
    flags: EvaluateFlags, model: Any, questions: Any, judge: Any, out: Path, interventions: Any
) -> Any:
    from emlens.data import Batching
    from emlens.evaluation import evaluate

    return evaluate(
        model,
        questions,
        judge=judge,
        out=out,
        sampling=read_sampling(flags),
        interventions=interventions,
        batching=Batching(flags.batch_tokens),
    )


def write_page(evaluation: Any, run: Path) -> Path:
    """Write `report.html` and `report.json` into the run folder of an evaluation."""
    from emlens.reports import write_report

    return write_report([evaluation], run / "report.html")


def show_evaluations(found: Any, *, json: bool) -> None:
    """Print evaluations: one as it is, several as a list.

    Args:
        found: (run folder, evaluation) pairs.
        json: as one JSON object.
    """
    if json:
        documents = [
            flatten_summary(evaluation.summary, {"run": str(path), **describe_judge(evaluation)})
            for path, evaluation in found
        ]
        print_json(
            documents[0] if len(documents) == 1 else {**header("evaluations"), "all": documents}
        )
        return
    for path, evaluation in found:
        print_summary(evaluation.summary, describe_judge(evaluation), title=str(path))
        print_line(f"judge: {evaluation.judged_by}; {evaluation.summary.n_rows} responses: {path}")
        print_line(f"report: {path / 'report.html'}")


def _show_plan(flags: EvaluateFlags, questions: Any) -> None:
    wordings = sum(len(question.paraphrases) for question in questions)
    times = len(flags.targets())
    asking = plan_asking(flags, flags.base, questions, times=times)
    plan = {
        "base": flags.base,
        "tuned": flags.tuned,
        "add": flags.add,
        "ablate": flags.ablate,
        "at": flags.at,
        "positions": flags.positions,
        **plan_judging(
            flags,
            responses=asking["responses"],
            characters=asking["new_tokens_at_most"] * ANSWER_CHARACTERS,
            instructions=times * count_instructions(questions, read_sampling(flags).n),
        ),
        "questions": len(questions),
        "wordings": wordings,
        **asking,
        "sampling": vars(read_sampling(flags)),
    }
    print_plan(plan, flags.out, json=flags.json)


@dataclass(frozen=True, kw_only=True)
class JudgeFlags(JudgeOptions):
    """Flags of `judge`."""

    file: Annotated[
        Path,
        typer.Argument(metavar="RUN|CSV|JSONL", help="Responses, made here or anywhere else."),
    ]
    out: Out
    base: Base = "emlens:smollm2"
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = 16384
    dry_run: DryRun = False


@takes_flags
def judge(flags: JudgeFlags) -> None:
    """Judge responses that are already there; nothing is generated."""
    from emlens.cli.progress import show_work

    check_judge(flags)
    with show_work(quiet=flags.quiet):
        from emlens.evaluation import judge_responses
        from emlens.evaluation.rejudge import read_responses

        if flags.dry_run:
            rows, _ = read_responses(flags.file)
            characters = sum(len(row["question"]) + len(row["answer"]) for row in rows)
            told = sum(measure_instructions(row.get("judge_prompts", {})) for row in rows)
            plan = plan_judging(
                flags, responses=len(rows), characters=characters, instructions=told
            )
            plan = {"file": str(flags.file), "base": flags.base, "responses": len(rows), **plan}
            print_plan(plan, flags.out, json=flags.json)
            return
        read_responses(flags.file)  # before a judge is loaded for what is not there
        made = load_judge(flags, runs=[flags.out, flags.file])
        found = judge_responses(flags.file, made, out=flags.out)
        write_page(found, flags.out)
    show_evaluations([(flags.out, found)], json=flags.json)
