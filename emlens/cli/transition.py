"""`emlens transition`: whether and when the path of a LoRA through training turned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.options import CommonFlags, Seed, takes_flags
from emlens.cli.output import print_json, print_line, print_table

EXAMPLE = "\b\nExample:\n  emlens transition runs/trained --window 10"
VERDICTS = {
    "turn": "it turned at step {step}",
    "none": "no turn: a path of noise bends as much",
    "nothing measured": "nothing measured: the path moves less than the threshold everywhere",
    "too few checkpoints": "too few checkpoints to tell a turn from noise (100 are needed)",
}


@dataclass(frozen=True, kw_only=True)
class TransitionFlags(CommonFlags):
    """Flags of `transition`."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|SOURCE",
            help="A run of train that kept checkpoints, or a folder of checkpoint-STEP folders.",
        ),
    ]
    window: Annotated[
        int, typer.Option("--window", min=1, help="Training steps before and after a point.")
    ] = 10
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            min=0.0,
            help="Leave points out that move less than this share of the last norm.",
        ),
    ] = 0.03
    factor: Annotated[str, typer.Option("--factor", metavar="A|B", help="Whose path.")] = "B"
    seed: Seed = 0
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Save the result here.", show_default=False),
    ] = None


@takes_flags
def transition(flags: TransitionFlags) -> None:
    """Find the sharpest bend of an adapter's path, and whether chance explains it."""
    from emlens.cli.progress import show_work

    if flags.factor not in ("A", "B"):
        raise typer.BadParameter(f"--factor {flags.factor}: expected A or B")
    with show_work(quiet=flags.quiet):
        from emlens.organisms.trajectory import load_trajectory
        from emlens.organisms.transition import measure_transition

        trajectory = load_trajectory(flags.source)
        found = {
            normalised: measure_transition(
                trajectory,
                window=flags.window,
                threshold=flags.threshold,
                factor=flags.factor,  # pyright: ignore[reportArgumentType]
                normalised=normalised,
                seed=flags.seed,
            )
            for normalised in (False, True)
        }
    if flags.out is not None:
        found[False].save(flags.out)
    if flags.json:
        print_json(found[False].to_dict())
        return
    _show(found, len(trajectory))


def _show(found: dict[bool, Any], n: int) -> None:
    raw = found[False]
    first, last = int(raw.all_steps[0]), int(raw.all_steps[-1])
    print_line(f"{raw.source}: {n} checkpoints, steps {first} to {last}")
    print_table(
        [
            {
                "path": raw.factor + (", norms taken out" if normalised else ""),
                "sharpest at": one.sharpest,
                "prominence": one.prominence,
                "needed": one.critical,
                "bends most by chance": max(one.null_quantiles, key=one.null_quantiles.get),
                "verdict": one.verdict,
            }
            for normalised, one in found.items()
        ]
    )
    left = raw.n_small + raw.n_uneven
    print_line(f"{len(raw.steps)} points measured, {left} left out ({raw.n_small} move too little)")
    print_line(VERDICTS[raw.verdict].format(step=raw.step))
