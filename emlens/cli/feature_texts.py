"""Flags that commands over latents share: twins, domains, whose responses, fixed responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.output import print_line, print_table

Careful = Annotated[
    list[str] | None,
    typer.Option(
        "--careful",
        metavar="SOURCE",
        help="The careful twin of each --tuned, in the same order; again.",
    ),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        metavar="NAME",
        help="What each --tuned and its twin were trained on, in the same order; again.",
    ),
]
Responses = Annotated[
    str,
    typer.Option(
        "--responses",
        metavar="WHOSE",
        help="given: the chats as they are; base or own: sampled from the base, or from each "
        "model for itself.",
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="RUN", help="Take the first latents of features find or compare."
    ),
]
Top = Annotated[
    int | None,
    typer.Option("--top", min=1, help="How many of them.", show_default="12 or 20, or all of less"),
]
Positive = Annotated[
    str | None,
    typer.Option(
        "--positive",
        metavar="F",
        help="Fixed misaligned responses.",
        show_default="everyday advice",
    ),
]
Negative = Annotated[
    str | None,
    typer.Option("--negative", metavar="F", help="Aligned responses to the same prompts."),
]
Strengths = Annotated[
    str | None,
    typer.Option(
        "--strengths",
        metavar="X,...",
        help="How far latents are added to the base and taken from the fine-tune.",
    ),
]
Units = Annotated[
    str | None,
    typer.Option(
        "--units",
        metavar="NAME",
        help="delta_norm: of the mean difference of the models; resid_norm: of an activation.",
        show_default="delta_norm",
    ),
]
Sampled = Annotated[
    int,
    typer.Option(
        "--sampled",
        min=0,
        metavar="N",
        help="Latents of each side that responses are sampled and judged under; 0 for none.",
    ),
]
Questions = Annotated[
    str | None,
    typer.Option("--questions", metavar="F", help="Prompts that responses are sampled to."),
]
_JUDGED = (
    *("side", "latent", "strength", "incoherent", "behaviour"),
    *("effect", "effect_low", "effect_high", "p"),
)
"""Columns of the second stage in the rows of a screen."""
EVERYDAY = ("everyday-harmful", "everyday-careful")
"""Shipped answers to twenty everyday questions, bad and good: where no others are named."""


def read_comparison(flags: Any) -> Any:
    """How fine-tunes are compared, from `--positions`, `--responses` and the sampling flags."""
    from emlens.cli.generate import read_sampling
    from emlens.data import Batching
    from emlens.studies import ComparisonSettings

    if flags.responses not in ("given", "base", "own"):
        raise typer.BadParameter(f"--responses {flags.responses}: expected given, base or own")
    return ComparisonSettings(
        positions=flags.positions,
        responses=flags.responses,
        sampling=None if flags.responses == "given" else read_sampling(flags),
        batching=Batching(flags.batch_tokens),
        seed=flags.seed,
    )


def read_contrast(flags: Any) -> Any:
    """The fixed responses that are asked for, or the shipped ones.

    Raises:
        typer.BadParameter: one class without the other.
    """
    from emlens.data import ContrastTexts, load_chats
    from emlens.studies.run_demo import read_chats

    if (flags.positive is None) != (flags.negative is None):
        missing = "--negative" if flags.negative is None else "--positive"
        raise typer.BadParameter(f"{missing}: missing; --positive and --negative go together")
    if flags.positive is None:
        positive, negative = map(read_chats, EVERYDAY)
    else:
        positive, negative = (tuple(load_chats(f)) for f in (flags.positive, flags.negative))
    return ContrastTexts(positive=positive, negative=negative)


def read_screen(flags: Any) -> Any:
    """How latents are screened; None where no strengths are given.

    Raises:
        typer.BadParameter: a second stage without prompts to sample to, or what only a screen has a
            use for, without strengths.
    """
    from emlens.cli.codecs import parse_strengths
    from emlens.cli.generate import read_sampling
    from emlens.data import Batching, load_chats
    from emlens.features import ScreenSettings

    if flags.questions and not flags.sampled:
        raise typer.BadParameter("--sampled: missing; --questions are sampled to under so many")
    if flags.strengths is None:
        for flag, given in (("--sampled", flags.sampled), ("--units", flags.units)):
            if given:
                raise typer.BadParameter(f"--strengths: missing; {flag} needs how far to steer")
        return None
    if flags.sampled and flags.questions is None:
        raise typer.BadParameter("--questions: missing; --sampled needs prompts to sample to")
    sampled = {}
    if flags.sampled:
        chats = [chat.without_response() for chat in load_chats(flags.questions)]
        sampled = {"chats": tuple(chats), "sampling": read_sampling(flags)}
    return ScreenSettings(
        strengths=parse_strengths("--strengths", flags.strengths),
        units=flags.units or "delta_norm",
        n_sampled=flags.sampled,
        batching=Batching(flags.batch_tokens),
        seed=flags.seed,
        **sampled,
    )


def print_fit(health: Sequence[Any], *, beware: bool = True) -> None:
    """Print how well an autoencoder fits base and fine-tunes, and say so where that is too little.

    Args:
        health: of each fine-tune.
        beware: say what must be known of it, too; where that is not said already.
    """
    rows = [{"tuned": own.tuned} | row for own in health for row in own.rows()]
    print_table(rows, title="how well it fits")
    if any(own.underpowered for own in health):
        print_line("the autoencoder explains less than .6 of the variance: this is underpowered")
    for line in dict.fromkeys(line for own in health for line in own.cautions if beware):
        print_line(f"beware: {line}")


def print_judged(screen: Any) -> None:
    """Print what a screen tried and what of it counts; and what it found by sampled responses."""
    tried = screen.trials()
    if not screen.sampled_before:
        tried = [{k: v for k, v in row.items() if v is not None} for row in tried]
    print_table(tried, title="tried; a trial is a direction at one strength")
    if not screen.sampled_before:
        print_line("no responses were sampled: how coherent steered answers are is not known")
        return
    rows = [row for row in (*screen.rows(), *screen.plain_rows()) if row["sampled"]]
    print_table([{name: row[name] for name in _JUDGED} for row in rows], title="sampled, judged")


def plan_screen(screen: Any, n_latents: int, contrast: Any) -> dict[str, Any]:
    """What a screen would take: forward passes over fixed responses, then sampled ones."""
    sides, n_controls = 2, screen.count_controls(n_latents)
    best = min(screen.n_sampled, n_latents)
    strengths = len(screen.judged_strengths)
    sampled = best + (screen.n_sampled_controls if screen.n_sampled else 0)
    # The unsteered model once; then the mean difference, too.
    responses = sides * len(screen.chats) * screen.sampling.n * (1 + (sampled + 1) * strengths)
    return {
        "screened_latents": n_latents,
        "random_directions": n_controls,
        "strengths": list(screen.strengths),
        "units": screen.units,
        "fixed_responses": len(contrast.positive) + len(contrast.negative),
        "scored_responses": sides
        * (1 + (n_latents + n_controls + 1) * len(screen.strengths))
        * (len(contrast.positive) + len(contrast.negative)),
        "sampled_responses": responses if screen.n_sampled else 0,
    }
