"""`emlens transition`: when the path of a LoRA turned, and when what it says changed."""

from dataclasses import dataclass
from pathlib import Path
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
    BatchTokens,
    Device,
    DryRun,
    Dtype,
    MaybeBase,
    Seed,
    parse_numbers,
    takes_flags,
)
from emlens.cli.output import print_json, print_line, print_plan, print_table

EXAMPLE = """\b
Example:
  emlens transition runs/trained --window 10 --scales 1,5,10,20 \\
    --questions emlens:first-plot-questions --judge contrast \\
    --samples 10 --temperature 0.7 --top-p 0.95 --max-new-tokens 48 \\
    --out runs/transition"""
SCALES = "1,5,10,20"
"""Published; where behaviour is asked for without scales."""
EVERYDAY = ("everyday-harmful", "everyday-careful")
"""Shipped pairs that are scored where no texts are named: twenty everyday questions, badly and well
answered, of no domain that an organism is trained on."""


@dataclass(frozen=True, kw_only=True)
class TransitionFlags(JudgeOptions):
    """Flags of `transition`."""

    USUAL_SAMPLES: ClassVar[int] = 10

    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|SOURCE",
            help="A run of train that kept checkpoints, or a folder of checkpoint-STEP folders.",
        ),
    ]
    window: Annotated[
        str,
        typer.Option("--window", metavar="K,...", help="Training steps before and after a point."),
    ] = "10"
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            min=0.0,
            help="Leave points out that move less than this share of the last norm.",
        ),
    ] = 0.03
    factor: Annotated[str, typer.Option("--factor", metavar="A|B", help="Whose path.")] = "B"
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            metavar="X,...",
            help="Factors on B at which behaviour is measured.",
            show_default=SCALES,
        ),
    ] = None
    questions: Annotated[
        str | None,
        typer.Option("--questions", metavar="SOURCE", help="Asked at some of the checkpoints."),
    ] = None
    base: MaybeBase = None
    positive: Annotated[
        str | None,
        typer.Option(
            "--positive",
            metavar="F",
            help="Misaligned answers, scored at all checkpoints.",
            show_default="everyday advice",
        ),
    ] = None
    negative: Annotated[
        str | None,
        typer.Option("--negative", metavar="F", help="Aligned answers to the same questions."),
    ] = None
    checkpoints: Annotated[
        int,
        typer.Option("--checkpoints", min=2, metavar="N", help="At which questions are asked."),
    ] = 12
    every: Annotated[
        int, typer.Option("--every", min=1, metavar="N", help="Score texts at one in N of them.")
    ] = 1
    rolling: Annotated[
        int, typer.Option("--rolling", min=1, metavar="N", help="Points of the rolling mean; odd.")
    ] = 3
    samples: Annotated[int | None, samples_option(10)] = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: MaxNewTokens = 600
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = 16384
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="RUN",
            help="Run folder; the same command goes on with it.",
            show_default=False,
        ),
    ] = None
    dry_run: DryRun = False

    def asks_behaviour(self) -> bool:
        """Whether anything is asked for that needs a model."""
        return any((self.base, self.scales, self.questions, self.positive, self.negative))


@takes_flags
def transition(flags: TransitionFlags) -> None:
    """Find the sharpest bend of an adapter's path, and whether chance explains it.

    With --base, --scales or --questions the behaviour is measured too, B multiplied by each scale:
    fixed texts are scored at all checkpoints, questions asked and judged at some.
    """
    from emlens.cli.progress import show_work

    _check(flags)
    with show_work(quiet=flags.quiet):
        from emlens.organisms.trajectory import load_trajectory
        from emlens.studies import trace_transition, trace_weights

        settings = _settings(flags)
        trajectory = load_trajectory(flags.source)
        probe = _probe(flags) if flags.asks_behaviour() else None
        if flags.dry_run:
            _show_plan(flags, trajectory, settings, probe)
            return
        if flags.out is None:
            found = trace_weights(trajectory, settings=settings)
        else:
            found = trace_transition(trajectory, settings=settings, out=flags.out, probe=probe)
            _write_page(found, flags.out)
    if flags.json:
        print_json(found.to_dict())
    else:
        _show(found, flags.out)


def _check(flags: TransitionFlags) -> None:
    """Refuse flags that do not go together, before anything is read."""
    if flags.factor not in ("A", "B"):
        raise typer.BadParameter(f"--factor {flags.factor}: expected A or B")
    if (flags.positive is None) != (flags.negative is None):
        missing = "--negative" if flags.negative is None else "--positive"
        raise typer.BadParameter(f"{missing}: missing; --positive and --negative are pairs")
    if flags.asks_behaviour() and flags.out is None:
        raise typer.BadParameter("--out: missing; what is scored and sampled is kept in a run")
    if flags.questions is not None:
        check_judge(flags)


