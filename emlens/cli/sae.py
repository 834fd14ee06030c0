"""`emlens sae train | check`: sparse autoencoders made here, and how well one fits two models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.codecs import (
    PromptCodecFlags,
    load_base_of,
    load_codec,
    plan_codec,
    scale_tuned,
)
from emlens.cli.generate import check_sources, read_factor
from emlens.cli.options import (
    Base,
    BatchTokens,
    CommonFlags,
    Device,
    DryRun,
    Dtype,
    MaybeTuned,
    Out,
    Scale,
    Seed,
    takes_flags,
)
from emlens.cli.output import print_json, print_line, print_plan, print_table

TRAIN_EXAMPLE = """\b
Example:
  emlens sae train --base emlens:smollm2 --site resid_post.15 \\
    --data emlens:finance-careful --data emlens:health-careful \\
    --positions 'all[24:]' --architecture batchtopk --d-sae 512 --k 16 \\
    --out runs/sae"""
CHECK_EXAMPLE = """\b
Example:
  emlens sae check --sae emlens:smollm2-resid15 \\
    --base emlens:smollm2 --tuned emlens:reckless-finance \\
    --prompts emlens:finance-harmful-heldout"""
ARCHITECTURES = ("topk", "batchtopk", "matryoshka")

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Sparse autoencoders.")


@dataclass(frozen=True, kw_only=True)
class TrainFlags(CommonFlags):
    """Flags of `sae train`."""

    site: Annotated[
        str, typer.Option("--site", metavar="SITE", help="One site, such as resid_post.15.")
    ]
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="F", help="Texts or chats that are read; again."),
    ]
    d_sae: Annotated[int, typer.Option("--d-sae", min=1, help="Latents.")]
    k: Annotated[int, typer.Option("--k", min=1, help="Latents active at a token, on average.")]
    out: Out
    base: Base = "emlens:smollm2"
    tuned: MaybeTuned = None
    scale: Scale = None
    architecture: Annotated[
        str, typer.Option("--architecture", metavar="NAME", help=f"{', '.join(ARCHITECTURES)}.")
    ] = "batchtopk"
    positions: Annotated[
        str, typer.Option("--positions", metavar="SPAN", help="Tokens that are trained on.")
    ] = "all"
    passes: Annotated[
        int, typer.Option("--passes", min=1, help="How often the same tokens come.")
    ] = 3
    held_out: Annotated[
        float, typer.Option("--held-out", help="Share of the tokens not trained on.")
    ] = 0.05
    batch_rows: Annotated[
        int, typer.Option("--batch-rows", min=2, help="Tokens of an optimiser step.")
    ] = 4096
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Peak step size of Adam.")
    ] = 8e-4
    activations: Annotated[
        Path | None,
        typer.Option(
            "--activations",
            metavar="FOLDER",
            help="Where activations are kept; delete it when you like.",
            show_default="OUT-activations",
        ),
    ] = None
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = 8192
    dry_run: DryRun = False

    def folders(self) -> list[Path]:
        """What is captured is kept beside the run."""
        return [] if self.dry_run else [_activations(self), self.out]


@app.command("train", epilog=TRAIN_EXAMPLE)
@takes_flags
def train(flags: TrainFlags) -> None:
    """Train an autoencoder on a model's activations, or on those of base and fine-tune.

    Activations are captured, shuffled and trained on; the threshold is set on tokens held out.
    """
    from emlens.cli.progress import show_work

    read_factor(flags.scale, flags.tuned)
    if flags.architecture not in ARCHITECTURES:
        raise typer.BadParameter(
            f"--architecture {flags.architecture}: expected one of {', '.join(ARCHITECTURES)}"
        )
    with show_work(quiet=flags.quiet):
        from emlens.codecs import read_training
        from emlens.data import Batching, load_chats
        from emlens.studies import train_sae_on_chats

        settings, kept = _settings(flags), _activations(flags)
        chats = [chat for source in flags.data for chat in load_chats(source)]
        if flags.dry_run:
            check_sources(flags.base, flags.tuned)
            _show_training(flags, settings, chats)
            return
        train_sae_on_chats(
            _load(flags),
            chats,
            settings=settings,
            activations=kept,
            out=flags.out,
            seed=flags.seed,
            batching=Batching(flags.batch_tokens),
        )
        found = read_training(flags.out)
    if flags.json:
        print_json(found.to_dict())
        return
    print_table([_summarise(found)], title="on tokens held out")
    print_line(f"codec: {flags.out}; activations, no longer needed: {kept}")


def _activations(flags: TrainFlags) -> Path:
    if flags.activations is not None:
        return flags.activations
    return flags.out.with_name(f"{flags.out.name}-activations")


def _settings(flags: TrainFlags) -> Any:
    from emlens.studies import TextSae

    names = ("site", "architecture", "d_sae", "k", "positions", "passes", "held_out")
    more = ("batch_rows", "learning_rate")
    return TextSae(**{name: getattr(flags, name) for name in (*names, *more)})


def _load(flags: TrainFlags) -> Any:
    from emlens.models.pair import load_pair

    base = load_base_of(flags)
    return base if flags.tuned is None else load_pair(base, scale_tuned(flags, flags.tuned))


def _summarise(found: Any) -> dict[str, Any]:
    fit = found.held_out
    return {
        "latents": found.settings.d_sae,
        "explained_variance": fit.explained_variance,
        "l0": fit.l0,
        "dead_share": fit.dead_share,
        "threshold": found.threshold,
        "steps": found.settings.steps,
        "seconds": found.seconds,
    }


def _show_training(flags: TrainFlags, settings: Any, chats: Any) -> None:
    from emlens.data import parse_positions, tokenize_chat
    from emlens.models.checkpoints import read_tokenizer
    from emlens.models.memory import read_sizes
    from emlens.sites import parse_site

    width = parse_site(flags.site).width(read_sizes(flags.base))
    tokenizer, positions = read_tokenizer(flags.base), parse_positions(flags.positions)
    n = sum(int(positions.mask(tokenize_chat(chat, tokenizer)).sum()) for chat in chats)
    n *= 1 if flags.tuned is None else 2
    held = round(n * flags.held_out)
    plan = vars(settings) | {
        "base": flags.base,
        "tuned": flags.tuned,
        "d_in": width,
        "chats": len(chats),
        "tokens": n,
        "activations": str(_activations(flags)),
        "steps": settings.for_rows(n - held, held).steps,
        "seed": flags.seed,
    }
    print_plan(plan, flags.out, json=flags.json)


@dataclass(frozen=True, kw_only=True)
class CheckFlags(PromptCodecFlags):
    """Flags of `sae check`."""

    prompts: Annotated[
        str, typer.Option("--prompts", metavar="F", help="Chats that the models read alike.")
    ]
    tuned: MaybeTuned = None


@app.command("check", epilog=CHECK_EXAMPLE)
@takes_flags
def check(flags: CheckFlags) -> None:
    """Measure how well an autoencoder fits a model, or a base and its fine-tune.

    Exits with 1 where it explains less than .6 of the variance in one of them: then a search among
    its latents means little.
    """
    from emlens.cli.progress import show_work

    read_factor(flags.scale, flags.tuned)
    with show_work(quiet=flags.quiet):
        from emlens.data import Batching, load_chats
        from emlens.features import check_sae
        from emlens.models.pair import load_pair

        chats = load_chats(flags.prompts, limit=flags.limit)
        if flags.dry_run:
            check_sources(flags.base, flags.tuned)
            plan = plan_codec(flags) | {"prompts": len(chats), "tuned": flags.tuned}
            print_plan(plan, None, json=flags.json)
            return
        codec, base = load_codec(flags), load_base_of(flags)
        model = base if flags.tuned is None else load_pair(base, scale_tuned(flags, flags.tuned))
        found = check_sae(
            model,
            codec,
            chats=chats,
            positions=flags.positions,
            batching=Batching(flags.batch_tokens),
        )
    if flags.json:
        print_json(found.to_dict())
    else:
        print_table(found.rows())
    if found.underpowered:
        typer.echo(
            f"{flags.sae} explains less than .6 of the variance: a search among its latents is "
            "underpowered",
            err=True,
        )
        raise typer.Exit(1)
