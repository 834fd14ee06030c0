"""`emlens features compare`: which latents differ in one fine-tune, beside what needs no codec."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.codecs import PromptCodecFlags, load_base_of, load_codec, plan_codec, scale_tuned
from emlens.cli.feature_plain import keep_plain, print_plain
from emlens.cli.feature_texts import Responses, print_fit, read_comparison
from emlens.cli.generate import MaxNewTokens, Samples, Temperature, TopP, check_sources
from emlens.cli.options import Out, takes_flags
from emlens.cli.output import print_json, print_line, print_plan, print_table

COMPARE_EXAMPLE = """\b
Example:
  emlens features compare --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance \\
    --prompts emlens:finance-harmful-heldout --out runs/latents"""
SHOWN = 20
"""Latents in a printed table."""

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
            show_plan(flags, {"tuned": flags.tuned, "prompts": len(chats)})
            return
        work = load_comparison(flags, [flags.tuned], (), codec=load_codec(flags))
        compared = work.compare(chats, settings)
        (found,), plain = compared.diffs, work.read_plainly(compared, flags.batch_tokens)
        write_page([found, *plain], flags.out)
    if flags.json:
        print_json({**describe(found), "plain": [describe(one) for one in plain]})
        return
    print_fit([found.health])
    print_plain(plain)
    print_table(found.rows()[:SHOWN], title="the largest changes")
    print_line(found.why_untested or f"{found.n_tested} latents tested")
    print_line(f"report: {flags.out / 'report.html'}")


@dataclass(frozen=True)
class Comparison:
    """Fine-tunes that are to be compared, over one base in memory."""

    base: Any
    fine_tunes: Any
    codec: Any
    pairs: Any
    out: Path

    def compare(self, chats: Any, settings: Any) -> Any:
        """Compare all of them with the base."""
        from emlens.studies import compare_by_latents

        return compare_by_latents(
            self.base,
            self.fine_tunes,
            codec=self.codec,
            chats=chats,
            settings=settings,
            out=self.out,
            pairs=self.pairs,
        )

    def read_plainly(self, compared: Any, batch_tokens: int) -> list[Any]:
        """What differs in each fine-tune without any codec; none of those where nothing does.

        Args:
            compared: all of them, by latents.
            batch_tokens: tokens run at once.
        """
        members = zip(self.fine_tunes, compared.diffs, strict=True)
        return [
            own
            for number, (source, diff) in enumerate(members, 1)
            for own in keep_plain(
                self.out,
                lambda source=source: self.pairs.load(source),
                compared.chats,
                read=diff,
                batch_tokens=batch_tokens,
                number=number,
            )
        ]


def load_comparison(
    flags: Any, tuned: Sequence[str], careful: Sequence[str], *, codec: Any
) -> Comparison:
    """Load the base, and name what is compared with it.

    Args:
        flags: those of a comparison.
        tuned: sources of fine-tunes.
        careful: those of their careful twins.
        codec: the codec.
    """
    from emlens.studies import FineTunes
    from emlens.studies.compare_by_latents import LoadedPairs

    fine_tunes = FineTunes(
        tuned=tuple(scale_tuned(flags, one) for one in tuned),
        careful=tuple(scale_tuned(flags, one) for one in careful),
        domains=tuple(getattr(flags, "domains", None) or ()),
    )
    base = load_base_of(flags)
    return Comparison(base, fine_tunes, codec, LoadedPairs(base), flags.out)


def show_plan(flags: Any, more: dict[str, Any]) -> None:
    """Check the models' sources, and say what would be done."""
    tuned = more.get("tuned") or []
    check_sources(flags.base, *([tuned] if isinstance(tuned, str) else tuned))
    check_sources(*(more.get("careful") or ()))
    plan = plan_codec(flags, more.get("latents")) | {"base": flags.base} | more
    print_plan(plan, flags.out, json=flags.json)


def write_page(results: Any, run: Path) -> None:
    """Write the report of a run."""
    from emlens.reports import write_report

    write_report(results, run / "report.html")


def describe(result: Any) -> dict[str, Any]:
    """A result's JSON without a number for each of thousands of latents."""
    from emlens.reports.brief import describe_briefly

    return describe_briefly(result)
