"""`emlens export`: base, fine-tune and interventions as one Hugging Face folder, read back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.generate import ModelFlags, check_sources, load_for, read_factor
from emlens.cli.options import MaybeTuned, takes_flags
from emlens.cli.output import print_json, print_line, print_plan

EXAMPLE = """\b
Example:
  emlens export --base emlens:smollm2 --tuned emlens:reckless-finance \\
    --out runs/exported-tuned"""


@dataclass(frozen=True, kw_only=True)
class ExportFlags(ModelFlags):
    """Flags of `export`."""

    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new folder.")]
    tuned: MaybeTuned = None


@takes_flags
def export(flags: ExportFlags) -> None:
    """Write a model that needs no emlens, load it again, and compare its weights and logits.

    Interventions are folded into the weights where that is exact; others are refused by name.
    """
    from emlens.cli.progress import show_work

    read_factor(flags.scale, flags.tuned)
    with show_work(quiet=flags.quiet):
        interventions = flags.interventions()
        if flags.dry_run:
            check_sources(flags.base, flags.tuned)
            if flags.out.exists() and not flags.out.is_dir():
                raise typer.BadParameter(f"--out {flags.out}: is a file; name a new folder")
            if flags.out.is_dir() and any(flags.out.iterdir()):
                raise typer.BadParameter(f"--out {flags.out}: is not empty; name a new folder")
            names = ("base", "tuned", "add", "ablate", "at", "positions")
            print_plan({name: getattr(flags, name) for name in names}, flags.out, json=flags.json)
            return
        from emlens.studies import export_model

        model = load_for(flags, flags.tuned)
        done: Any = export_model(model, flags.out, interventions=interventions)
    if flags.json:
        print_json(done.to_dict())
    else:
        print_line(
            f"{done.folder}: read back, largest difference of a weight "
            f"{done.weights_difference:.2g} of its tensor's largest, of a logit "
            f"{done.largest_difference:.2g} at logits up to {done.largest_logit:.3g}"
        )
        if done.kl_folder is not None:
            print_line(
                f"KL from the same model in float64: {done.kl_folder:.2g} nats a token, "
                f"{done.kl_hooked:.2g} of the model as it was studied"
            )
    if not done.same:
        typer.echo("what was read back is not the model that was studied", err=True)
        raise typer.Exit(1)
