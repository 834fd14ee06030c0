"""`emlens demo`: the shipped model and its fine-tune, proven, compared, shown."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from emlens.cli.options import CommonFlags, DryRun, Out, takes_flags
from emlens.cli.output import print_json, print_line, print_plan, print_table

EXAMPLE = "\b\nExample:\n  emlens demo --quick --out runs/quick"


@dataclass(frozen=True, kw_only=True)
class DemoFlags(CommonFlags):
    """Flags of `demo`."""

    quick: Annotated[
        bool, typer.Option("--quick", help="A few chats only, to see that it works.")
    ] = False
    out: Out = Path("runs/demo")
    dry_run: DryRun = False


@takes_flags
def demo(flags: DemoFlags) -> None:
    """Prove, compare and question a small model's fine-tune, and write a report about it."""
    from emlens.cli.progress import show_work

    began = time.perf_counter()
    with show_work(quiet=flags.quiet):
        from emlens.studies.run_demo import plan_demo, run_demo

        if flags.dry_run:
            print_plan(plan_demo(quick=flags.quick), flags.out, json=flags.json)
            return
        result = run_demo(flags.out, quick=flags.quick, began=began)
    if flags.json:
        print_json(result.to_dict())
        return
    print_table(result.removal.rows(), title=result.removal.claim)
    for caution in result.features.cautions:
        print_line(f"beware: {caution}")
    found = result.features
    print_table(found.rows(), title=f"latents of {found.codec} at {found.site}")
    print_table([{"stage": name, "seconds": took} for name, took in result.seconds.items()])
    print_line(
        f"{result.modules_in_effect} of {result.modules} modules of {result.tuned} in effect; "
        f"KL {result.kl_heldout:.4f} nats a token on held-out rows, {result.kl_answers:.4f} on "
        f"answers to open questions, at most {result.kl_nulls_high:.4f} for random adapters"
    )
    print_line(f"report: {result.report}")
