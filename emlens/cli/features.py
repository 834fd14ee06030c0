"""`emlens features ...`: latents of a codec, in a base and its fine-tunes.

`explain` is here, the others are in files of their own.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from emlens.cli.codecs import (
    Latents,
    PromptCodecFlags,
    choose_listed,
    keep_result,
    load_base_of,
    load_codec,
    scale_tuned,
)
from emlens.cli.feature_classify import CLASSIFY_EXAMPLE, classify
from emlens.cli.feature_compare import (
    COMPARE_EXAMPLE,
    compare,
    describe,
    show_plan,
    write_page,
)
from emlens.cli.feature_find import FIND_EXAMPLE, find
from emlens.cli.feature_plain import keep_plain, print_plain
from emlens.cli.feature_screen import SCREEN_EXAMPLE, screen
from emlens.cli.feature_texts import From, Top, print_fit
from emlens.cli.generate import read_factor
from emlens.cli.options import MaybeTuned, Out, parse_scale, takes_flags
from emlens.cli.output import print_json, print_line, print_table

EXPLAIN_EXAMPLE = """\b
Example:
  emlens features explain --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance --latents 3,17 \\
    --prompts emlens:health-careful --out runs/cards"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Latents of an autoencoder: what changed, what it means, what it causes.",
)
app.command("find", epilog=FIND_EXAMPLE)(find)
app.command("screen", epilog=SCREEN_EXAMPLE)(screen)
app.command("compare", epilog=COMPARE_EXAMPLE)(compare)
app.command("classify", epilog=CLASSIFY_EXAMPLE)(classify)


@dataclass(frozen=True, kw_only=True)
class ExplainFlags(PromptCodecFlags):
    """Flags of `features explain`."""

    prompts: Annotated[
        str, typer.Option("--prompts", metavar="F", help="Various texts that windows are cut from.")
    ]
    out: Out
    tuned: MaybeTuned = None
    latents: Latents = None
    source: From = None
    top: Top = None
    n_top: Annotated[
        int, typer.Option("--windows", min=1, help="Texts in which a latent is most active.")
    ] = 10
    directions: Annotated[
        list[str] | None,
        typer.Option(
            "--direction", metavar="FILE[@SITE]", help="Saved directions to compare with; again."
        ),
    ] = None


@app.command("explain", epilog=EXPLAIN_EXAMPLE)
@takes_flags
def explain(flags: ExplainFlags) -> None:
    """Make a card of each latent: windows by strength, tokens promoted, cosines beside chance."""
    from emlens.cli.progress import show_work

    read_factor(flags.scale, flags.tuned)
    with show_work(quiet=flags.quiet):
        from emlens.data import Batching, load_chats
        from emlens.features import ExplainSettings, FeatureCards, explain_features
        from emlens.models.pair import load_pair

        latents = choose_listed(flags.latents, flags.source, top=flags.top, usual=12)
        chats = load_chats(flags.prompts, limit=flags.limit)
        directions = _read_directions(flags.directions or ())
        if flags.dry_run:
            more = {"tuned": flags.tuned, "latents": list(latents), "prompts": len(chats)}
            show_plan(flags, more)
            return
        codec = load_codec(flags)

        @functools.cache
        def read() -> Any:
            base, tuned = load_base_of(flags), flags.tuned
            return base if tuned is None else load_pair(base, scale_tuned(flags, tuned))

        def make() -> Any:
            return explain_features(
                read(),
                codec,
                latents=latents,
                chats=chats,
                directions=directions,
                settings=ExplainSettings(
                    n_top=flags.n_top,
                    positions=flags.positions,
                    batching=Batching(flags.batch_tokens),
                    seed=flags.seed,
                ),
            )

        plan = _explain_plan(flags, codec, latents, chats, directions)
        found = keep_result(flags.out, plan, make, FeatureCards)
        given: dict[str, Any] = {"read": found.health, "batch_tokens": flags.batch_tokens}
        plain = keep_plain(flags.out, read, chats, **given)
        write_page([found, *plain], flags.out)
    if flags.json:
        print_json({**describe(found), "plain": [describe(one) for one in plain]})
        return
    print_fit([found.health])
    print_plain(plain)
    print_table(found.rows())
    print_line(f"report: {flags.out / 'report.html'}")


def _explain_plan(
    flags: ExplainFlags, codec: Any, latents: Any, chats: Any, directions: Any
) -> dict[str, Any]:
    from emlens.data.prompts import hash_chats
    from emlens.models.source_hash import hash_source
    from emlens.models.weight_hash import hash_tensors

    return {
        "kind": "feature_cards",
        "base_files": hash_source(flags.base),
        "tuned_files": None if flags.tuned is None else hash_source(flags.tuned),
        "scale": parse_scale(flags.scale),
        "codec": codec.fingerprint,
        "latents": list(latents),
        "chats_sha256": hash_chats(chats),
        "positions": flags.positions or codec.positions,
        "windows": flags.n_top,
        "directions": hash_tensors((str(one.site), one.vector) for one in directions),
        "dtype": flags.dtype,
        "seed": flags.seed,
    }


def _read_directions(files: Any) -> list[Any]:
    from emlens.cli.interventions import parse_direction

    loaded = [parse_direction(text).load() for text in files]
    return [one for own in loaded for one in getattr(own, "directions", (own,))]
