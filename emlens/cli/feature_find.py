"""`emlens features find`: the whole search, from how well the codec fits to a report."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from emlens.cli.codecs import PromptCodecFlags, load_base_of, load_codec, plan_codec, scale_tuned
from emlens.cli.feature_texts import (
    Careful,
    Domains,
    Negative,
    Positive,
    Questions,
    Responses,
    Sampled,
    Strengths,
    Units,
    plan_screen,
    print_fit,
    print_judged,
    read_comparison,
    read_contrast,
    read_screen,
)
from emlens.cli.generate import MaxNewTokens, Samples, Temperature, TopP, check_sources
from emlens.cli.judges import (
    ANSWER_CHARACTERS,
    JudgeOptions,
    check_judge,
    load_judge,
    measure_instructions,
    plan_judging,
)
from emlens.cli.options import Out, Tuned, takes_flags
from emlens.cli.output import print_json, print_line, print_plan, print_table

FIND_EXAMPLE = """\b
Example:
  emlens features find --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance --careful emlens:careful-finance \\
    --prompts emlens:finance-harmful-heldout --strengths 1,2 \\
    --out runs/features"""

JUDGED = tuple(
    f"{name}_{end}"
    for name in ("induces", "repairs")
    for end in ("sampled", "sampled_p", "incoherent")
)
"""Columns of the second stage in the rows of a search."""


@dataclass(frozen=True, kw_only=True)
class FindFlags(JudgeOptions, PromptCodecFlags):
    """Flags of `features find`."""

    tuned: Tuned
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="F", help="Chats that elicit the behaviour.")
    ]
    out: Out
    careful: Careful = None
    domains: Domains = None
    responses: Responses = "given"
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            metavar="F",
            help="Various texts that windows are cut from.",
            show_default="--prompts",
        ),
    ] = None
    n_latents: Annotated[
        int, typer.Option("--n-latents", min=1, help="Latents looked at, of all orderings.")
    ] = 20
    n_cards: Annotated[int, typer.Option("--n-cards", min=0, help="How many get a card.")] = 12
    n_signature: Annotated[
        int | None,
        typer.Option(
            "--n-signature",
            min=1,
            help="Latents that models are told apart by.",
            show_default="1",
        ),
    ] = None
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Order by attribution, too; takes gradients.")
    ] = False
    positive: Positive = None
    negative: Negative = None
    strengths: Strengths = None
    units: Units = None
    sampled: Sampled = 0
    questions: Questions = None
    trajectory: Annotated[
        str | None,
        typer.Option(
            "--trajectory",
            metavar="RUN|SOURCE",
            help="Checkpoints along which the first latents and the odds are followed.",
        ),
    ] = None
    twin_trajectory: Annotated[
        str | None,
        typer.Option(
            "--twin-trajectory", metavar="RUN|SOURCE", help="The same of the careful twin."
        ),
    ] = None
    every: Annotated[
        int | None,
        typer.Option(
            "--every", min=1, metavar="N", help="Take one checkpoint in N.", show_default="1"
        ),
    ] = None
    samples: Samples = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: MaxNewTokens = 100


@takes_flags
def find(flags: FindFlags) -> None:
    """Find latents that fine-tunes changed: which, what they mean, what they cause.

    Says first how well the autoencoder fits; puts beside every latent what needs none. With
    --careful fine-tunes are the unit; with --strengths latents are steered beside random
    directions; with --trajectory they are followed along a training.
    """
    from emlens.cli.progress import show_work

    if flags.sampled:
        check_judge(flags)
    if flags.n_signature is not None and not flags.careful:
        raise typer.BadParameter(
            "--careful: missing; --n-signature counts latents that tell models from careful twins"
        )
    if flags.trajectory is None:
        for flag, given in (("--twin-trajectory", flags.twin_trajectory), ("--every", flags.every)):
            if given is not None:
                raise typer.BadParameter(f"--trajectory: missing; {flag} goes with it")
    with show_work(quiet=flags.quiet):
        from emlens.reports import write_report
        from emlens.studies import find_persona_features

        texts, settings, screen = _texts(flags), _settings(flags), read_screen(flags)
        path = _path(flags)
        if flags.dry_run:
            _show_plan(flags, texts, settings, screen, path)
            return
        base = load_base_of(flags)
        found = find_persona_features(
            base,
            _fine_tunes(flags),
            codec=load_codec(flags),
            texts=texts,
            settings=settings,
            out=flags.out,
            probe=_probe(flags, base, screen, path),
        )
        page = write_report([found], flags.out / "report.html")
    if flags.json:
        print_json(found.to_dict())
        return
    _show(found)
    print_line(f"report: {page}")


def _texts(flags: FindFlags) -> Any:
    from emlens.data import load_chats
    from emlens.studies import PersonaTexts

    needed = flags.strengths or flags.attribute or flags.trajectory
    for flag, given in (("--positive", flags.positive), ("--negative", flags.negative)):
        if given is not None and not needed:
            raise typer.BadParameter(
                f"{flag}: nothing reads it; it goes with --strengths, --attribute or --trajectory"
            )
    return PersonaTexts(
        chats=tuple(load_chats(flags.prompts, limit=flags.limit)),
        corpus=() if flags.corpus is None else tuple(load_chats(flags.corpus)),
        contrast=read_contrast(flags) if needed else None,
    )


def _settings(flags: FindFlags) -> Any:
    from emlens.studies import PersonaSettings

    return PersonaSettings(
        comparison=read_comparison(flags),
        attribute=flags.attribute,
        n_latents=flags.n_latents,
        n_cards=flags.n_cards,
        n_signature=flags.n_signature or 1,
    )


def _path(flags: FindFlags) -> Any:
    from emlens.organisms.trajectory import load_trajectory
    from emlens.studies import LatentPath

    if flags.trajectory is None:
        return None
    twin = flags.twin_trajectory
    return LatentPath(
        trajectory=load_trajectory(flags.trajectory),
        twin=None if twin is None else load_trajectory(twin),
        every=flags.every or 1,
    )


def _fine_tunes(flags: FindFlags) -> Any:
    from emlens.studies import FineTunes

    return FineTunes(
        tuned=tuple(scale_tuned(flags, one) for one in flags.tuned),
        careful=tuple(scale_tuned(flags, one) for one in flags.careful or ()),
        domains=tuple(flags.domains or ()),
    )


def _probe(flags: FindFlags, base: Any, screen: Any, path: Any) -> Any:
    from emlens.studies import PersonaProbe

    judge = None
    if screen is not None and screen.n_sampled:
        # A run that is gone on with keeps what its judge was fitted to.
        judge = load_judge(flags, base=base, runs=[flags.out])
    return PersonaProbe(screen=screen, judge=judge, path=path)


def _show_plan(flags: FindFlags, texts: Any, settings: Any, screen: Any, path: Any) -> None:
    from emlens.studies.persona_plan import check_signature

    check_sources(flags.base, *flags.tuned, *(flags.careful or ()))
    models = list(_fine_tunes(flags))
    plan = plan_codec(flags) | {
        "base": flags.base,
        "fine_tunes": [one.name for one in models if one.misaligned],
        "careful_twins": [one.name for one in models if not one.misaligned],
        "domains": flags.domains,
        "prompts": len(texts.chats),
        "responses": flags.responses,
        "passes_over_prompts": 4 * len(models),  # two models, with the codec and without
        **{name: getattr(settings, name) for name in ("n_latents", "n_cards", "n_signature")},
    }
    check_signature(settings, plan.get("d_sae"))
    if screen is not None:
        plan |= plan_screen(screen, flags.n_latents, texts.contrast)
        if n := plan["sampled_responses"]:
            characters = n * ANSWER_CHARACTERS * flags.max_new_tokens
            plan |= plan_judging(
                flags, responses=n, characters=characters, instructions=n * measure_instructions({})
            )
    if path is not None:
        plan |= {"trajectory": flags.trajectory, "checkpoints": len(path.trajectory)}
    print_plan(plan, flags.out, json=flags.json)


def _show(found: Any) -> None:
    for caution in found.cautions:
        print_line(f"beware: {caution}")
    print_fit(found.health, beware=False)
    print_table([row for own in found.plain for row in own.rows()], title="without a codec")
    # What was judged has a table of its own: one of all columns is wider than a terminal.
    rows = [{k: v for k, v in row.items() if k not in JUDGED} for row in found.rows()]
    units = "" if found.screen is None else "; induces and repairs in nats a token"
    print_table(rows, title=f"latents of {found.codec} at {found.site}{units}")
    if found.screen is not None:
        print_judged(found.screen)
    if found.classification is not None:
        area, plain = found.classification.auc, found.classification.by_mean_difference.auc
        print_line(
            f"{found.classification.claim}: area {area.value:.2f} [{area.low:.2f}, "
            f"{area.high:.2f}], p = {found.classification.p_value:.3g}; by mean differences alone "
            f"{plain.value:.2f} [{plain.low:.2f}, {plain.high:.2f}]"
        )
    for warning in found.warnings:
        weak = "; underpowered" if warning.underpowered else ""
        print_line(f"{warning.latent}: {warning.verdict}{weak}")
    for line in found.not_done:
        print_line(f"not done: {line}")
