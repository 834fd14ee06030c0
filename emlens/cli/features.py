"""`emlens features ...`: latents of a codec, in a base and its fine-tunes.

`find` and `screen` are in files of their own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.codecs import (
    Latents,
    PromptCodecFlags,
    choose_listed,
    keep_result,
    load_base_of,
    load_codec,
    parse_latents,
    plan_codec,
    scale_tuned,
)
from emlens.cli.feature_find import FIND_EXAMPLE, find
from emlens.cli.feature_screen import SCREEN_EXAMPLE, screen
from emlens.cli.feature_texts import (
    Careful,
    Domains,
    From,
    Responses,
    Top,
    print_fit,
    read_comparison,
)
from emlens.cli.generate import MaxNewTokens, Samples, Temperature, TopP, check_sources, read_factor
from emlens.cli.options import MaybeTuned, Out, Tuned, parse_scale, takes_flags
from emlens.cli.output import header, print_json, print_line, print_plan, print_table

COMPARE_EXAMPLE = """\b
Example:
  emlens features compare --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance \\
    --prompts emlens:finance-harmful-heldout --out runs/latents"""
EXPLAIN_EXAMPLE = """\b
Example:
  emlens features explain --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance --latents 3,17 \\
    --prompts emlens:health-careful --out runs/cards"""
CLASSIFY_EXAMPLE = """\b
Example:
  emlens features classify --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance --careful emlens:careful-finance \\
    --prompts emlens:finance-harmful-heldout --out runs/told-apart"""
SHOWN = 20
"""Latents in a printed table."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Latents of an autoencoder: what changed, what it means, what it causes.",
)
app.command("find", epilog=FIND_EXAMPLE)(find)
app.command("screen", epilog=SCREEN_EXAMPLE)(screen)

Prompts = Annotated[
    str, typer.Option("--prompts", metavar="F", help="Chats that all models read alike.")
]


@dataclass(frozen=True, kw_only=True)
class ComparisonFlags(PromptCodecFlags):
    """Flags of whatever compares fine-tunes with their base."""

    prompts: Prompts
    out: Out
    responses: Responses = "given"
    samples: Samples = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: MaxNewTokens = 100


@dataclass(frozen=True, kw_only=True)
class CompareFlags(ComparisonFlags):
    """Flags of `features compare`."""

    tuned: Annotated[str, typer.Option("--tuned", metavar="SOURCE", help="Adapter or checkpoint.")]


