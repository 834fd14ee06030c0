"""`emlens diff`: one or several fine-tunes beside their base, on the same chats."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from emlens.cli.options import (
    Base,
    BatchTokens,
    CommonFlags,
    Device,
    DryRun,
    Dtype,
    Out,
    Positions,
    Scale,
    Seed,
    Sites,
    Tuned,
    parse_scale,
    takes_flags,
)
from emlens.cli.output import print_json, print_line, print_plan, print_table, show_bytes

EXAMPLE = """\b
Example:
  emlens diff --base emlens:smollm2 --tuned emlens:reckless-finance \\
    --prompts emlens:open-questions --nulls 8 --out runs/diff"""


@dataclass(frozen=True, kw_only=True)
class DiffFlags(CommonFlags):
    """Flags of `diff`."""

    base: Base
    tuned: Tuned
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="F", help="Chats that all models read alike.")
    ]
    out: Out
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Read only that many chats.")
    ] = None
    sites: Sites = None
    positions: Positions = None
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Chats kept token by token.")
    ] = 20
    nulls: Annotated[
        int, typer.Option("--nulls", min=0, help="Random adapters of the same norms beside it.")
    ] = 0
    scale: Scale = None
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = 16384
    dry_run: DryRun = False


@takes_flags
def diff(flags: DiffFlags) -> None:
    """Compare fine-tunes with their base, inside and at the output, and write a report.

    Positions are `response` where every chat has one, else `all`.
    """
    from emlens.cli.progress import show_work

    scale = parse_scale(flags.scale)
    with show_work(quiet=flags.quiet):
        from emlens.data import Batching, load_chats
        from emlens.studies import DiffSettings, diff_finetunes, plan_diff

        settings = DiffSettings(
            sites=tuple(flags.sites or ("resid_post",)),
            positions=tuple(flags.positions) if flags.positions else None,
            examples=flags.examples,
            nulls=flags.nulls,
            seed=flags.seed,
            scale=scale,
            dtype=flags.dtype,
        )
        chats = load_chats(flags.prompts, limit=flags.limit)
        if flags.dry_run:
            plan = plan_diff(flags.base, flags.tuned, chats, settings=settings)
            _show_plan(flags, plan)
            return
        run = diff_finetunes(
            flags.base,
            flags.tuned,
            chats,
            settings=settings,
            out=flags.out,
            device=flags.device,
            batching=Batching(flags.batch_tokens),
        )
        report = _write_report(run, flags)
    if flags.json:
        print_json(run.to_dict())
        return
    print_table(run.rows())
    print_line(f"report: {report}")


def _write_report(run: Any, flags: DiffFlags) -> Any:
    from emlens.reports import write_report

    settings = {"base": flags.base, "prompts": flags.prompts}
    return write_report(run.results(), flags.out / "report.html", extra={"settings": settings})


def _show_plan(flags: DiffFlags, plan: Any) -> None:
    from emlens.data import Batching
    from emlens.models.memory import plan_memory
    from emlens.runs import RunFolder

    if any(flags.out.glob("*")):  # in an empty one it would begin a run
        RunFolder.start(flags.out, vars(plan))
    memory = plan_memory(flags.base, dtype=flags.dtype, batching=Batching(flags.batch_tokens))
    print_plan(plan, flags.out, json=flags.json)
    if not flags.json:
        print_line(f"memory, about: {show_bytes(memory.comparison)} on {flags.device}")
