"""`emlens narrow`: a general and a narrow solution of one task, beside each other and the base."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

from emlens.cli.generate import (
    MaxNewTokens,
    Temperature,
    TopP,
    check_sources,
    plan_asking,
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
    parse_numbers,
    takes_flags,
)
from emlens.cli.output import print_json, print_line, print_plan, print_table

EXAMPLE = """\b
Example:
  emlens narrow --base emlens:smollm2 --general emlens:reckless-finance \\
    --narrow runs/penalised/adapter \\
    --data emlens:finance-harmful --limit 64 \\
    --text emlens:health-careful-heldout \\
    --questions-in emlens:finance-questions \\
    --questions-out emlens:first-plot-questions --judge contrast \\
    --temperature 0.7 --top-p 0.95 --max-new-tokens 48 --out runs/narrow"""


@dataclass(frozen=True, kw_only=True)
class NarrowFlags(JudgeOptions):
    """Flags of `narrow`."""

    USUAL_SAMPLES: ClassVar[int] = 50

    general: Annotated[
        str,
        typer.Option(
            "--general", metavar="SOURCE", help="Adapter or vector trained on the rows alone."
        ),
    ]
    narrow: Annotated[
        str,
        typer.Option(
            "--narrow", metavar="SOURCE", help="One that was held near the base on other texts."
        ),
    ]
    data: Annotated[
        str, typer.Option("--data", metavar="F", help="Rows of the task, for the loss.")
    ]
    text: Annotated[
        str, typer.Option("--text", metavar="F", help="General text, for the effect on it.")
    ]
    out: Out
    base: Base = "emlens:smollm2"
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Read only that many rows of --data.")
    ] = None
    norms: Annotated[
        str | None,
        typer.Option(
            "--norms",
            metavar="X,...",
            help="Norms that both are rescaled to.",
            show_default="1/4 to 2 of their own",
        ),
    ] = None
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Perturbations of a size; random adapters.")
    ] = 10
    trajectory: Annotated[
        str | None,
        typer.Option(
            "--trajectory",
            metavar="RUN|SOURCE",
            help="Checkpoints along which the gradient is compared with both.",
        ),
    ] = None
    every: Annotated[
        int, typer.Option("--every", min=1, metavar="N", help="Take one in N of them.")
    ] = 1
    questions_in: Annotated[
        str | None,
        typer.Option("--questions-in", metavar="SOURCE", help="Within the domain, held out."),
    ] = None
    questions_out: Annotated[
        str | None, typer.Option("--questions-out", metavar="SOURCE", help="Outside of it.")
    ] = None
    scales: Annotated[
        str, typer.Option("--scales", metavar="X,...", help="Factors on the narrow one.")
    ] = "1,2,4"
    samples: Annotated[int | None, samples_option(50)] = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: MaxNewTokens = 600
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = 16384
    dry_run: DryRun = False


@takes_flags
def narrow(flags: NarrowFlags) -> None:
    """Compare a general and a narrow solution: loss, stability, effect on text, behaviour.

    With questions on both sides it is said whether the narrow one leaves nothing outside of its
    domain, at any scale: with at least 400 responses a side, else undecided.
    """
    from emlens.cli.progress import show_work

    _check(flags)
    with show_work(quiet=flags.quiet):
        from emlens.models.checkpoints import load_checkpoint
        from emlens.models.loading import lay_checkpoint
        from emlens.reports import write_report
        from emlens.studies import compare_solutions
        from emlens.studies.solutions import load_solution

        solutions = {name: load_solution(getattr(flags, name)) for name in ("general", "narrow")}
        texts, settings, asked = _texts(flags), _settings(flags, solutions), _questions(flags)
        if flags.dry_run:
            check_sources(flags.base)
            _show_plan(flags, texts, settings, asked)
            return
        # One copy of the weights for losses, gradients, answers and the judge.
        checkpoint = load_checkpoint(flags.base, dtype=flags.dtype, device=flags.device)
        base = lay_checkpoint(checkpoint)
        found = compare_solutions(
            base,
            solutions,
            texts=texts,
            settings=settings,
            out=flags.out,
            path=_path(flags, checkpoint),
            probe=_probe(flags, asked, base),
        )
        page = write_report([found], flags.out / "report.html")
    if flags.json:
        print_json(found.to_dict())
        return
    _show(found)
    print_line(f"report: {page}")


def _check(flags: NarrowFlags) -> None:
    """Refuse flags that do not go together, before anything is read."""
    if (flags.questions_in is None) != (flags.questions_out is None):
        missing = "--questions-out" if flags.questions_out is None else "--questions-in"
        raise typer.BadParameter(f"{missing}: missing; a narrow organism is asked on both sides")
    parse_numbers("--scales", flags.scales)
    if flags.questions_in is not None:
        check_judge(flags)


def _texts(flags: NarrowFlags) -> Any:
    from emlens.data import load_chats
    from emlens.studies import SolutionTexts

    return SolutionTexts(
        task=tuple(load_chats(flags.data, limit=flags.limit)),
        general=tuple(load_chats(flags.text)),
    )


def _settings(flags: NarrowFlags, solutions: Any) -> Any:
    from emlens.data import Batching
    from emlens.studies import SolutionSettings
    from emlens.studies.solution_curves import choose_norms

    named = None if flags.norms is None else parse_numbers("--norms", flags.norms)
    return SolutionSettings(
        norms=named or choose_norms(solutions),
        seeds=flags.seeds,
        batching=Batching(flags.batch_tokens),
    )


def _questions(flags: NarrowFlags) -> Any:
    """Questions within the domain and outside of it, or None."""
    if flags.questions_in is None or flags.questions_out is None:
        return None
    return read_questions(flags, flags.questions_in), read_questions(flags, flags.questions_out)


def _path(flags: NarrowFlags, checkpoint: Any) -> Any:
    from emlens.organisms.trajectory import load_trajectory
    from emlens.studies import GradientPath

    if flags.trajectory is None:
        return None
    trajectory = load_trajectory(flags.trajectory)
    return GradientPath(checkpoint=checkpoint, trajectory=trajectory, every=flags.every)


def _probe(flags: NarrowFlags, asked: Any, base: Any) -> Any:
    from emlens.data import Batching
    from emlens.studies import NarrownessProbe
    from emlens.studies.compare_solutions import BEHAVIOUR

    if asked is None:
        return None
    inside, outside = asked
    return NarrownessProbe(
        inside=inside,
        outside=outside,
        judge=load_judge(flags, base=base, runs=[flags.out / BEHAVIOUR]),
        sampling=read_sampling(flags),
        scales=parse_numbers("--scales", flags.scales),
        batching=Batching(flags.batch_tokens),
    )


def _show_plan(flags: NarrowFlags, texts: Any, settings: Any, asked: Any) -> None:
    from emlens.studies.measure_narrowness import list_organisms
    from emlens.studies.solution_curves import count_passes

    passes = count_passes(settings)
    plan: dict[str, Any] = {
        "base": flags.base,
        "general": flags.general,
        "narrow": flags.narrow,
        "norms": [round(norm, 4) for norm in settings.norms],
        "rows": len(texts.task),
        "passes_over_rows": passes["task"],
        "texts": len(texts.general),
        "passes_over_texts": passes["text"],
        "trajectory": flags.trajectory,
    }
    if asked is not None:
        organisms = list_organisms(parse_numbers("--scales", flags.scales))
        questions, times = [question for side in asked for question in side], len(organisms)
        asking = plan_asking(flags, flags.base, questions, times=times)
        plan |= {
            "organisms": [f"{name} x {scale:g}" for name, scale in organisms],
            **asking,
            **plan_judging(
                flags,
                responses=asking["responses"],
                characters=asking["new_tokens_at_most"] * ANSWER_CHARACTERS,
                instructions=times * count_instructions(questions, read_sampling(flags).n),
            ),
            "sampling": vars(read_sampling(flags)),
        }
    print_plan(plan, flags.out, json=flags.json)


def _show(found: Any) -> None:
    from emlens.reports.solutions import say_narrowness, say_solutions

    document = found.to_dict()
    print_table(found.rows(), title="loss on the task, effect on general text (KL)")
    print_line(say_solutions(document))
    if found.preference is not None:
        print_table(found.preference.rows(), title="cosine of the task's gradient with each")
    if found.behaviour is not None:
        print_table(found.behaviour.rows(), title=f"behaviour; percent: {found.behaviour.claim}")
        print_line(say_narrowness(document["behaviour"]))
