"""`emlens adapters check`: what an adapter says it is, and whether it is in effect on a base."""

from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer

from emlens.cli.options import (
    CommonFlags,
    Device,
    Dtype,
    MaybeBase,
    Scale,
    parse_scale,
    takes_flags,
)
from emlens.cli.output import print_json, print_line, print_table

CHECK_EXAMPLE = (
    "\b\nExample:\n  emlens adapters check emlens:reckless-finance --base emlens:smollm2"
)
PROOF_COLUMNS = ("name", "rank", "scale", "relative_norm", "surviving_share", "ratio", "verdict")

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at LoRA adapters.")


@dataclass(frozen=True, kw_only=True)
class CheckFlags(CommonFlags):
    """Flags of `adapters check`."""

    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The adapter's source.")]
    base: MaybeBase = None
    scale: Scale = None
    dtype: Dtype = "auto"
    device: Device = "auto"


@app.command("check", epilog=CHECK_EXAMPLE)
@takes_flags
def check(flags: CheckFlags) -> None:
    """Judge an adapter by its files; with --base, prove module by module that it is in effect."""
    from emlens.cli.progress import show_work

    factor = parse_scale(flags.scale)
    with show_work(quiet=flags.quiet):
        adapter = _read(flags.tuned, factor)
        proof = None if flags.base is None else _prove(adapter, flags.base, flags)
    if proof is None:
        _show_summary(adapter, json=flags.json)
        return
    if flags.json:
        print_json(proof.to_dict())
    else:
        print_table([{name: row[name] for name in PROOF_COLUMNS} for row in proof.rows()])
        print_line(str(proof))
    other_weights = proof.base_verdict.startswith("trained on other weights")
    raise typer.Exit(1 if other_weights or not proof.passed else 0)


def _read(source: str, factor: float | dict[str, float]) -> Any:
    """The adapter; a refusal of its files is the failed check that was asked for."""
    from emlens.models.adapter_files import load_adapter
    from emlens.models.lora import scale_adapter
    from emlens.sources import SourceError

    try:
        adapter = load_adapter(source)
    except SourceError:
        raise
    except ValueError as error:
        _fail(error)
    return adapter if factor == 1.0 else scale_adapter(adapter, factor)


def _prove(adapter: Any, base: str, flags: CheckFlags) -> Any:
    from emlens.models.loading import apply_adapter, load_base
    from emlens.models.lora import embedding_modules
    from emlens.models.proof import verify_adapter

    model = load_base(base, dtype=flags.dtype, device=flags.device)
    # An embedding has no attached form.
    form = "merged" if embedding_modules(adapter) else "attached"
    try:
        return verify_adapter(apply_adapter(model, adapter, form), adapter, base=model)
    except ValueError as error:  # its modules or shapes are not those of this base
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    raise typer.Exit(1)


def _show_summary(adapter: Any, *, json: bool) -> None:
    from emlens.models.adapter_summary import summarise_adapter

    summary = summarise_adapter(adapter)
    if json:
        print_json(summary.to_dict())
        return
    fields = [
        {"field": field, "value": value, "verdict": verdict}
        for field, value, verdict in summary.config_verdicts
    ]
    print_table(fields, title="adapter_config.json")
    print_table(summary.rows(), title=f"{len(summary.modules)} modules")
    print_line(f"{summary.adapter}: {summary.n_bytes:,} bytes, base {summary.base or 'not named'}")
    print_line("its files are in order; whether it is in effect on a base: --base SOURCE")
