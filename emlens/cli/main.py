"""Entry point of `emlens`; not for use from Python, where the library has the same names."""

from typing import Annotated

import typer

import emlens

app = typer.Typer(name="emlens", no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"emlens {emlens.__version__}")
        raise typer.Exit


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


def main() -> None:
    """Run the command line and leave with its exit code."""
    app()
