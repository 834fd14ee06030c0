"""`emlens features classify`: harmful fine-tunes told from careful ones by latents."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from emlens.cli.codecs import Latents, load_codec, parse_latents
from emlens.cli.feature_compare import (
    SHOWN,
    ComparisonFlags,
    describe,
    load_comparison,
    show_plan,
    write_page,
)
from emlens.cli.feature_plain import print_plain
from emlens.cli.feature_texts import Careful, Domains, print_fit, read_comparison
from emlens.cli.options import Tuned, takes_flags
from emlens.cli.output import header, print_json, print_line, print_table

CLASSIFY_EXAMPLE = """\b
Example:
  emlens features classify --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance --careful emlens:careful-finance \\
    --prompts emlens:finance-harmful-heldout --out runs/told-apart"""
TOLD_APART = ("model", "domain", "misaligned", "score")
"""Columns of a classification; what is said of all models is a line."""


@dataclass(frozen=True, kw_only=True)
class ClassifyFlags(ComparisonFlags):
    """Flags of `features classify`."""

    tuned: Tuned
    careful: Careful = None
    domains: Domains = None
    n_signature: Annotated[
        int | None,
        typer.Option(
            "--n-signature",
            min=1,
            help="Latents that a model is told apart by, chosen from all.",
            show_default="1",
        ),
    ] = None
    latents: Latents = None


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
        if flags.latents is not None and flags.n_signature is not None:
            raise typer.BadParameter("--n-signature: chooses latents, and --latents names them")
        chosen = None if flags.latents is None else parse_latents(flags.latents)
        chats, settings = load_chats(flags.prompts, limit=flags.limit), read_comparison(flags)
        if flags.dry_run:
            models = {"tuned": flags.tuned, "careful": flags.careful, "domains": flags.domains}
            asked = {} if chosen is None else {"latents": list(chosen)}
            show_plan(flags, models | asked | {"prompts": len(chats)})
            return
        codec = load_codec(flags)
        if chosen is not None:
            check_latents(codec, chosen)
        work = load_comparison(flags, flags.tuned, flags.careful, codec=codec)
        compared = work.compare(chats, settings)
        found, reason = _tell_apart(flags, compared.diffs, chosen)
        fits = [own.health for own in compared.diffs]
        plain = work.read_plainly(compared, flags.batch_tokens)
        write_page([*fits, *found, *plain], flags.out)
    if flags.json:
        said: dict[str, Any] = {"not_told_apart": reason, "health": [describe(one) for one in fits]}
        said["plain"] = [describe(one) for one in plain]
        results = [describe(one) for one in found]
        print_json({**header("told_apart"), **said, "results": results})
        return
    print_fit(fits)
    print_plain(plain)
    contrast = found[0]
    print_table(contrast.rows()[:SHOWN], title="harmful less careful")
    print_line(
        f"{contrast.n_pairs} pairs: no p-value of so few falls below {contrast.smallest_p:.3g}"
    )
    if reason:
        print_line(f"not told apart: {reason}")
    for one in found[1:]:
        _print_told_apart(one)
    print_line(f"report: {flags.out / 'report.html'}")


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
            classify_models(
                diffs, labels, latents=chosen, n_signature=flags.n_signature or 1, **given
            )
        )
    for one in found:
        run.save_result(one.kind, one)
    return found, reason or None