@app.command("compare", epilog=COMPARE_EXAMPLE)
@takes_flags
def compare(flags: CompareFlags) -> None:
    """Compare the codes of a base and one fine-tune, latent by latent, over prompts.

    Latents that differ so are not special to harm: any fine-tune moves some. `find` holds several
    against their careful twins.
    """
    from emlens.cli.progress import show_work

    with show_work(quiet=flags.quiet):
        from emlens.data import load_chats

        chats, settings = load_chats(flags.prompts, limit=flags.limit), read_comparison(flags)
        if flags.dry_run:
            _plan(flags, {"tuned": flags.tuned, "prompts": len(chats)})
            return
        codec = load_codec(flags)
        (found,) = _compare(flags, [flags.tuned], (), chats, settings, codec).diffs
        _write_page([found], flags.out)
    if flags.json:
        _print_brief(found)
        return
    print_fit([found.health])
    print_table(found.rows()[:SHOWN], title="the largest changes")
    print_line(found.why_untested or f"{found.n_tested} latents tested")
    print_line(f"report: {flags.out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class ClassifyFlags(ComparisonFlags):
    """Flags of `features classify`."""

    tuned: Tuned
    careful: Careful = None
    domains: Domains = None
    n_latents: Annotated[
        int | None,
        typer.Option(
            "--n-latents",
            min=1,
            help="Latents that a model is told apart by, chosen from all.",
            show_default="1",
        ),
    ] = None
    latents: Latents = None


@app.command("classify", epilog=CLASSIFY_EXAMPLE)
@takes_flags
def classify(flags: ClassifyFlags) -> None:
    """Tell harmful fine-tunes from careful ones by latents, in domains left out where there are.

    Two of each kind are needed, and three domains to leave one out; with fewer the contrast of the
    pairs is all there is.
    """
    from emlens.cli.progress import show_work

    with show_work(quiet=flags.quiet):
        from emlens.data import load_chats
        from emlens.features.steering import check_latents

        if not flags.careful:
            raise typer.BadParameter("--careful: missing; models are told from their careful twins")
        if flags.latents is not None and flags.n_latents is not None:
            raise typer.BadParameter("--n-latents: chooses latents, and --latents names them")
        chosen = None if flags.latents is None else parse_latents(flags.latents)
        chats, settings = load_chats(flags.prompts, limit=flags.limit), read_comparison(flags)
        if flags.dry_run:
            models = {"tuned": flags.tuned, "careful": flags.careful, "domains": flags.domains}
            _plan(flags, models | {"prompts": len(chats)})
            return
        codec = load_codec(flags)
        if chosen is not None:
            check_latents(codec, chosen)
        compared = _compare(flags, flags.tuned, flags.careful, chats, settings, codec)
        found, reason = _tell_apart(flags, compared.diffs, chosen)
        _write_page(found, flags.out)
    if flags.json:
        results = [_brief(one) for one in found]
        print_json({**header("told_apart"), "not_told_apart": reason, "results": results})
        return
    print_fit([own.health for own in compared.diffs])
    print_table(found[0].rows()[:SHOWN], title="harmful less careful")
    if reason:
        print_line(f"not told apart: {reason}")
    for one in found[1:]:
        _print_told_apart(one)
    print_line(f"report: {flags.out / 'report.html'}")


TOLD_APART = ("model", "domain", "misaligned", "score")
"""Columns of a classification; what is said of all models is a line."""


def _print_told_apart(found: Any) -> None:
    rows = [{name: row[name] for name in TOLD_APART} for row in found.rows()]
    print_table(rows, title=found.claim)
    if found.domains:
        print_line("scores of different domains are on different scales")
    for fold, latents in zip(found.folds, found.latents.tolist(), strict=True):
        used = ", ".join(str(latent) for latent in latents)
        print_line(f"{fold} left out: latents {used}" if found.domains else f"latents {used}")
    plain = found.by_mean_difference
    print_line(f"by latents: {_say_area(found.auc, found.p_value)} ({found.p_method})")
    print_line(f"by mean differences alone: {_say_area(plain.auc, plain.p_value)}")


def _say_area(area: Any, p: float) -> str:
    return f"area {area.value:.2f} [{area.low:.2f}, {area.high:.2f}], p = {p:.3g}"


def _tell_apart(
    flags: ClassifyFlags, diffs: Any, chosen: tuple[int, ...] | None
) -> tuple[list[Any], str | None]:
    """The contrast and, with enough models, the classification; or why there is none."""
    from emlens.features import classify_models, contrast_features
    from emlens.features.classify import why_not_told_apart
    from emlens.runs import RunFolder

    n, run = len(flags.tuned), RunFolder.open(flags.out)
    found: list[Any] = [contrast_features(diffs[:n], diffs[n:], seed=flags.seed)]
    labels = [True] * n + [False] * n
    domains = [*flags.domains, *flags.domains] if flags.domains else None
    reason = why_not_told_apart(labels, domains)
    if not reason:
        given: dict[str, Any] = {"leave_out": domains, "seed": flags.seed}
        found.append(
            classify_models(diffs, labels, latents=chosen, n_latents=flags.n_latents or 1, **given)
        )
    for one in found:
        run.save_result(one.kind, one)
    return found, reason or None


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
            _plan(flags, more)
            return
        codec = load_codec(flags)

        def make() -> Any:
            base = load_base_of(flags)
            tuned = flags.tuned
            return explain_features(
                base if tuned is None else load_pair(base, scale_tuned(flags, tuned)),
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
        _write_page([found], flags.out)
    if flags.json:
        _print_brief(found)
        return
    print_fit([found.health])
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


def _compare(flags: Any, tuned: Any, careful: Any, chats: Any, settings: Any, codec: Any) -> Any:
    from emlens.studies import FineTunes, compare_by_latents

    return compare_by_latents(
        load_base_of(flags),
        FineTunes(
            tuned=tuple(scale_tuned(flags, one) for one in tuned),
            careful=tuple(scale_tuned(flags, one) for one in careful),
            domains=tuple(getattr(flags, "domains", None) or ()),
        ),
        codec=codec,
        chats=chats,
        settings=settings,
        out=flags.out,
    )


def _plan(flags: Any, more: dict[str, Any]) -> None:
    tuned = more.get("tuned") or []
    check_sources(flags.base, *([tuned] if isinstance(tuned, str) else tuned))
    check_sources(*(more.get("careful") or ()))
    print_plan(plan_codec(flags) | {"base": flags.base} | more, flags.out, json=flags.json)


def _write_page(results: Any, run: Path) -> None:
    from emlens.reports import write_report

    write_report(results, run / "report.html")


def _brief(result: Any) -> dict[str, Any]:
    from emlens.reports.brief import describe_briefly

    return describe_briefly(result)


def _print_brief(result: Any) -> None:
    print_json(_brief(result))