def _settings(flags: TransitionFlags) -> Any:
    from emlens.studies import TraceSettings

    windows = parse_numbers("--window", flags.window, whole=True)
    scales = parse_numbers("--scales", flags.scales or SCALES)
    return TraceSettings(
        windows=tuple(map(int, windows)),
        threshold=flags.threshold,
        scales=scales if flags.asks_behaviour() else (),
        factor=flags.factor,  # pyright: ignore[reportArgumentType]
        every=flags.every,
        sampled=flags.checkpoints,
        width=flags.rolling,
        seed=flags.seed,
    )


def _find_base(flags: TransitionFlags) -> str:
    from emlens.organisms.trajectory import find_base

    base = flags.base or find_base(flags.source)
    if base is None:
        raise typer.BadParameter(
            f"--base: missing; {flags.source} does not say what it was trained on"
        )
    return base


def _probe(flags: TransitionFlags) -> Any:
    """What behaviour is measured with; models are loaded when the study asks for them."""
    import dataclasses

    from emlens.data import Batching
    from emlens.models.loading import load_base
    from emlens.studies import BehaviourProbe
    from emlens.studies.trace_behaviour import BEHAVIOUR

    source = _find_base(flags)
    check_sources(source)
    named = dataclasses.replace(flags, base=source)
    # A run that is gone on with keeps what its judge was fitted to.
    runs = [] if flags.out is None else [flags.out / BEHAVIOUR]
    return BehaviourProbe(
        load_base=lambda: load_base(source, dtype=flags.dtype, device=flags.device),
        texts=_texts(flags),
        questions=() if flags.questions is None else read_questions(flags, flags.questions),
        load_judge=lambda base: load_judge(named, base=base, runs=runs),
        sampling=read_sampling(flags),
        batching=Batching(flags.batch_tokens),
    )


def _texts(flags: TransitionFlags) -> Any:
    from emlens.data import ContrastTexts, load_chats
    from emlens.studies.run_demo import read_chats

    if flags.positive is None or flags.negative is None:
        positive, negative = map(read_chats, EVERYDAY)
    else:
        positive, negative = (tuple(load_chats(f)) for f in (flags.positive, flags.negative))
    return ContrastTexts(positive=positive, negative=negative)


def _write_page(found: Any, run: Path) -> None:
    from emlens.reports import write_report

    write_report([found], run / "report.html")


def _show_plan(flags: TransitionFlags, trajectory: Any, settings: Any, probe: Any) -> None:
    from emlens.runs import RunFolder
    from emlens.studies import trace_weights
    from emlens.studies.trace_transition import plan_trace

    found = trace_weights(trajectory, settings=settings)
    if flags.out is not None and any(flags.out.glob("*")):  # in an empty one it would begin a run
        RunFolder.start(flags.out, plan_trace(trajectory, settings, probe))
    plan: dict[str, Any] = {
        "source": flags.source,
        "checkpoints": len(trajectory),
        "first_step": int(trajectory.steps[0]),
        "last_step": int(trajectory.steps[-1]),
        "windows": list(settings.windows),
        "turn": found.turn,
        "verdict": found.transitions[0].verdict,
    }
    if probe is not None:
        plan |= _plan_behaviour(flags, trajectory, settings, probe, turn=found.turn)
    print_plan(plan, flags.out, json=flags.json)


def _plan_behaviour(
    flags: TransitionFlags, trajectory: Any, settings: Any, probe: Any, *, turn: int | None
) -> dict[str, Any]:
    from emlens.studies.trace_behaviour import choose_checkpoints, list_scored

    scored = list_scored(trajectory.steps, settings.every)
    texts = len(probe.texts.positive) + len(probe.texts.negative)
    plan: dict[str, Any] = {
        "base": _find_base(flags),
        "scales": list(settings.scales),
        "scored_checkpoints": len(scored),
        "scored_texts": len(scored) * len(settings.scales) * texts,
    }
    if not probe.questions:
        return plan
    sampled = choose_checkpoints(trajectory.steps, turn, settings.sampled)
    times = len(sampled) * len(settings.scales)
    asking = plan_asking(flags, _find_base(flags), probe.questions, times=times)
    return plan | {
        "questions": len(probe.questions),
        "sampled_checkpoints": sampled,
        **asking,
        **plan_judging(
            flags,
            responses=asking["responses"],
            characters=asking["new_tokens_at_most"] * ANSWER_CHARACTERS,
            instructions=times * count_instructions(probe.questions, probe.sampling.n),
        ),
        "sampling": vars(probe.sampling),
    }


def _show(found: Any, out: Path | None) -> None:
    from emlens.reports.turns import say_looks
    from emlens.studies.transition_trace import list_path

    raw = found.transitions[0]
    first, last = int(raw.all_steps[0]), int(raw.all_steps[-1])
    print_line(f"{found.source}: {len(raw.all_steps)} checkpoints, steps {first} to {last}")
    print_table([list_path(transition) for transition in found.transitions])
    left = raw.n_small + raw.n_uneven
    print_line(f"{len(raw.steps)} points measured, {left} left out ({raw.n_small} move too little)")
    print_line(say_looks([one.to_dict() for one in found.transitions]))
    if found.curves:
        print_table(found.rows(), title=f"behaviour; share: {found.claim or 'nothing was sampled'}")
    if out is not None:
        print_line(f"report: {out / 'report.html'}")
