"""Entry point of `emlens`; not for use from Python, where the library has the same names.

Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 could not be checked; 130 after Ctrl-C.
"""

import errno
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import emlens
from emlens.cli import (
    adapters,
    demo,
    diff,
    directions,
    doctor,
    evaluate,
    export,
    features,
    generate,
    narrow,
    report,
    sae,
    scores,
    train,
    transition,
)
from emlens.cli.interrupted import say_kept
from emlens.sources import SourceUnavailableError

DONE, FAILED, USAGE, UNCHECKED, INTERRUPTED = 0, 1, 2, 3, 130
# By name: importing their classes takes seconds that `--help` does not have.
_FAILED_CHECKS = frozenset(
    {"AdapterNotInEffectError", "HookNeverFiredError", "TrainingDivergedError"}
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What a disk says that is full, over its quota or failing: nobody used the command wrongly."""


def choose_exit_code(error: Exception) -> int:
    """What an error that reached the surface means to whoever called the command."""
    if _FAILED_CHECKS & {cls.__name__ for cls in type(error).__mro__}:
        return FAILED
    if is_outage(error):
        return UNCHECKED
    return USAGE if isinstance(error, ValueError | OSError) else UNCHECKED


def is_outage(error: Exception) -> bool:
    """Whether what a command needs is not there right now: a network, a judge, room on a disk."""
    full = isinstance(error, OSError) and error.errno in _FULL
    gone = type(error).__name__ == "JudgeUnavailableError"
    return full or gone or isinstance(error, SourceUnavailableError)


class CommandLine(TyperGroup):
    """Turns errors into one line on stderr and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            flags = ctx.meta.get("emlens.flags")
            kept = say_kept([] if flags is None else flags.folders())
            typer.echo(f"interrupted; {kept}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error, which shows itself
                raise
            code = choose_exit_code(error)
            expected = code != UNCHECKED or is_outage(error)
            if not expected and not ctx.meta.get("emlens.quiet"):
                traceback.print_exc(file=sys.stderr)
            else:
                typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(code) from None


app = typer.Typer(
    name="emlens",
    cls=CommandLine,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain text: an example can be copied as it is printed.
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 could not be checked.",
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"emlens {emlens.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def describe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """See what a fine-tune changed inside a language model."""


app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)
app.add_typer(adapters.app, name="adapters")
app.command("diff", epilog=diff.EXAMPLE)(diff.diff)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("transition", epilog=transition.EXAMPLE)(transition.transition)
app.command("narrow", epilog=narrow.EXAMPLE)(narrow.narrow)
app.add_typer(directions.app, name="directions")
app.add_typer(sae.app, name="sae")
app.add_typer(features.app, name="features")
app.command("generate", epilog=generate.EXAMPLE)(generate.generate)
app.command("evaluate", epilog=evaluate.EVALUATE_EXAMPLE)(evaluate.evaluate)
app.command("judge", epilog=evaluate.JUDGE_EXAMPLE)(evaluate.judge)
app.command("summary", epilog=scores.SUMMARY_EXAMPLE)(scores.summary)
app.command("compare", epilog=scores.COMPARE_EXAMPLE)(scores.compare)
app.command("export", epilog=export.EXAMPLE)(export.export)
app.command("report", epilog=report.EXAMPLE)(report.report)


def main() -> None:
    """Run the command line and leave with its exit code."""
    app()
